"""Asking other resolvers: one question, from its own socket with its own id, to one resolver after another until one answers.

Each question leaves from a port that the kernel chooses for it alone, with a random id, and only a reply that fits both and repeats the question
is taken (RFC 5452 9.1); what else arrives there is passed over. A reply that is cut short is asked for again by TCP. A resolver that says SERVFAIL or
REFUSED isn't believed while there is another one.

Limits: no cache, no retransmission to the same resolver (the client retransmits); plain DNS only.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from falkirk.decide.resolver import endpoint
from falkirk.router import messages

RESOLV_CONF: Final = Path("/etc/resolv.conf")
MOST: Final = 4
"""Resolvers that are asked."""


class Way(NamedTuple):
    """A resolver, and the address to ask it from; empty lets the kernel choose."""

    host: str
    port: int
    egress: str = ""


class Unanswered(Exception):
    """No resolver has answered; the text says what became of each."""


class _Replies(asyncio.DatagramProtocol):
    """Waits for the one datagram that fits."""

    def __init__(self, asked: bytes) -> None:
        self._asked = asked
        self.reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        """A datagram from the resolver's address: the socket is connected."""
        if not self.reply.done() and messages.fits(self._asked, data):
            self.reply.set_result(data)

    def error_received(self, exc: Exception) -> None:
        """An ICMP error: nobody is there."""
        if not self.reply.done():
            self.reply.set_exception(exc)


async def exchange(make: Callable[[int], bytes], ways: Sequence[Way], timeout_s: float) -> bytes:
    """The first good reply to the question that `make` writes under an id. Raises Unanswered."""
    said: list[str] = []
    answered: bytes | None = None
    for way in ways[:MOST]:
        asked = make(int.from_bytes(os.urandom(2), "big"))
        try:
            async with asyncio.timeout(timeout_s):
                reply = await _by_udp(asked, way)
                if messages.cut_short(reply):
                    reply = await _by_tcp(asked, way)
        except TimeoutError:
            said.append(f"{way.host} didn't answer within {timeout_s:g} s")
            continue
        except (OSError, EOFError, ValueError) as error:
            said.append(f"{way.host}: {error}")
            continue
        if messages.code(reply) not in (messages.SERVFAIL, messages.REFUSED):
            return reply
        answered = reply
    if answered is not None:
        return answered
    raise Unanswered("; ".join(said) or "there is no resolver to ask")


async def _by_udp(asked: bytes, way: Way) -> bytes:
    loop = asyncio.get_running_loop()
    local = (way.egress, 0) if way.egress else None
    transport, replies = await loop.create_datagram_endpoint(
        lambda: _Replies(asked), local_addr=local, remote_addr=(way.host, way.port)
    )
    try:
        transport.sendto(asked)
        return await replies.reply
    finally:
        transport.close()


async def _by_tcp(asked: bytes, way: Way) -> bytes:
    local = (way.egress, 0) if way.egress else None
    reader, writer = await asyncio.open_connection(way.host, way.port, local_addr=local, flags=socket.AI_NUMERICHOST)
    try:
        writer.write(len(asked).to_bytes(2, "big") + asked)
        while True:
            size = int.from_bytes(await reader.readexactly(2), "big")
            reply = await reader.readexactly(size)
            if messages.fits(asked, reply):
                return reply
    finally:
        writer.close()


class Upstreams:
    """The node's own resolvers: those of the settings, or of a resolv.conf(5) that is read again when it has changed."""

    def __init__(self, configured: Sequence[str], path: Path = RESOLV_CONF) -> None:
        self._configured = [Way(*endpoint(text)) for text in configured]
        self._path = path
        self._seen: tuple[int, int] = (-1, -1)
        self._read: list[Way] = []

    def ways(self) -> list[Way]:
        """Whom to ask; none where nobody says."""
        if self._configured:
            return self._configured
        try:
            status = self._path.stat()
            seen = status.st_mtime_ns, status.st_ino
            if seen != self._seen:
                self._read, self._seen = nameservers(self._path.read_text(errors="replace")), seen
        except OSError:
            self._read, self._seen = [], (-1, -1)
        return self._read


def nameservers(text: str) -> list[Way]:
    """The servers of a resolv.conf(5), the first `MOST`; lines that say none are passed over, and so are link-local ones with a zone."""
    found: list[Way] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(Way(*endpoint(words[1])))
            except ValueError:
                continue
    return found[:MOST]
