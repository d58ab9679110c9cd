"""Slot addresses: index <-> address is arithmetic, so the way back through the NAT is an array look-up.

A worker has one slot space for two TUN devices: `slot = kind << index_bits | index`, kind 0 for `vnet` tunnels and 1
for `raw` ones. IPv4 addresses come from 10.0.0.0/8: worker, kind and index from the top of the 24 bits. IPv6 addresses
carry the same 24-bit number in the low bits of fd66:616c:6b69:726b::/64. Host number 1 of each (worker, kind) prefix is
the device's own address, where the listener waits; indices below `FIRST_INDEX` and the last one are never slots.

There are two private namespaces with the same arithmetic. In the one that lifts, a slot's address is the *source* of a stream's first packet; in the
one that lowers it is the destination. Where flow and upgrader speak of both, those of the second have `LOWERED` added.

Limit: 64 workers; with W workers (rounded up to a power of two) a kind has 2^23 / W addresses.
"""

from __future__ import annotations

from typing import Final

from falkirk.wire.context import Framing

BASE4: Final = 10 << 24
BASE6: Final = 0xFD66616C6B69726B << 64
FIRST_INDEX: Final = 16
LOWERED: Final = 1 << 24
"""Added to the number of a slot in the lowering namespace."""
KIND: Final = {Framing.VNET: 0, Framing.RAW: 1}


class SlotPlan:
    """Arithmetic between slots and addresses for one number of workers."""

    def __init__(self, workers: int) -> None:
        """Raises ValueError unless 1 <= workers <= 64."""
        if not 1 <= workers <= 64:
            raise ValueError(f"workers must be 1 to 64, not {workers}")
        self.workers = workers
        self.index_bits = 23 - (workers - 1).bit_length()
        self.last_index = (1 << self.index_bits) - 2

    def base(self, worker: int) -> int:
        """The 24-bit number of the worker's slot 0."""
        return worker << (self.index_bits + 1)

    def slot(self, framing: Framing, index: int) -> int:
        """The slot number of an index."""
        return KIND[framing] << self.index_bits | index

    def address4(self, worker: int, slot: int) -> bytes:
        """The slot's IPv4 address, 4 bytes."""
        return (BASE4 | self.base(worker) | slot).to_bytes(4, "big")

    def address6(self, worker: int, slot: int) -> bytes:
        """The slot's IPv6 address, 16 bytes."""
        return (BASE6 | self.base(worker) | slot).to_bytes(16, "big")

    def slot_of(self, worker: int, address: bytes) -> int:
        """The slot of a packed address (4 or 16 bytes) of this worker; negative or too large where it isn't one."""
        return (int.from_bytes(address[-3:], "big")) - self.base(worker)

    def prefix_length4(self) -> int:
        """The length of a (worker, kind) prefix, IPv4."""
        return 32 - self.index_bits

    def prefix_length6(self) -> int:
        """The length of a (worker, kind) prefix, IPv6."""
        return 128 - self.index_bits
