"""Packets and the keys of the flows that they are of."""

from __future__ import annotations

import dpkt
import pytest

from falkirk.flow.keys import Signature, key_of, lift_key
from falkirk.flow.signatures import keys, reverse, signature_of
from falkirk.wire.build import segment, unreachable
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import parse

DEVICE = bytes([100, 96, 0, 2])
SERVER = bytes([203, 0, 113, 5])
SYN = 2


def echo(kind: int, source: bytes, destination: bytes) -> bytes:
    message = dpkt.icmp.ICMP(type=kind, data=dpkt.icmp.ICMP.Echo(id=77, seq=1, data=b"abcd"))
    return bytes(dpkt.ip.IP(src=source, dst=destination, p=1, data=message, len=20 + len(message)))


def test_a_segment_is_of_its_flow_in_both_directions() -> None:
    said = signature_of(segment(DEVICE, SERVER, 40000, 80, 1, 0, SYN))
    back = signature_of(segment(SERVER, DEVICE, 80, 40000, 1, 0, SYN))
    assert said == Signature(6, DEVICE, SERVER, 40000, 80)
    assert back is not None
    assert reverse(back) == said


def test_tcp_may_be_lifted_or_forwarded() -> None:
    said = Signature(6, DEVICE, SERVER, 40000, 80)
    assert keys(said) == (lift_key(DEVICE, SERVER, 40000, 80), key_of(6, DEVICE, SERVER, 40000, 80))
    assert keys(Signature(17, DEVICE, SERVER, 40000, 53)) == (key_of(17, DEVICE, SERVER, 40000, 53),)


def test_an_echo_and_its_reply_are_of_one_flow() -> None:
    said, back = signature_of(echo(8, DEVICE, SERVER)), signature_of(echo(0, SERVER, DEVICE))
    assert said == Signature(1, DEVICE, SERVER, 77, 0)
    assert back is not None
    assert reverse(back) == said


def test_a_forwarded_reply_has_its_identifier_where_the_port_would_be() -> None:
    said = Signature(1, SERVER, DEVICE, 77, 0)
    assert keys(said) == (key_of(1, SERVER, DEVICE, 77, 0), key_of(1, SERVER, DEVICE, 0, 77))


def test_an_error_is_of_the_flow_that_it_quotes() -> None:
    quoted = segment(SERVER, DEVICE, 80, 40000, 1, 1, 16)
    error = unreachable(quoted, parse(quoted, 0, len(quoted)), Unreachable.PORT, DEVICE)
    assert error is not None
    assert signature_of(error) == Signature(6, DEVICE, SERVER, 40000, 80)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x45", bytes(40), segment(DEVICE, SERVER, 1, 2, 3, 4, SYN)[:-1]])
def test_what_is_no_packet_says_nothing(data: bytes) -> None:
    assert signature_of(data) is None


def test_an_error_whose_quotation_is_broken_says_nothing() -> None:
    quoted = segment(SERVER, DEVICE, 80, 40000, 1, 1, 16)
    error = bytearray(unreachable(quoted, parse(quoted, 0, len(quoted)), Unreachable.PORT, DEVICE) or b"")
    error[-1] ^= 1
    assert signature_of(bytes(error)) is None
