"""An OIDC issuer as a process of its own: discovery document, key set, and a token endpoint that signs whatever claims it is told.

`python -m tests.process.oidc_issuer` prints its URL and serves until it is killed. `POST /token` takes {"claims": …, "key": name, "algorithm": …, "kid": …}
(`iss` is filled in), `POST /rotate` replaces its keys, `GET /asked` tells how often the key set was read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm


class Issuer(ThreadingHTTPServer):
    """Its keys and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked = self.generation = 0
        self.rotate()

    def rotate(self) -> None:
        """New keys; the old ones are published no longer."""
        self.generation += 1
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.stranger = ec.generate_private_key(ec.SECP256R1())

    def key_set(self) -> dict[str, Any]:
        """RFC 7517; with an entry that nobody here can use."""
        self.asked += 1
        keys = [
            {**json.loads(RSAAlgorithm.to_jwk(self.rsa.public_key())), "kid": f"rsa-{self.generation}", "alg": "RS256"},
            {**json.loads(ECAlgorithm.to_jwk(self.ec.public_key())), "kid": f"ec-{self.generation}", "use": "sig"},
            {"kty": "future", "kid": "unknown"},
        ]
        return {"keys": keys}

    def sign(self, given: dict[str, Any]) -> str:
        """A token."""
        name = given.get("key", "rsa")
        algorithm = given.get("algorithm", "RS256" if name == "rsa" else "ES256")
        key: Any = {"rsa": self.rsa, "ec": self.ec, "stranger": self.stranger, "none": None}.get(name, name)
        kid = given.get("kid", f"{'rsa' if name == 'rsa' else 'ec'}-{self.generation}")
        return jwt.encode({"iss": self.url, **given["claims"]}, key, algorithm=algorithm, headers={"kid": kid})


class Handler(BaseHTTPRequestHandler):
    """Answers."""

    server: Issuer

    def do_GET(self) -> None:
        """Discovery, keys, and what was asked."""
        found: Any = {
            "/.well-known/openid-configuration": {"issuer": self.server.url, "jwks_uri": f"{self.server.url}/keys"},
            "/asked": self.server.asked,
        }.get(self.path)
        self.answer(self.server.key_set() if self.path == "/keys" else found)

    def do_POST(self) -> None:
        """Tokens, rotation."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
        if self.path == "/rotate":
            self.server.rotate()
        self.answer(self.server.sign(body) if self.path == "/token" else True)

    def answer(self, value: Any) -> None:
        """Some JSON."""
        data = json.dumps(value).encode()
        self.send_response(404 if value is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Running:
    """The process, from outside."""

    def __init__(self, url: str) -> None:
        self.url = url

    def token(self, claims: dict[str, Any], **how: Any) -> str:
        """A signed token."""
        return str(self.ask("/token", {"claims": claims, **how}))

    def ask(self, path: str, body: Any = None) -> Any:
        """One request; POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self.url + path, data=data, timeout=10) as response:
            return json.load(response)


@contextmanager
def running() -> Iterator[Running]:
    """An issuer for the length of a block."""
    process = subprocess.Popen([sys.executable, "-m", "tests.process.oidc_issuer"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Running(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate(timeout=10)


def main() -> None:
    """Serve."""
    issuer = Issuer()
    print(issuer.url, flush=True)
    issuer.serve_forever()


if __name__ == "__main__":
    main()
