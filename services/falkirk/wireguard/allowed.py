"""Which inner source addresses a peer may use (cryptokey routing, section 2 of the paper). Nothing is allowed that isn't named.

Single addresses are found by their bytes, as the packet has them; prefixes are looked at only where that fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

Prefix = tuple[bytes, int]
"""An address of 4 or 16 bytes, and how many of its bits count."""

_FEW: Final = 4
"""Addresses that are looked through; more are a set, which is larger than the peer itself."""
_BITS: Final = {4: 32, 16: 128}


class Allowed:
    """A peer's inner addresses and prefixes."""

    __slots__ = ("_prefixes", "addresses")

    def __init__(self, prefixes: Iterable[Prefix] = ()) -> None:
        """Bits beyond a prefix's length are ignored. Raises ValueError where a length or an address isn't one."""
        addresses: set[bytes] = set()
        wide: list[tuple[int, int, int]] = []
        for address, length in prefixes:
            bits = _BITS.get(len(address))
            if bits is None or not 0 <= length <= bits:
                raise ValueError(
                    f"no prefix: {address.hex()}/{length}; an address has 4 or 16 bytes, a prefix up to 32 or 128 bits"
                )
            if length == bits:
                addresses.add(bytes(address))
            else:
                shift = bits - length
                wide.append((len(address), shift, int.from_bytes(address, "big") >> shift))
        self.addresses: Collection[bytes] = tuple(addresses) if len(addresses) <= _FEW else frozenset(addresses)
        self._prefixes: Final = tuple(wide)

    @classmethod
    def only(cls, addresses: tuple[bytes, ...]) -> Allowed:
        """These addresses, of 4 or 16 bytes each, and no others. A few aren't copied: whoever holds them for the peer shares them."""
        made = cls() if len(addresses) <= _FEW else cls((address, 8 * len(address)) for address in addresses)
        if len(addresses) <= _FEW:
            made.addresses = addresses
        return made

    def holds(self, address: bytes) -> bool:
        """Whether the address is named, or in a prefix that is."""
        if address in self.addresses:
            return True
        size = len(address)
        number = int.from_bytes(address, "big")
        return any(size == length and number >> shift == head for length, shift, head in self._prefixes)
