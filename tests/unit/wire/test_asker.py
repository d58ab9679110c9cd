"""Who asks the resolver."""

from __future__ import annotations

import msgspec
import pytest

from falkirk.wire import asker
from falkirk.wire.asker import Asker, NotAnAsker
from falkirk.wire.context import TunnelContext

CONTEXT = TunnelContext("t1", "acme", "d1", "laptop", "n1", "default", (bytes(4),), user="ann", groups=("eng",))
ASKER = Asker(bytes(16), 17, bytes([100, 96, 0, 2]), 4711, bytes([100, 96, 0, 53]), CONTEXT)


def test_an_asker_comes_out_as_it_went_in() -> None:
    assert asker.decode(asker.encode(ASKER)) == ASKER


def test_on_a_stream_its_length_comes_first() -> None:
    data = asker.encode(ASKER)
    assert asker.framed(data) == len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\n",
        asker.encode(ASKER)[:-1],
        asker.encode(msgspec.structs.replace(ASKER, version=asker.VERSION + 1)),
        asker.encode(msgspec.structs.replace(ASKER, flow_id=bytes(15))),
        asker.encode(msgspec.structs.replace(ASKER, destination=bytes(5))),
        asker.encode(msgspec.structs.replace(ASKER, flow_id=bytes(asker.MAX))),
    ],
)
def test_what_is_no_asker_is_refused(data: bytes) -> None:
    with pytest.raises(NotAnAsker):
        asker.decode(data)
