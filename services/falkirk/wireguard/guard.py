"""When a node is under load, and what one address may ask for then (5.3, 6.6).

Handshakes up to `rate` a second are answered as they come. Beyond that the node is under load, for one second after the last one
too many: only messages with a valid cookie go on, and of those an address (IPv6: its /64) may send 20 a second, five at once.
Cookie replies have a rate of their own, so that a flood doesn't make a node answer forever.

A flood beyond what is replied to needn't be read at all: `let_in` says what share of it is worth reading, for whoever can have the kernel drop
the rest.

Limit: 4,096 addresses are remembered; those beyond share one allowance until the second is over.
"""

from __future__ import annotations

from typing import Any, Final

HANDSHAKES_PER_SECOND: Final = 1000.0
"""How many are answered without asking for cookies: a quarter of what a core can answer."""
COOKIES_PER_SECOND: Final = 1_500.0
"""How many cookie replies are sent. What they cost, with receiving what they answer, live sessions go without: at 4,000 a transfer kept 0.65 to 1.0 of its throughput,
at this rate 0.93 and more (`./tools/bench wireguard`, "flood"). The price is a newcomer's chance, 1 in 13 a try at 20,000 a second; whoever is known is asked by
the node itself, where it has something for them, and needs no cookie for an answer."""
LOAD_SECONDS: Final = 1.0
"""How long a node stays under load after the last handshake too many."""
ADDRESS_RATE: Final = 20.0
ADDRESS_BURST: Final = 5.0
ADDRESSES: Final = 4096
_MAPPED: Final = "::ffff:"
"""How a socket of both families gives IPv4 addresses."""


class Bucket:
    """Tokens that come back at a rate, up to a burst."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._tokens = burst
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Whether there was a token."""
        tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if tokens < 1:
            self._tokens = tokens
            return False
        self._tokens = tokens - 1
        return True

    def left(self, now: float) -> float:
        """How many tokens there are, and parts of one."""
        return min(self._burst, self._tokens + (now - self._at) * self._rate)

    def full(self, now: float) -> bool:
        """Whether it has been left alone for so long that it is as good as new."""
        return self.left(now) >= self._burst


def let_in(asked: int, unread: int, seconds: float) -> float:
    """The share of initiations without a cookie that are worth reading from now on, where within `seconds` so many were read and were answered by a cookie
    reply or nothing, and so many weren't read: 1 for all, unless they are twice as many as there are cookie replies."""
    offered = (asked + unread) / seconds
    return COOKIES_PER_SECOND / offered if offered > 2 * COOKIES_PER_SECOND else 1.0


class Guard:
    """Decides what a handshake message must show. Time is an argument."""

    def __init__(self, rate: float = HANDSHAKES_PER_SECOND) -> None:
        """`rate` is handshakes a second; 0: always under load."""
        self._handshakes = Bucket(rate, rate)
        self._cookies = Bucket(COOKIES_PER_SECOND, COOKIES_PER_SECOND / 10)
        self._loaded_until = 0.0
        self._addresses: dict[str, Bucket] = {}
        self._others = Bucket(ADDRESS_RATE, ADDRESS_BURST)
        self.forced = False
        """Under load because its owner says so."""

    def loaded(self, now: float) -> bool:
        """Whether a message that comes now needs a cookie. Asked once a message: it counts."""
        if not self._handshakes.take(now):
            self._loaded_until = now + LOAD_SECONDS
        return self.forced or now < self._loaded_until

    def under_load(self, now: float) -> bool:
        """The same, without counting."""
        return self.forced or now < self._loaded_until

    def could_reply(self, now: float) -> bool:
        """Whether a cookie reply might be sent, without counting."""
        return self._cookies.left(now) >= 1

    def may_reply(self, now: float) -> bool:
        """Whether a cookie reply may be sent; it counts."""
        return self._cookies.take(now)

    def may_ask(self, endpoint: tuple[Any, ...], now: float) -> bool:
        """Whether this address, which has shown a cookie, may have another handshake."""
        address = network(str(endpoint[0]))
        bucket = self._addresses.get(address)
        if bucket is None:
            if len(self._addresses) >= ADDRESSES:
                self._addresses = {known: one for known, one in self._addresses.items() if not one.full(now)}
                if len(self._addresses) >= ADDRESSES:
                    return self._others.take(now)
            bucket = self._addresses[address] = Bucket(ADDRESS_RATE, ADDRESS_BURST)
        return bucket.take(now)


def network(address: str) -> str:
    """An IPv4 address as it is, mapped or not; of an IPv6 address its first four groups, written out."""
    if address.startswith(_MAPPED) and "." in address:
        return address[len(_MAPPED) :]
    if ":" not in address:
        return address
    head, _, tail = address.partition("%")[0].partition("::")
    groups = head.split(":") if head else []
    if len(groups) < 4:
        after = tail.split(":") if tail else []
        groups += ["0"] * (8 - len(groups) - len(after)) + after
    return ":".join(groups[:4])
