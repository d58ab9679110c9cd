"""Primitives against the vectors of their documents."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wireguard import primitives

XKEY = bytes(range(0x80, 0xA0))
XNONCE = bytes(range(0x40, 0x58))
XPLAIN = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
XASSOCIATED = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
XSEALED = bytes.fromhex(
    "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216cb96b72e1213"
    "b4522f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff921f9664c97637da9768812f615c68b13b52e"
    "c0875924c1c7987947deafd8780acf49"
)


def test_hchacha20_of_the_draft() -> None:
    """draft-irtf-cfrg-xchacha-03 2.2.1."""
    made = primitives.hchacha20(bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927"))
    assert made.hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"


def test_xchacha20_poly1305_of_the_draft() -> None:
    """draft-irtf-cfrg-xchacha-03 A.3.1."""
    assert primitives.xseal(XKEY, XNONCE, XPLAIN, XASSOCIATED) == XSEALED
    assert primitives.xunseal(XKEY, XNONCE, XSEALED, XASSOCIATED) == XPLAIN


@pytest.mark.parametrize("at", [0, len(XPLAIN), len(XSEALED) - 1])
def test_xchacha20_poly1305_refuses_a_changed_byte(at: int) -> None:
    changed = bytearray(XSEALED)
    changed[at] ^= 1
    with pytest.raises(primitives.NotAuthentic):
        primitives.xunseal(XKEY, XNONCE, bytes(changed), XASSOCIATED)
    with pytest.raises(primitives.NotAuthentic):
        primitives.xunseal(XKEY, XNONCE, XSEALED, XASSOCIATED + b"\0")


def _slow_hchacha20(key: bytes, nonce: bytes) -> bytes:
    """The rounds written out, as the draft's 2.2 describes them."""
    words = [int.from_bytes((b"expand 32-byte k" + key + nonce)[at : at + 4], "little") for at in range(0, 64, 4)]

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for one, two, three, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            words[one] = (words[one] + words[two]) & 0xFFFFFFFF
            mixed = words[three] ^ words[one]
            words[three] = (mixed << turn | mixed >> 32 - turn) & 0xFFFFFFFF

    for _ in range(10):
        for at in range(4):
            quarter(at, 4 + at, 8 + at, 12 + at)
        for at in range(4):
            quarter(at, 4 + (at + 1) % 4, 8 + (at + 2) % 4, 12 + (at + 3) % 4)
    return b"".join(word.to_bytes(4, "little") for word in words[:4] + words[12:])


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
def test_hchacha20_is_its_rounds(key: bytes, nonce: bytes) -> None:
    assert primitives.hchacha20(key, nonce) == _slow_hchacha20(key, nonce)


def test_x25519_of_rfc_7748() -> None:
    """RFC 7748 6.1."""
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert primitives.public_key(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = primitives.exchange(primitives.private_key(bob), alice)
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_an_exchange_is_the_same_from_both_sides(one: bytes, other: bytes) -> None:
    first = primitives.exchange(primitives.private_key(one), primitives.public_key(other))
    assert first == primitives.exchange(primitives.private_key(other), primitives.public_key(one))


@pytest.mark.parametrize(
    "point",
    [
        bytes(32),
        b"\1" + bytes(31),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    ],
)
def test_points_of_low_order_are_refused(point: bytes) -> None:
    with pytest.raises(primitives.LowOrderPoint):
        primitives.exchange(primitives.private_key(bytes(range(32))), point)


@given(st.binary(max_size=64), st.binary(max_size=200))
def test_hmac_is_rfc_2104s(key: bytes, data: bytes) -> None:
    assert primitives.hmac_digest(key, data) == hmac.new(key, data, hashlib.blake2s).digest()


def test_a_kdf_is_hkdf() -> None:
    """RFC 5869 2.3 with an empty info: T(n) = HMAC(PRK, T(n-1) | n)."""
    first, second, third = primitives.kdf3(b"k" * 32, b"input")
    extracted = hmac.new(b"k" * 32, b"input", hashlib.blake2s).digest()
    assert first == hmac.new(extracted, b"\1", hashlib.blake2s).digest()
    assert second == hmac.new(extracted, first + b"\2", hashlib.blake2s).digest()
    assert third == hmac.new(extracted, second + b"\3", hashlib.blake2s).digest()
    assert primitives.kdf2(b"k" * 32, b"input") == (first, second)
    assert primitives.kdf1(b"k" * 32, b"input") == first


@pytest.mark.parametrize(
    ("wall_ns", "label"),
    [
        (0, "400000000000000a00000000"),
        (1_700_000_000_999_999_999, "400000006553f10a3b000000"),
        (1_700_000_001_000_000_000, "400000006553f10b00000000"),
    ],
)
def test_tai64n(wall_ns: int, label: str) -> None:
    assert primitives.tai64n(wall_ns).hex() == label


@given(st.integers(0, 1 << 61), st.integers(1 << 24, 1 << 40))
def test_labels_grow_with_time(wall_ns: int, later: int) -> None:
    assert primitives.tai64n(wall_ns) <= primitives.tai64n(wall_ns + 1)
    assert primitives.tai64n(wall_ns) < primitives.tai64n(wall_ns + later)


def test_a_secret_that_is_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        primitives.private_key(b"short")
