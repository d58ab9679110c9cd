"""On-ramp: where packets enter and a tenant is attached.

N workers share WireGuard's port, one socket each, and each has the devices whose keys are its own; worker 0 also has the gate. A producer
connects to `tunnel.sock` (SOCK_SEQPACKET) and says in its first datagram for which tenant and device it speaks. The
kernel says who it is (SO_PEERCRED). The worker judges both against its tables and hands the accepted descriptor,
with the `TunnelContext` that it made, to the flow worker of that device. From then on it is off the packets' way:

    producer ─connect─► gate ─first datagram─► parser ─► admission ─► flow link ─Adopt + descriptor─► flow worker
                         │ silent, forbidden,    │ wrong shape  │ unknown, disabled      │ down, refuses
                         └───────────────────────┴──────────────┴────────────────────────┴─► {"error":{code,message}}

The worker keeps a copy of every tunnel's descriptor: it sees the producer leave, hands the tunnel to the next flow worker
when one dies, and can shut it at once (`shutdown` ends all copies, wherever they are). A new on-ramp worker gets its copies back
from the flow workers (`Held`).

Devices that come by WireGuard have no descriptor: their packets pass through their worker, and from there to flow workers by a trunk each.

The parent (gRPC) mirrors tenants, users, devices and virtual networks from the registry, and pushes them to all
workers as transactions; each reviews its tunnels that a transaction touches and tells flow workers of new contexts, or closes the tunnels of which there is none any more.

    admission, context, context_json, control, tables   pure: who may enter, and as whom
    worker, gate, links, tunnels, reactor               the packet-side processes: raw epoll, no gRPC
    wireguard, trunk, neighbours, board                 devices that come by WireGuard, and what workers have for each other
    service, parent, rows, tunnel_ids, endpoints, …     the parent

Limits: contexts of 16 KiB; 1024 connections that haven't been admitted yet, each for 5 s at most; one gate, since
admission is rare. Every worker has all rows. A tunnel's addresses and its virtual network never change: what would change them closes the tunnel, and the
producer connects again.
"""
