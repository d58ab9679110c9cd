"""The WireGuard protocol as a state machine without sockets: the same engine in the on-ramp (responder to thousands of devices) and in our client. PURE.

Theory of operation. A `node.Node` owns one static key, its peers, the index table and every timer. Whoever owns the socket
moves bytes and tells the time::

    socket ──datagrams──► receive(data, endpoint, now, wall_ns, arrivals) ─┬─► arrivals.packets    by peer, authenticated, source checked
                          poll(now, wall_ns, arrivals)  ◄── next_deadline() ├─► arrivals.datagrams  to be sent: (endpoint, bytes)
    packets ────────────► send(peer, packets, now, wall_ns) ──► datagrams   └─► arrivals.events     handshakes, moves, unknown keys

`messages` has the layouts, `primitives` the hashes and ciphers, `handshake` Noise_IKpsk2, `cookies` mac1, mac2 and cookie replies,
`guard` when cookies are asked for and of whom, `replay` the window, `session` a pair of keys, `peer` what is known of a peer and
when its timers are due, `allowed` which inner sources it may use, `export` a session as bytes for another process.

What follows from the protocol (WireGuard: Next Generation Kernel Network Tunnel, 2020; "5.4.2" below is its section):

- A datagram is answered only where its mac1 is right, and the answer is never longer than the question (5.3).
- An initiation costs one Diffie-Hellman to learn who it claims to be; an unknown key costs no other. Peers' static secrets are cached.
- A session that we answered carries nothing until its peer has used it (5.4.5); the replay window and the peer's endpoint move only
  after a packet has been authenticated (5.4.6, 6.5).
- Every datagram that comes to nothing is counted under one of `counters.REASONS`.

A node may be several workers, which share a port and a static key: each has its peers and its indices, and what comes to one and is another's leaves it as
an event, uncounted, for its owner to carry there (`Node.receive`, or `receive_claimed` for an initiation, which costs four Diffie-Hellmans all the same).

Limits: time is monotonic seconds as float, wall time nanoseconds since 1970 as int. Secrets live in Python objects, which can't be wiped:
they are dropped, and the memory is reused in its own time.
"""
