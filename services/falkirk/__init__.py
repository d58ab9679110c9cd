"""Falkirk lifts IP packets to TCP streams, and lowers them back.

A packet's walk, from the device to the server::

    producer ──SEQPACKET──► onramp      who is this? context -> tenant, device, virtual network   (once a tunnel)
                              │ descriptor
                              ▼
    packets ────────────────► flow      signature -> flow; new: route, rule, limits, slot          (once a flow)
                              │ NAT     known: rewrite addresses, on its way                       (every packet)
                              ▼
                             TUN ──► kernel TCP in a private namespace ──► accept
                                                                             │
                            upgrader  dials the server first, then relays ◄──┘
                              │
                              ▼
                            server

The way back is the same in reverse. Where the server is a device with a tunnel of its own, the stream is lowered again: a client socket in a second private
namespace, its packets out of another TUN, and flow sends them into that tunnel. `policy` and `router` push what flow decides from; `registry` owns what they
compile it from. Decisions go over gRPC, payload over descriptors: see each package's docstring.
"""

__version__ = "0.1.0"
