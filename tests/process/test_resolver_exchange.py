"""Asking other resolvers, over sockets on loopback: what is taken for an answer, and who is asked next."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dnslib import DNSHeader, DNSQuestion, DNSRecord

from falkirk.router import messages
from falkirk.router.exchange import Unanswered, Upstreams, Way, exchange, nameservers

QUESTION = messages.parse(bytes(DNSRecord(DNSHeader(id=1, rd=1), q=DNSQuestion("www.example.com")).pack()))
MAKE = partial(messages.forwarded, QUESTION)
Answer = Callable[[bytes], list[bytes]]


def reply(asked: bytes, flags: int = 0) -> bytes:
    return asked[:2] + (messages.QR | flags).to_bytes(2, "big") + asked[4:]


class Server(asyncio.DatagramProtocol):
    """Answers each datagram with what `answer` says."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked.append(data)
        for answer in self._answer(data):
            self._transport.sendto(answer, addr)


@asynccontextmanager
async def serving(answer: Answer, by_tcp: Answer | None = None) -> AsyncIterator[tuple[Way, Server]]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(lambda: Server(answer), local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert by_tcp is not None
        size = int.from_bytes(await reader.readexactly(2), "big")
        for one in by_tcp(await reader.readexactly(size)):
            writer.write(len(one).to_bytes(2, "big") + one)
        writer.close()

    listener = await asyncio.start_server(stream, "127.0.0.1", port) if by_tcp is not None else None
    try:
        yield Way("127.0.0.1", port), server
    finally:
        transport.close()
        if listener is not None:
            listener.close()


def test_forged_replies_are_passed_over() -> None:
    """Another id, another name, no reply at all; then the true one."""

    def forged(asked: bytes) -> list[bytes]:
        wrong_id = bytes([asked[0] ^ 1]) + reply(asked)[1:]
        return [b"", b"junk", wrong_id, asked, reply(asked.replace(b"www", b"wwx")), reply(asked, messages.RA)]

    async def main() -> bytes:
        async with serving(forged) as (way, _):
            return await exchange(MAKE, [way], 5)

    assert int.from_bytes(asyncio.run(main())[2:4], "big") == messages.QR | messages.RA


def test_what_is_cut_short_is_asked_for_by_tcp() -> None:
    async def main() -> bytes:
        async with serving(
            lambda asked: [reply(asked, messages.TC)], lambda asked: [b"junk", reply(asked) + bytes(2000)]
        ) as (way, _):
            return await exchange(MAKE, [way], 5)

    assert len(asyncio.run(main())) > 2000


def test_one_that_refuses_or_is_not_there_is_followed_by_the_next() -> None:
    async def main() -> tuple[bytes, int, int]:
        async with (
            serving(lambda asked: [reply(asked, messages.SERVFAIL)]) as (fails, first),
            serving(lambda asked: []) as (silent, second),
            serving(lambda asked: [reply(asked)]) as (good, _),
        ):
            async with serving(lambda asked: []) as (closed, _):
                pass
            found = await exchange(MAKE, [fails, closed, silent, good], 0.3)
            return found, len(first.asked), len(second.asked)

    found, first, second = asyncio.run(main())
    assert (messages.code(found), first, second) == (messages.NOERROR, 1, 1)


def test_where_all_fail_the_one_that_said_so_is_believed() -> None:
    async def main() -> bytes:
        async with serving(lambda asked: [reply(asked, messages.SERVFAIL)]) as (fails, _):
            return await exchange(MAKE, [fails], 5)

    assert messages.code(asyncio.run(main())) == messages.SERVFAIL


def test_where_nobody_answers_it_is_told_of_each() -> None:
    async def main() -> None:
        async with serving(lambda asked: []) as (silent, _):
            await exchange(MAKE, [silent], 0.1)

    with pytest.raises(Unanswered, match="didn't answer within"):
        asyncio.run(main())
    with pytest.raises(Unanswered, match="no resolver"):
        asyncio.run(exchange(MAKE, [], 1))


def test_the_nodes_resolvers_are_read_again_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    upstreams = Upstreams((), path)
    assert upstreams.ways() == []
    path.write_text("# none\nsearch x\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver\n")
    assert upstreams.ways() == [Way("192.0.2.1", 53), *nameservers("nameserver fe80::1%eth0")]
    path.write_text("nameserver 192.0.2.2\n")
    os.utime(path, ns=(1, 1))
    assert upstreams.ways() == [Way("192.0.2.2", 53)]
    assert Upstreams(["192.0.2.9", "[2001:db8::1]:5353"], path).ways() == [
        Way("192.0.2.9", 53),
        Way("2001:db8::1", 5353),
    ]
