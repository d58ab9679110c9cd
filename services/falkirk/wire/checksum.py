"""Internet checksums: RFC 1071 sums, RFC 1624 updates, pseudo-headers.

A ones' complement sum of 16-bit words is the number that the bytes spell, modulo 0xffff, so Python's big integers do the
adding. Sums here are *residues*: 0 stands for both representations of zero. A checksum field is minus the residue, which
gives 0 to 0xfffe, the canonical form that a kernel also writes (0xffff can only come of data that are all zero, and no
header or pseudo-header is).

An update is one addition: where a word changes from m to m', `field' = (field + m - m') % 0xffff`. A *partial* field
(virtio NEEDS_CSUM) holds the pseudo-header's sum itself, not its complement, and moves the other way.

Cost: 0.2 us for 40 bytes, 2.4 us for 1,460, 60 us for 64 KiB. Limit: 64 KiB at once is what the folds are made for; more
is right but slow.
"""

from __future__ import annotations

from typing import Final

Buffer = bytes | bytearray | memoryview


def _folds(bits: int) -> tuple[tuple[int, int], ...]:
    """Steps (shift, mask) that halve a number of so many bits down to 1,024 bits; each shift is a multiple of 16."""
    return tuple((1 << j, (1 << (1 << j)) - 1) for j in range(bits - 1, 9, -1))


# Division by 0xffff costs thrice what a shift, a mask and an addition cost, so long numbers are folded in halves first.
_FOLDS: Final = tuple(_folds(bits) for bits in range(21))


def residue(data: Buffer) -> int:
    """The sum of the 16-bit big-endian words, modulo 0xffff; an odd last byte is padded with a zero (RFC 1071)."""
    length = len(data)
    number = int.from_bytes(data, "big")
    if length & 1:
        number <<= 8
    if length > 192:
        for shift, mask in _FOLDS[min(20, (length * 8).bit_length())]:
            number = (number >> shift) + (number & mask)
    return number % 0xFFFF


def checksum(data: Buffer, initial: int = 0) -> int:
    """The field's value for data whose own field is zero, plus an `initial` residue (a pseudo-header)."""
    return -(residue(data) + initial) % 0xFFFF


def valid(data: Buffer, initial: int = 0) -> bool:
    """Whether data that contain their checksum add up (to a residue of 0, either representation)."""
    return (residue(data) + initial) % 0xFFFF == 0


def pseudo_header(source: Buffer, destination: Buffer, protocol: int, length: int) -> int:
    """The residue of the pseudo-header of IPv4 (RFC 9293 3.1) or IPv6 (RFC 8200 8.1); they add up alike.

    `length` is the upper layer's, header included, in bytes.
    """
    addresses = int.from_bytes(source, "big") + int.from_bytes(destination, "big")
    return (addresses + protocol + length) % 0xFFFF


def partial_field(source: Buffer, destination: Buffer, protocol: int, length: int) -> int:
    """What NEEDS_CSUM wants in the field: the pseudo-header's sum, uncomplemented."""
    return pseudo_header(source, destination, protocol, length)


def complete(data: bytearray | memoryview, start: int, field: int, end: int) -> None:
    """Completes a partial checksum in place: the sum from `start` to `end`, its complement into `field` (all absolute).

    The field holds the pseudo-header's sum beforehand (virtio 1.2, 5.1.6.2), so that it is part of the sum as it stands.
    """
    value = -residue(memoryview(data)[start:end]) % 0xFFFF
    data[field] = value >> 8
    data[field + 1] = value & 0xFF


def update(field: int, old: int, new: int) -> int:
    """RFC 1624: a field after a word (or a residue of words) changed from `old` to `new`."""
    return (field + old - new) % 0xFFFF
