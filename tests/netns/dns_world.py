"""A DNS server for tests, as its own process: `python dns_world.py ADDRESS PORT ZONE`, UDP and TCP, dnslib's own server.

Its names: www.ZONE has the address 192.0.2.80, long.ZONE 40 addresses (more than UDP carries), everything else doesn't exist. ZONE's TXT record says which
address asked. Prints `ready` once it serves.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from dnslib import QTYPE, RCODE, RR, TXT, A
from dnslib.server import BaseResolver, DNSServer


class Zone(BaseResolver):  # type: ignore[misc]  # dnslib has no types
    """One zone."""

    def __init__(self, domain: str) -> None:
        self._domain = domain

    def resolve(self, request: Any, handler: Any) -> Any:
        """dnslib's contract."""
        reply = request.reply()
        name = str(request.q.qname).lower().rstrip(".")
        found = {f"www.{self._domain}": ["192.0.2.80"], f"long.{self._domain}": [f"192.0.2.{n}" for n in range(1, 41)]}
        if name == self._domain:
            reply.add_answer(RR(request.q.qname, QTYPE.TXT, rdata=TXT(handler.client_address[0]), ttl=60))
        elif name not in found:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            for address in found[name]:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=60))
        return reply


def main() -> None:
    """Until killed."""
    address, port, domain = sys.argv[1:]
    for tcp in (False, True):
        DNSServer(Zone(domain), address=address, port=int(port), tcp=tcp).start_thread()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
