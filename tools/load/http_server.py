"""An HTTP server that is fast enough to be downloaded from at tens of Gbit/s.

    /            a page that names the client's address
    /bytes/N     N bytes of a fixed pseudo-random stream, by sendfile from memory
    /drip/S      one line every 100 ms for S seconds: a connection that stays open to be looked at

The stream repeats a block of 32 MiB; `sha256 N` as command line prints its digest without serving anything.
Limit: one thread a connection, meant for hundreds of connections.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import os
import random
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO

BLOCK = 32 << 20
SEED = 0xFA1C


def block() -> bytes:
    """The stream's block; the same on every machine. 32 MiB."""
    return random.Random(SEED).randbytes(BLOCK)


def digest(size: int) -> str:
    """SHA-256 of the first `size` bytes of the stream, in hexadecimal."""
    whole, sha = block(), hashlib.sha256()
    while size > 0:
        sha.update(whole[:size] if size < BLOCK else whole)
        size -= BLOCK
    return sha.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers the three paths; anything else is 404."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    stream: BinaryIO
    """A memfd with the block, set once before serving; read by offset only."""

    def do_GET(self) -> None:
        """One request."""
        kind, _, argument = self.path.lstrip("/").partition("/")
        if kind == "":
            self._page()
        elif kind == "bytes" and argument.isdecimal():
            self._bytes(int(argument))
        elif kind == "drip" and argument.isdecimal():
            self._drip(int(argument))
        else:
            self.send_error(404)

    def _head(self, kind: str, length: int | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.flush()

    def _page(self) -> None:
        client = self.client_address[0].removeprefix("::ffff:")
        body = f"Hello from the server. I see you as {client}.\n".encode()
        self._head("text/plain", len(body))
        self.wfile.write(body)

    def _bytes(self, size: int) -> None:
        self._head("application/octet-stream", size)
        sent = 0
        while sent < size:
            offset = sent % BLOCK
            # socket.sendfile, since os.sendfile would see EAGAIN on a socket that has a timeout.
            sent += self.connection.sendfile(self.stream, offset, min(BLOCK - offset, size - sent))

    def _drip(self, seconds: int) -> None:
        self._head("text/plain", None)
        for tenth in range(seconds * 10):
            self.wfile.write(f"{tenth / 10:.1f} s\n".encode())
            self.wfile.flush()
            time.sleep(0.1)

    def handle_one_request(self) -> None:
        """A client that goes away in the middle is no news here."""
        try:
            super().handle_one_request()
        except (ConnectionResetError, BrokenPipeError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent: what the server says would mix with the demo's own output."""


class Server(ThreadingHTTPServer):
    """IPv6 sockets serve IPv4 too."""

    daemon_threads = True
    request_queue_size = 1024


class Server6(Server):
    """Listens on an IPv6 address."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        """`::` means every address of both families."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def main() -> None:
    """Serve until killed; "ready" on standard output once connections are taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bind", default="::")
    parser.add_argument("--port", type=int, default=80)
    arguments = parser.parse_args()
    Handler.stream = os.fdopen(os.memfd_create("stream"), "w+b", buffering=0)
    Handler.stream.write(block())
    kind = Server6 if ipaddress.ip_address(arguments.bind).version == 6 else Server
    with kind((arguments.bind, arguments.port), Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["sha256"]:
        print(digest(int(sys.argv[2])))
    else:
        main()
