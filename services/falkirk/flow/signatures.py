"""Which flow a packet says that it is of, for those who look at packets from outside (captures, simulations). PURE.

`signature_of` reads it as the sender wrote it; an ICMP error is of the flow whose packet it quotes, in the direction in which the error travels.
A flow is keyed as its initiator writes it, so a packet may be of a flow under its own keys or under those of its reverse.
"""

from __future__ import annotations

from falkirk.flow.keys import Signature, key_of, lift_key
from falkirk.wire.checksum import Buffer
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, parse
from falkirk.wire.protocol import ICMP, ICMPV6, TCP
from falkirk.wire.translate import quoted


def signature_of(data: Buffer) -> Signature | None:
    """What the packet at the start of `data` says; None where it can't be parsed."""
    try:
        return of_packet(data, parse(data, 0, len(data), fragments=True))
    except MalformedPacket:
        return None


def of_packet(data: Buffer, packet: Packet) -> Signature:
    """What a parsed packet says. Raises MalformedPacket where it is an ICMP error whose quotation isn't sound."""
    if packet.is_icmp_error:
        quote = quoted(data, packet)
        return reverse(
            Signature(quote.protocol, quote.source, quote.destination, quote.source_port, quote.destination_port)
        )
    source_port = packet.source_port or packet.identifier
    return Signature(packet.protocol, packet.source, packet.destination, source_port, packet.destination_port)


def reverse(said: Signature) -> Signature:
    """The same flow in the other direction. An echo's identifier stays where it is: the reply has the same."""
    protocol, source, destination, source_port, destination_port = said
    if protocol != TCP and not destination_port:
        return Signature(protocol, destination, source, source_port, 0)
    return Signature(protocol, destination, source, destination_port, source_port)


def keys(said: Signature) -> tuple[bytes, ...]:
    """The keys under which a tunnel may know the flow: TCP may be lifted, or forwarded like everything else; an echo's reply has its identifier
    where its destination's port would be."""
    general = key_of(*said)
    protocol, source, destination, source_port, destination_port = said
    if protocol == TCP:
        return lift_key(source, destination, source_port, destination_port), general
    if protocol in (ICMP, ICMPV6):
        return general, key_of(protocol, source, destination, destination_port, source_port)
    return (general,)
