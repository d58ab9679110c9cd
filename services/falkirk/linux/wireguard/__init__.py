"""A WireGuard interface in user space, for our own client: a TUN device, a UDP socket, and `falkirk.wireguard` between them.

One process an interface (`python -m falkirk.linux.wireguard FILE`), with one thread and one epoll loop (`loop`)::

    kernel ──TUN, super-packets──► segments ──► Node.send ──► trains ──UDP──► node
    kernel ◄──TUN───────────────── packets  ◄── Node.receive ◄── trains ◄─UDP── node

`request` is what it is told: keys, addresses, peers, DNS; from a file that only root can read, since keys are no arguments. `network` sets up addresses
and routes, `resolver` DNS, and both undo it at the end. `control` is a unix socket that answers for its state and ends it.

A peer's allowed prefixes are routes, through the main table; a default route goes to a table of its own, and a mark on the outer packets keeps
those out of it. Where several peers may take a packet, the longest prefix decides, then whoever has a session.

Limits: names of endpoints are resolved at the start. Received packets are written to the device one by one. An outer path MTU below
the inner MTU and 80 bytes makes the kernel fragment.
"""
