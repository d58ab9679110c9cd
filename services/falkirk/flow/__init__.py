"""The flow tracker: packet -> flow -> memoised path.

    tunnel ──► lane.up ──known──► rewrite ──► TUN        lane.py, the fast path
                 │ unknown
                 ▼
               ingress: well formed? own address? SYN?   ingress.py
                 ▼
               decision: route, then rule (memoised)     decision.py, PURE
                 ▼
               tracker: limits, slot, record, hold       tracker.py
                 ▼ Prepare                ▲ Connected
               upgrader worker  ──────────┘              peers.py

A tunnel's packets come by a descriptor of its own, or by the trunk that its on-ramp worker has for all its WireGuard devices (`bearers.py`, `trunks.py`).

A parent process serves FlowService (`service.py`) and delivers the audit spool (`delivery.py`); N worker processes own
the packets (`worker.py`). They share memory instead of asking each other: the live table (`live.py`), counters, and the
tenants' flow counts (`limits.py`).

A flow whose route leads to a device isn't lifted but forwarded as packets into that device's tunnel (`forward.py`), which may be another
worker's (`siblings.py`, `roster.py`).

Where the route leads to a device, packets are forwarded to its tunnel (`forward.py`), or the stream is lowered again: the upgrader connects inside a
second private namespace, and the leg that was reserved for it (`lowering.py`) is the NAT between there and the device's tunnel.

Fragments wait for the rest of their packet (`reassembly.py`, PURE, and `fragments.py`); only whole packets go this way.

UDP and ICMP echo go another way: their packets lose their headers here, and leave by sockets that the upgrader worker opened
(`session.py`, `udp.py`, `echo.py`). What goes to the tenant's resolver is a session too, with a process of the router's (`resolving.py`). What flows of all protocols share is `table.py`, `keys.py` and `lifecycle.py`.

Limits: to the internet go TCP, UDP and ICMP echo; other protocols go between devices only, and are answered as unreachable otherwise.
"""
