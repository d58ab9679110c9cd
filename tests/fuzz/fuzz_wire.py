"""Fuzz target: the packet code by itself. What it accepts is consistent: two implementations agree, what it builds it can parse,
what it does it can undo. Handover datagrams are decoded or refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from falkirk.wire import build, handover, segment, translate, vnet
from falkirk.wire.icmp import Unreachable
from falkirk.wire.malformed import REASONS, MalformedPacket
from falkirk.wire.nat import Rewrite, pair, rewrite4, rewrite6
from falkirk.wire.packet import Packet, parse, split, verify
from falkirk.wire.protocol import TCP

MTU = 1500
OURS = {4: bytes([192, 0, 0, 8]), 6: bytes.fromhex("fd66616c6b69726b0000000000000001")}
SLOT = {4: bytes([10, 0, 1, 16]), 6: bytes.fromhex("fd66616c6b69726b0000000000000110")}
DECODERS = (handover.ONRAMP_TO_FLOW, handover.FLOW_TO_ONRAMP, handover.FLOW_TO_UPGRADER, handover.UPGRADER_TO_FLOW)


def one(data: bytes) -> None:
    """First byte: what to try; the rest is its input."""
    if not data:
        return
    what, rest = data[0] % 4, data[1:]
    if what == 0:
        _datagram(rest)
    elif what == 1:
        _packet(rest)
    elif what == 2:
        _virtio(rest)
    else:
        for decoder in DECODERS:
            try:
                messages = decoder.decode(rest)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            assert decoder.decode(handover.encode(messages)) == messages


def _known(error: MalformedPacket, reasons: Sequence[str]) -> None:
    assert error.reason in reasons


def _datagram(data: bytes) -> None:
    end = 0
    try:
        for at, length in split(data, len(data)):
            assert at == end
            assert length >= 20
            end = at + length
            assert end <= len(data)
            _packet(data[at:end])
    except MalformedPacket as error:
        _known(error, REASONS)
    else:
        assert end == len(data)


def _packet(data: bytes) -> None:
    try:
        packet = parse(data, 0, len(data))
    except MalformedPacket as error:
        _known(error, REASONS)
        return
    assert packet.header_length <= packet.payload_offset <= packet.total_length <= len(data)
    # Where it stands in a buffer, and what lies around it, changes nothing.
    moved = parse(b"\xff" * 7 + data + b"\x55" * 9, 7, len(data))
    assert msgspec.structs.replace(moved, at=0) == packet
    source = OURS[packet.version]
    answers = [
        build.reset(packet),
        build.time_exceeded(data, packet, source),
        build.too_big(data, packet, 1280, source),
    ]
    answers += [build.unreachable(data, packet, why, source) for why in Unreachable]
    for answer in answers:
        if answer is not None:
            said = parse(answer, 0, len(answer))
            verify(answer, said)
            assert said.destination == packet.source
            assert said.total_length == len(answer) <= 1280
            # Nobody answers an answer.
            assert build.reset(said) is None
            if said.is_icmp_error:
                assert build.time_exceeded(answer, said, source) is None
    if packet.is_icmp_error:
        _error(data, packet)
    if packet.protocol == TCP:
        _rewrite(data, packet)


def _error(data: bytes, packet: Packet) -> None:
    try:
        quote = translate.quoted(data, packet)
    except MalformedPacket as error:
        _known(error, ("icmp_not_error", "bad_l4_checksum", "bad_icmp_quote", "icmp_mtu"))
        return
    slot = SLOT[packet.version]
    addresses = (quote.destination, quote.source)
    ports = (quote.destination_port, quote.source_port)
    up = Rewrite(*addresses, *ports, slot, slot, 7, 9)
    there = translate.translate(data, packet, quote, up)
    if there is None or quote.protocol != TCP:
        return
    inside = parse(there, 0, len(there))
    requoted = translate.quoted(there, inside)
    assert (requoted.source, requoted.source_port, requoted.destination, requoted.destination_port) == (
        slot,
        9,
        slot,
        7,
    )
    back = translate.translate(there, inside, requoted, Rewrite(slot, slot, 7, 9, *addresses, *ports))
    if back is None:
        return
    outside = parse(back, 0, len(back))
    again = translate.quoted(back, outside)
    assert again == quote


def _rewrite(data: bytes, packet: Packet) -> None:
    slot = SLOT[packet.version]
    client, server = (packet.source, packet.source_port), (packet.destination, packet.destination_port)
    up, _ = pair(client, server, (slot, packet.source_port), (slot, 1024))
    try:
        verify(data, packet)
        good = True
    except MalformedPacket:
        good = False
    buffer = bytearray(data)
    if packet.version == 4:
        changed = rewrite4(buffer, 0, up, partial=False)
    else:
        changed = rewrite6(buffer, 0, up, False, packet.header_length)
    assert changed is (packet.ttl > 1)
    if not changed:
        assert buffer == data
        return
    inside = parse(buffer, 0, len(buffer))
    assert (inside.source, inside.destination, inside.destination_port) == (slot, slot, 1024)
    assert inside.ttl == packet.ttl - 1
    try:
        verify(buffer, inside)
        assert good
    except MalformedPacket:
        assert not good


def _virtio(data: bytes) -> None:
    if len(data) < vnet.SIZE:
        return
    body = data[vnet.SIZE :]
    try:
        packet = parse(data, vnet.SIZE, len(body))
        if packet.total_length != len(body):
            return
    except MalformedPacket:
        return
    header = vnet.unpack(data, 0, len(data))
    normal: vnet.Header | None
    try:
        normal = vnet.validate(header, packet, MTU)
    except MalformedPacket as error:
        _known(error, ("vnet_flags", "vnet_gso_type", "vnet_gso_size", "vnet_checksum"))
        normal = None
    if packet.protocol != TCP:
        return
    # The packet loop's own test comes to the same.
    buffer = bytearray(data)
    test = vnet.admit_tcp4 if packet.version == 4 else vnet.admit_tcp6
    try:
        test(buffer, 0, len(buffer), packet.header_length, MTU)
    except MalformedPacket:
        assert normal is None
        return
    assert normal is not None
    assert vnet.unpack(buffer, 0, len(buffer)) == normal
    assert buffer[vnet.SIZE :] == body
    if packet.header_length in (20, 40):
        _segments(normal, body, packet)


def _segments(header: vnet.Header, body: bytes, packet: Packet) -> None:
    # The partial sum is the pseudo-header's, as a kernel sets it.
    made = segment.segments(header, body, 0, len(body))
    payload = b""
    for part in made:
        cut = parse(part, 0, len(part))
        assert cut.total_length == len(part)
        if header.gso_type:
            assert cut.payload_length <= header.gso_size
            assert cut.sequence == (packet.sequence + len(payload)) % (1 << 32)
        payload += part[cut.payload_offset :]
    assert payload == body[packet.payload_offset :]


if __name__ == "__main__":
    from tests.fuzz.coverage import script

    sys.exit(script("wire", sys.argv[1:]))
