"""Noise_IKpsk2 against the published vector of the Noise test suite (cacophony), and what a wrong key comes to."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from falkirk.wireguard import handshake, primitives
from falkirk.wireguard.handshake import Identity
from falkirk.wireguard.messages import NONCE

H = bytes.fromhex
PROLOGUE = b"John Galt"
PRESHARED = b"This is my Austrian perspective!"
INITIATOR = H("e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1")
RESPONDER = H("4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893")
EPHEMERAL = H("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a")
ANSWERING = H("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b")
HASH = H("f5191b875290abcd41347ac3622d9679688a7e980229cb937ef748336cfde0e5")
FIRST = H(
    "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944001e21de9f98ddd8e2ad57527207feb56253c9c94a9e496782ecfcb2a75fbcaf"
    "1b52948cc48daefe660c62119ab5000980c84831215f2441eba616548e832985464cf17e51ee93109008399a21f7e13f"
)
SECOND = H(
    "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843"
    "cb765f2caef0751b8f007572dab0322217755c0632f365717edbf34d33e87a"
)
TRANSPORT = [
    (b"F. A. Hayek", H("8153ca9833bc3c1b91a7e66e5f4d4f5b59bf9e64c2f20d15f0bba7")),
    (b"Carl Menger", H("07af0c9c86e1b4e80f36b04ff7688d51141af3debd0332f0a705ef")),
    (b"Jean-Baptiste Say", H("6ab1467c0448cc78394494abaaf23afce0e234315d6e2624dcbfa8a21c1c4d073d")),
    (
        b"Eugen B\xf6hm von Bawerk",
        H("dfc346c0d2296ae6cf1acf6f12b8456a1dba228cf8d8b774aacf1c47fc53aa80ebc7a4c292"),
    ),
]
PAYLOADS = (b"Ludwig von Mises", b"Murray Rothbard")


def _sides() -> tuple[Identity, Identity, bytes]:
    one, other = Identity(INITIATOR, PROLOGUE), Identity(RESPONDER, PROLOGUE)
    return one, other, primitives.exchange(one.secret, other.public)


def test_the_vector_from_both_sides() -> None:
    one, other, static = _sides()
    assert other.public == H("31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62")
    first, waiting = handshake.initiate(one, other.public, static, primitives.private_key(EPHEMERAL), PAYLOADS[0])
    assert first == FIRST
    claimed = handshake.claim(other, FIRST)
    assert claimed.public == one.public
    payload, state = handshake.prove(claimed, static, FIRST)
    assert payload == PAYLOADS[0]
    answering = primitives.private_key(ANSWERING)
    second, keys, hashed = handshake.respond(state, one.public, PRESHARED, answering, PAYLOADS[1])
    assert (second, hashed) == (SECOND, HASH)
    assert handshake.finish(one, waiting, PRESHARED, SECOND) == (PAYLOADS[1], keys, HASH)
    # Then the initiator speaks, and both in turn; Noise's nonce is a data message's counter.
    for turn, (plain, sealed) in enumerate(TRANSPORT):
        cipher = ChaCha20Poly1305(keys.of_responder if turn % 2 else keys.of_initiator)
        assert cipher.encrypt(NONCE.pack(turn // 2), plain, None) == sealed


@pytest.mark.parametrize("at", [0, 31, 32, 79])
def test_a_changed_key_in_the_first_message_is_refused(at: int) -> None:
    changed = bytearray(FIRST)
    changed[at] ^= 1
    with pytest.raises(primitives.NotAuthentic):
        handshake.claim(_sides()[1], bytes(changed))


@pytest.mark.parametrize("at", [80, 95, 111])
def test_a_changed_payload_proves_nothing(at: int) -> None:
    _, other, static = _sides()
    changed = bytearray(FIRST)
    changed[at] ^= 1
    with pytest.raises(primitives.NotAuthentic):
        handshake.prove(handshake.claim(other, bytes(changed)), static, bytes(changed))


def test_who_only_knows_public_keys_proves_nothing() -> None:
    """The claim can be made by anybody who has the public key that is claimed; the proof needs its private key."""
    one, other, _ = _sides()
    impostor = Identity(bytes(range(32)), PROLOGUE)
    impostor.public = one.public
    wrong = primitives.exchange(impostor.secret, other.public)
    first, _ = handshake.initiate(impostor, other.public, wrong, primitives.private_key(EPHEMERAL), PAYLOADS[0])
    claimed = handshake.claim(other, first)
    assert claimed.public == one.public
    with pytest.raises(primitives.NotAuthentic):
        handshake.prove(claimed, primitives.exchange(other.secret, one.public), first)


@pytest.mark.parametrize("at", [0, 31, 32, 62])
def test_a_changed_second_message_is_refused(at: int) -> None:
    one, other, static = _sides()
    _, waiting = handshake.initiate(one, other.public, static, primitives.private_key(EPHEMERAL), PAYLOADS[0])
    changed = bytearray(SECOND)
    changed[at] ^= 1
    with pytest.raises(primitives.NotAuthentic):
        handshake.finish(one, waiting, PRESHARED, bytes(changed))
    with pytest.raises(primitives.NotAuthentic):
        handshake.finish(one, waiting, bytes(32), SECOND)


def test_another_prologue_is_another_protocol() -> None:
    with pytest.raises(primitives.NotAuthentic):
        handshake.claim(Identity(RESPONDER), FIRST)
