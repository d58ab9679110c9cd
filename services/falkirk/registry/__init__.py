"""Who exists: tenants, users, devices, virtual networks, routes, policies, private DNS zones, nodes, and every change to them in order.

Many kinds, one engine::

    request ──► service ──► engine ── kinds     what a legal value is, what it refers to, what must be unique
                              │       defaults  what the registry fills in: addresses, pools, the default network
                              ▼
                            store ── SQLite: resources, references by id, claims, the history
                              │ commit, in order
                              ▼
                            feed ──► watches    the state, SYNCED, then each transaction once

A resource lives in the store as the message that is sent, names and all; references are kept beside it by id. A rename
rewrites the bodies that show the old name in the same transaction, so whoever follows a watch can resolve every name
by what it has been told. All writes go through one thread, one after another; a transaction that changes something
raises the revision by one, and everything that the replicas of the other services do hangs on that number.

Beside the resources lie enrolment tokens (as hashes) and what devices have proved; no watch carries those. How a machine becomes a device: `enrolment`.

Beside the resources stands the mesh's authority (`authority`, `principals`, `issue`, `sealing`): roots, who may log in, and the certificates of nodes and
people, in tables of the same store that no watch shows.

Goals: a write is either whole and durable or hasn't happened; a watcher sees every transaction once and in order; a
mistake is answered with a reason, the field, and what would be right.

Limits: one process owns the store (a lock says so). A transaction holds at most three quarters of a gRPC message.
Presence lies in memory, under the nodes' leases; a registry that starts anew has it said again. The registry sees no packets; while it is
away, everything already known goes on.
"""
