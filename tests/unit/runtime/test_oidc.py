"""The verifier's cache of keys as transcripts: its clock and its fetches are given."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from falkirk.runtime import oidc

ISSUER = "https://issuer.example"
KEYS_URL = f"{ISSUER}/keys"
WALL = 1_700_000_000.0


class Issuer:
    """Its keys, what it was asked, and whether it is away."""

    def __init__(self) -> None:
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.asked: list[str] = []
        self.away = False
        self.now = 0.0
        self.named = ISSUER
        self.rotate("one")
        trusted = [oidc.Trusted(ISSUER, "app")]
        self.verifier = oidc.Verifier(trusted, self.fetch, now=lambda: self.now, wall=lambda: WALL)

    def rotate(self, *names: str) -> None:
        """Publish these keys only."""
        self.keys = {name: self.keys.get(name) or ec.generate_private_key(ec.SECP256R1()) for name in names}

    def fetch(self, url: str) -> Any:
        """What it answers."""
        self.asked.append(url.removeprefix(ISSUER))
        if self.away:
            raise OSError("away")
        if url == KEYS_URL:
            public = {name: ECAlgorithm.to_jwk(key.public_key()) for name, key in self.keys.items()}
            return {"keys": [{**json.loads(text), "kid": name} for name, text in public.items()]}
        return {"issuer": self.named, "jwks_uri": KEYS_URL}

    def token(self, kid: str | None, key: ec.EllipticCurvePrivateKey | None = None) -> str:
        """A token that is good but for what its key is."""
        claims = {"iss": ISSUER, "aud": "app", "sub": "ann", "iat": WALL, "exp": WALL + 60}
        headers = {"kid": kid} if kid is not None else {}
        return jwt.encode(claims, key or self.keys[kid or "one"], algorithm="ES256", headers=headers)

    def verify(self, token: str) -> str:
        """Whom it is about, or what it is refused for."""
        try:
            return asyncio.run(self.verifier.verify(token)).subject
        except (oidc.NotAccepted, oidc.Unavailable) as error:
            return type(error).__name__


def test_keys_are_read_once_and_again_when_they_are_old() -> None:
    issuer = Issuer()
    token = issuer.token("one")
    assert [issuer.verify(token) for _ in range(3)] == ["ann"] * 3
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]
    issuer.now = oidc.FRESH_S + 1
    assert issuer.verify(token) == "ann"
    assert len(issuer.asked) == 4


def test_a_new_key_works_at_once_and_made_up_ones_cost_one_read_in_ten_seconds() -> None:
    issuer = Issuer()
    issuer.verify(issuer.token("one"))
    issuer.now = oidc.RETRY_S
    issuer.rotate("one", "two")
    assert issuer.verify(issuer.token("two")) == "ann"
    reads = len(issuer.asked)
    stranger = ec.generate_private_key(ec.SECP256R1())
    assert [issuer.verify(issuer.token(f"x{number}", stranger)) for number in range(5)] == ["NotAccepted"] * 5
    assert len(issuer.asked) == reads
    issuer.now = 2 * oidc.RETRY_S
    assert issuer.verify(issuer.token("x", stranger)) == "NotAccepted"
    assert len(issuer.asked) == reads + 2


def test_a_key_that_is_published_no_longer_ends_with_the_cache() -> None:
    issuer = Issuer()
    token = issuer.token("one")
    issuer.verify(token)
    issuer.rotate("two")
    assert issuer.verify(token) == "ann"
    issuer.now = oidc.FRESH_S + 1
    assert issuer.verify(token) == "NotAccepted"


def test_while_the_issuer_is_away_its_keys_serve_for_a_day() -> None:
    issuer = Issuer()
    token = issuer.token("one")
    issuer.verify(token)
    issuer.away = True
    issuer.now = oidc.STALE_S - 1
    assert issuer.verify(token) == "ann"
    issuer.now = oidc.STALE_S + oidc.RETRY_S
    assert issuer.verify(token) == "Unavailable"
    assert issuer.verify(token) == "Unavailable", "and it isn't asked again at once"
    issuer.away = False
    issuer.now += oidc.RETRY_S
    assert issuer.verify(token) == "ann"


def test_a_discovery_document_of_another_issuer_is_no_use() -> None:
    issuer = Issuer()
    issuer.named = "https://evil.example"
    assert issuer.verify(issuer.token("one")) == "Unavailable"


def test_a_token_without_a_key_id_is_taken_where_one_key_fits() -> None:
    issuer = Issuer()
    assert issuer.verify(issuer.token(None)) == "ann"
    issuer.rotate("one", "two")
    issuer.now = oidc.FRESH_S + 1
    assert issuer.verify(issuer.token(None)) == "NotAccepted"


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "e30.e30.", "x" * 20_000])
def test_what_isn_t_a_token_is_refused_without_asking_anyone(token: str) -> None:
    issuer = Issuer()
    assert issuer.verify(token) == "NotAccepted"
    assert issuer.asked == []


@pytest.mark.parametrize("url", ["http://issuer.example", "ftp://127.0.0.1/x", "https://", "file:///etc/passwd", ""])
def test_only_https_is_asked_but_on_this_machine(url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        oidc.check_url(url)


@pytest.mark.parametrize("url", ["https://issuer.example/a", "http://127.0.0.1:8080", "http://[::1]:1/x"])
def test_urls_that_may_be_asked(url: str) -> None:
    assert oidc.check_url(url) == url
