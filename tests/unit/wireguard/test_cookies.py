"""macs and cookies: who must know what, for how long, and from where."""

from __future__ import annotations

import pytest

from falkirk.wireguard import cookies, primitives
from falkirk.wireguard.cookies import COOKIE_SECONDS, Checker, cookie_key, mac1_key, open_reply, sign
from falkirk.wireguard.messages import COOKIE_SIZE, HEADER, INITIATION, INITIATION_SIZE, MAC_OFFSETS, MAC_SIZE, NO_MAC
from tests.unit.wireguard.pair import CLIENT, randomness

PUBLIC = primitives.public_key(bytes(range(32)))
BODY = HEADER.pack(INITIATION, 0x01020304) + bytes(range(MAC_OFFSETS[INITIATION] - 8))


def checker() -> Checker:
    return Checker(PUBLIC, randomness("cookies"))


def cookie_of(made_by: Checker, now: float = 0.0) -> bytes:
    """A cookie as a client has it: asked for, and opened."""
    asked = sign(BODY, mac1_key(PUBLIC), b"")
    reply = made_by.reply(asked, CLIENT, now)
    assert len(reply) == COOKIE_SIZE < len(asked)
    assert reply[:8] == b"\3\0\0\0" + asked[4:8]
    return open_reply(reply, cookie_key(PUBLIC), asked[-2 * MAC_SIZE : -MAC_SIZE])


def test_mac1_is_that_of_the_paper() -> None:
    """5.4.4: MAC(HASH(LABEL_MAC1 | Spub), msg) over all that is before it."""
    signed = sign(BODY, mac1_key(PUBLIC), b"")
    assert len(signed) == INITIATION_SIZE
    assert signed[-32:-16] == primitives.mac(primitives.digest(b"mac1----", PUBLIC), BODY)
    assert signed[-16:] == NO_MAC
    assert checker().mac1_holds(signed, INITIATION)


@pytest.mark.parametrize("at", [0, 4, 50, 115, 116, 131])
def test_mac1_covers_everything_before_mac2(at: int) -> None:
    changed = bytearray(sign(BODY, mac1_key(PUBLIC), b""))
    changed[at] ^= 0x80
    assert not checker().mac1_holds(bytes(changed), INITIATION)


def test_a_cookie_makes_mac2_hold_at_its_own_address_only() -> None:
    mine = checker()
    cookie = cookie_of(mine)
    signed = sign(BODY, mac1_key(PUBLIC), cookie)
    assert mine.mac2_holds(signed, CLIENT, 1.0)
    assert not mine.mac2_holds(signed, (CLIENT[0], CLIENT[1] + 1), 1.0)
    assert not mine.mac2_holds(signed, ("192.0.2.9", CLIENT[1]), 1.0)
    assert not mine.mac2_holds(sign(BODY, mac1_key(PUBLIC), bytes(16)), CLIENT, 1.0)
    assert not mine.mac2_holds(sign(BODY, mac1_key(PUBLIC), b""), CLIENT, 1.0)


@pytest.mark.parametrize(
    ("age", "good"),
    [
        (COOKIE_SECONDS - 1, True),
        (COOKIE_SECONDS + 1, True),
        (2 * COOKIE_SECONDS - 1, True),
        (2 * COOKIE_SECONDS, False),
        (1e6, False),
    ],
)
def test_a_cookie_is_good_for_two_minutes_at_least_and_four_at_most(age: float, good: bool) -> None:
    mine = checker()
    signed = sign(BODY, mac1_key(PUBLIC), cookie_of(mine))
    # Somebody asks in between, so that the secret turns when it may.
    mine.mac2_holds(signed, CLIENT, min(age, COOKIE_SECONDS))
    assert mine.mac2_holds(signed, CLIENT, age) is good


def test_a_silent_time_makes_both_secrets_too_old() -> None:
    mine = checker()
    signed = sign(BODY, mac1_key(PUBLIC), cookie_of(mine))
    assert not mine.mac2_holds(signed, CLIENT, 2 * COOKIE_SECONDS)


def test_a_reply_is_bound_to_the_message_that_asked() -> None:
    mine = checker()
    asked = sign(BODY, mac1_key(PUBLIC), b"")
    reply = mine.reply(asked, CLIENT, 0.0)
    mac1 = asked[-32:-16]
    for key, bound in ((cookie_key(bytes(32)), mac1), (cookie_key(PUBLIC), bytes(16)), (cookie_key(PUBLIC), b"")):
        with pytest.raises(primitives.NotAuthentic):
            open_reply(reply, key, bound)
    with pytest.raises(primitives.NotAuthentic):
        open_reply(reply[:-1], cookie_key(PUBLIC), mac1)


def test_no_two_replies_share_a_nonce() -> None:
    """They share a subkey between two turns, so the rest of the nonce must differ; and each turn has another subkey."""
    mine = checker()
    asked = sign(BODY, mac1_key(PUBLIC), b"")
    nonces = [mine.reply(asked, CLIENT, now)[8:32] for now in (0.0, 0.0, 1.0, COOKIE_SECONDS, COOKIE_SECONDS, 500.0)]
    assert len(set(nonces)) == len(nonces)
    assert len({nonce[:16] for nonce in nonces}) == 3


def test_a_source_is_address_and_port_and_not_the_flow_label() -> None:
    assert cookies.source_of(("::1", 5, 0, 0)) == cookies.source_of(("::1", 5, 7, 0))
    assert cookies.source_of(("::1", 5)) != cookies.source_of(("::1", 6))
