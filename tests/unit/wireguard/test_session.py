"""A session: whose key is which, how long it lasts, and that it can rest."""

from __future__ import annotations

import pytest

from falkirk.wireguard.allowed import Allowed
from falkirk.wireguard.handshake import Keys
from falkirk.wireguard.messages import NONCE
from falkirk.wireguard.peer import Peer
from falkirk.wireguard.session import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES, Session

KEYS = Keys(b"i" * 32, b"r" * 32)


def session(*, initiator: bool) -> Session:
    return Session(Peer(bytes(32), bytes(32), Allowed(), 0, None), 1, 2, KEYS, initiator=initiator, created=50.0)


def test_what_one_side_seals_the_other_opens() -> None:
    one, other = session(initiator=True), session(initiator=False)
    for sender, receiver in ((one, other), (other, one)):
        sealed = sender.sealer()(NONCE.pack(7), b"hello", None)
        assert receiver.opener()(NONCE.pack(7), sealed, None) == b"hello"


def test_the_limits_of_the_paper() -> None:
    """6.1."""
    assert REKEY_AFTER_MESSAGES == 2**60
    assert REJECT_AFTER_MESSAGES == 2**64 - 2**13 - 1


@pytest.mark.parametrize(("now", "expired"), [(50.0, False), (229.9, False), (230.0, True)])
def test_it_ends_after_180_seconds(now: float, expired: bool) -> None:
    assert session(initiator=True).expired(now) is expired


def test_at_rest_it_has_keys_and_no_ciphers() -> None:
    one = session(initiator=True)
    one.open, one.seal = one.opener(), one.sealer()
    one.rest()
    assert [getattr(one, name) for name in ("open", "seal")] == [None, None]
    assert (one.send_key, one.receive_key) == KEYS
