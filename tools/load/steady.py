"""Both ends of connections that tell what became of them: bytes with their digest, and ticks whose gaps are measured.

    steady.py serve PORT                         until killed; "ready" once connections are taken
    steady.py take|give ADDRESS PORT BYTES       so many from the server, or to it; {"bytes", "seconds", "sha256_ok"}
    steady.py tick ADDRESS PORT SECONDS          2 KiB there and back every 20 ms. Each silence of 0.1 s and more is a line as it ends:
                                                 {"from", "gap_s"} (monotonic seconds); the last one is {"ticks", "longest_s", "whole"}

A silence is between two arrivals, so it holds whatever was lost either way until TCP had mended it. Limit: one thread a connection.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import socket
import socketserver
import time

BLOCK = 1 << 20
TICK = 2048
EVERY_S = 0.02
SILENCE_S = 0.1
PATIENCE_S = 60.0
HEAD = 64
"""Bytes of what is asked for, and of a digest."""


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes. Raises ConnectionError where the other side ends first."""
    found = bytearray()
    while len(found) < size:
        data = sock.recv(size - len(found))
        if not data:
            raise ConnectionError("it ended in the middle")
        found += data
    return bytes(found)


def send_random(sock: socket.socket, size: int) -> str:
    """Bytes that nobody foresees; their SHA-256."""
    block, sha = random.Random(os.urandom(16)).randbytes(BLOCK), hashlib.sha256()
    while size:
        # Another start each time, so that a piece that is lost or comes twice changes the sum.
        at = size % 4093
        part = block[at : at + min(size, BLOCK - 4093)]
        sock.sendall(part)
        sha.update(part)
        size -= len(part)
    return sha.hexdigest()


def receive(sock: socket.socket, size: int) -> str:
    """So many bytes; their SHA-256."""
    sha = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    while size:
        got = sock.recv_into(buffer, min(size, BLOCK))
        if not got:
            raise ConnectionError("it ended in the middle")
        sha.update(buffer[:got])
        size -= got
    return sha.hexdigest()


class Handler(socketserver.BaseRequestHandler):
    """What a client asks for."""

    def handle(self) -> None:
        """One connection."""
        sock = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            what, size = exactly(sock, HEAD).decode().split()
            if what == "take":
                sock.sendall(send_random(sock, int(size)).encode())
            elif what == "give":
                sock.sendall(receive(sock, int(size)).encode())
            else:
                while data := sock.recv(65536):
                    sock.sendall(data)
        except OSError:
            return


class Server(socketserver.ThreadingTCPServer):
    """On all addresses of both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def transfer(sock: socket.socket, what: str, size: int) -> dict[str, object]:
    """Take or give."""
    start = time.monotonic()
    mine = receive(sock, size) if what == "take" else send_random(sock, size)
    theirs = exactly(sock, HEAD).decode()
    return {"bytes": size, "seconds": time.monotonic() - start, "sha256_ok": mine == theirs}


def tick(sock: socket.socket, seconds: float) -> dict[str, object]:
    """Ticks until the time is over, and what came back."""
    sock.setblocking(False)
    start = last = time.monotonic()
    sent, back, asked, longest = bytearray(), 0, 0, 0.0
    while time.monotonic() < start + seconds or back < asked:
        now = time.monotonic()
        if now - last > PATIENCE_S:
            raise ConnectionError(f"nothing for {PATIENCE_S:g} s")
        if now < start + seconds and asked <= (now - start) / EVERY_S * TICK and len(sent) < BLOCK:
            sent += asked.to_bytes(8, "big") * (TICK // 8)
            asked += TICK
        ready = select.select([sock], [sock] if sent else [], [], EVERY_S)
        if ready[1]:
            del sent[: sock.send(sent)]
        if ready[0]:
            data = sock.recv(65536)
            if not data:
                raise ConnectionError("it ended in the middle")
            now = time.monotonic()
            longest = max(longest, now - last)
            if now - last >= SILENCE_S:
                print(json.dumps({"from": last, "gap_s": round(now - last, 3)}), flush=True)
            for offset in range(len(data)):
                number = (back + offset) // TICK * TICK
                if data[offset] != number >> 8 * (7 - (back + offset) % 8) & 0xFF:
                    return {"ticks": back // TICK, "longest_s": round(longest, 3), "whole": False}
            last, back = now, back + len(data)
    return {"ticks": back // TICK, "longest_s": round(longest, 3), "whole": True}


def main() -> None:
    """One of the two ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("serve", "take", "give", "tick"))
    parser.add_argument("words", nargs="+")
    arguments = parser.parse_args()
    if arguments.what == "serve":
        with Server(("::", int(arguments.words[0])), Handler) as server:
            print("ready", flush=True)
            server.serve_forever()
    address, port, amount = arguments.words
    with socket.create_connection((address, int(port)), timeout=PATIENCE_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(f"{arguments.what} {amount if arguments.what != 'tick' else 0}".ljust(HEAD).encode())
        found = tick(sock, float(amount)) if arguments.what == "tick" else transfer(sock, arguments.what, int(amount))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
