"""OIDC ID tokens: who signed whom in, checked against keys that the issuer publishes.

A token is taken where an issuer of the settings signed it (its JSON Web Key Set, found by OpenID Connect Discovery), it is for an audience of the settings,
and it is now neither too early nor too late (OpenID Connect Core 3.1.3.7). Signatures are asymmetric ones only: a key set is public, so nothing
that it holds may serve as a shared secret, and `none` is no signature.

Key sets are cached for 10 minutes. A token with a key id that isn't in the set has it fetched again, at most every 10 seconds, so keys that are rotated work at once and
made-up ids cost the issuer nothing. While the issuer is away its last keys serve for a day.
Limits: nothing is asked of the issuer about a token (no introspection, no revocation): a token is good until it ends. An answer of the issuer is at most 1 MiB in 5 s.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import jwt

ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""RFC 7518 section 3.1 and RFC 8037, the asymmetric ones."""
FRESH_S: Final = 600.0
RETRY_S: Final = 10.0
STALE_S: Final = 86400.0
LEEWAY_S: Final = 60
"""How far clocks may differ (RFC 7519 section 4.1.4: usually no more than a few minutes)."""
TIMEOUT_S: Final = 5.0
BYTES: Final = 1 << 20
TOKEN_BYTES: Final = 16 * 1024
"""No legitimate ID token is larger; parsing costs time."""


class NotAccepted(Exception):
    """The token isn't one that is accepted here; the message says why, and nothing of the token but its issuer's name."""


class Unavailable(Exception):
    """The issuer's keys can't be had now."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """An issuer, for whom its tokens must be, and where its keys are (empty: by discovery)."""

    issuer: str
    audience: str
    jwks_url: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a token is about."""

    issuer: str
    subject: str
    audiences: tuple[str, ...]
    claims: Mapping[str, Any]

    def text(self, claim: str) -> str:
        """A claim that is text; empty where it isn't."""
        value = self.claims.get(claim)
        return value if isinstance(value, str) else ""

    def words(self, claim: str) -> tuple[str, ...]:
        """A claim that is a list of text, or one text; each once, in order."""
        value = self.claims.get(claim)
        values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        return tuple(dict.fromkeys(item for item in values if isinstance(item, str) and item))


@dataclass(slots=True)
class _Keys:
    """The keys of an issuer, as last fetched."""

    by_id: dict[str, jwt.PyJWK] = field(default_factory=dict)
    nameless: list[jwt.PyJWK] = field(default_factory=list)
    fetched: float = float("-inf")
    tried: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Verifier:
    """Checks tokens of some issuers. `fetch` (a blocking function: URL -> JSON) and clocks can be given, for tests."""

    def __init__(
        self,
        trusted: Iterable[Trusted],
        fetch: Callable[[str], Any] | None = None,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._trusted = tuple(trusted)
        self._fetch, self._now, self._wall = fetch or fetch_json, now, wall
        self._keys: dict[str, _Keys] = {}

    async def verify(self, token: str) -> Identity:
        """Whom a token is about. Raises `NotAccepted`, `Unavailable`."""
        header, issuer = _peek(token)
        trusted = [entry for entry in self._trusted if entry.issuer == issuer]
        if not trusted:
            raise NotAccepted("the sign-in is of an issuer that this mesh doesn't know")
        algorithm = header.get("alg")
        if algorithm not in ALGORITHMS:
            raise NotAccepted(
                f"the sign-in is signed with an algorithm that isn't accepted; accepted are {', '.join(ALGORITHMS)}"
            )
        key = await self._key(trusted[0], header.get("kid"), str(algorithm))
        try:
            payload: bytes = jwt.PyJWS(algorithms=list(ALGORITHMS)).decode_complete(
                token, key, algorithms=[str(algorithm)]
            )["payload"]
            claims = json.loads(payload)
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise NotAccepted("the sign-in isn't signed by its issuer") from error
        return judge(claims, [entry.audience for entry in trusted], self._wall())

    async def _key(self, trusted: Trusted, key_id: Any, algorithm: str) -> jwt.PyJWK:
        keys = self._keys.setdefault(trusted.issuer, _Keys())
        async with keys.lock:
            now = self._now()
            missing = _select(keys, key_id, algorithm) is None
            if (now - keys.fetched > FRESH_S or missing) and now - keys.tried >= RETRY_S:
                keys.tried = now
                await self._refresh(trusted, keys, now)
        found = _select(keys, key_id, algorithm)
        if found is not None:
            return found
        if keys.fetched == float("-inf"):
            raise Unavailable("the issuer's keys can't be had at the moment; try again in a while")
        raise NotAccepted("the sign-in is signed with a key that its issuer doesn't publish")

    async def _refresh(self, trusted: Trusted, keys: _Keys, now: float) -> None:
        try:
            found = await asyncio.to_thread(self._key_set, trusted)
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            if now - keys.fetched > STALE_S:
                keys.by_id, keys.nameless, keys.fetched = {}, [], float("-inf")
                raise Unavailable(f"the keys of issuer {trusted.issuer} can't be had: {error}") from error
            return
        keys.by_id = {key.key_id: key for key in found if key.key_id}
        keys.nameless = [key for key in found if not key.key_id]
        keys.fetched = now

    def _key_set(self, trusted: Trusted) -> list[jwt.PyJWK]:
        url = trusted.jwks_url
        if not url:
            about = self._fetch(trusted.issuer.rstrip("/") + "/.well-known/openid-configuration")
            # OpenID Connect Discovery 4.3: it must name itself exactly so.
            if about["issuer"] != trusted.issuer:
                raise ValueError("its discovery document names another issuer")
            url = str(about["jwks_uri"])
        found = []
        for item in self._fetch(url)["keys"]:
            if not isinstance(item, dict) or item.get("use", "sig") != "sig":
                continue
            try:
                found.append(jwt.PyJWK(item))
            except (
                jwt.PyJWTError,
                ValueError,
                TypeError,
            ):  # of a kind that nobody here could use; others in the set may do
                continue
        return found


def judge(claims: Any, audiences: Iterable[str], now: float) -> Identity:
    """The identity in the claims of a token whose signature is good. Raises `NotAccepted`."""
    if not isinstance(claims, dict):
        raise NotAccepted("the sign-in says nothing")
    subject, issuer = claims.get("sub"), claims.get("iss")
    # OpenID Connect Core 2: at most 255 ASCII characters.
    if not isinstance(subject, str) or not 0 < len(subject) <= 255 or not isinstance(issuer, str):
        raise NotAccepted("the sign-in doesn't say whom it is about (sub)")
    given = claims.get("aud")
    listed = tuple(item for item in (given if isinstance(given, list) else [given]) if isinstance(item, str))
    wanted = [audience for audience in audiences if audience in listed]
    if not wanted:
        raise NotAccepted("the sign-in is for another audience (aud)")
    # Core 3.1.3.7, 4 and 5: of several audiences, the one that asked for it.
    if (len(listed) > 1 or "azp" in claims) and claims.get("azp") not in wanted:
        raise NotAccepted("the sign-in was asked for by another party (azp)")
    expires, issued, begins = (claims.get(name) for name in ("exp", "iat", "nbf"))
    if not _number(expires) or not _number(issued):
        raise NotAccepted("the sign-in has no end (exp) or no beginning (iat)")
    if expires + LEEWAY_S <= now:
        raise NotAccepted("the sign-in has expired; sign in again")
    if issued - LEEWAY_S > now or (begins is not None and (not _number(begins) or begins - LEEWAY_S > now)):
        raise NotAccepted("the sign-in isn't valid yet; are the clocks right?")
    return Identity(issuer, subject, listed, claims)


def fetch_json(url: str) -> Any:
    """A JSON document over HTTPS (plain HTTP for loopback addresses only). Raises OSError, ValueError."""
    request = urllib.request.Request(check_url(url), headers={"Accept": "application/json"})
    with _OPENER.open(request, timeout=TIMEOUT_S) as response:
        data: bytes = response.read(BYTES + 1)
    if len(data) > BYTES:
        raise ValueError("the answer is larger than 1 MiB")
    return json.loads(data)


def check_url(url: str) -> str:
    """The URL, where it is one of HTTPS or of a loopback address. Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"):
        return url
    raise ValueError(f"{url!r} isn't an https URL")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows only to where we would have gone by ourselves."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The next request; ValueError for a bad scheme."""
        return super().redirect_request(req, fp, code, msg, headers, check_url(newurl))


_OPENER: Final = urllib.request.build_opener(_Redirects)


def _peek(token: str) -> tuple[dict[str, Any], str]:
    """Header and issuer of a token that hasn't been checked."""
    if len(token) > TOKEN_BYTES:
        raise NotAccepted("the sign-in isn't an ID token: too large")
    try:
        unverified = jwt.decode_complete(token, options={"verify_signature": False})
        return unverified["header"], str(unverified["payload"].get("iss", ""))
    except (jwt.InvalidTokenError, ValueError, TypeError, AttributeError) as error:
        raise NotAccepted("the sign-in isn't an ID token (JWT)") from error


def _select(keys: _Keys, key_id: Any, algorithm: str) -> jwt.PyJWK | None:
    """The key of an id; where a token names none, the only one that fits its algorithm."""
    if isinstance(key_id, str):
        found = keys.by_id.get(key_id)
        return found if found is not None and found.algorithm_name == algorithm else None
    fitting = [key for key in (*keys.by_id.values(), *keys.nameless) if key.algorithm_name == algorithm]
    return fitting[0] if len(fitting) == 1 else None


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e12 < value < 1e12
