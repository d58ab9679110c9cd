"""Router: where packets and streams leave.

Routes belong to virtual networks; the registry owns them. The router mirrors tenants, virtual networks, users, devices and routes, compiles all
routes, and every device's own addresses, into one blob (`falkirk.decide.routes`) and pushes it to where packets are; the same module answers `Resolve` and `Explain` here, so what
you ask is what ran. Every blob carries the registry's revision, unchanged.

    registry ─Watch─► replica ─► book ─► compile (a thread) ─► table   Resolve, Explain
                        │ disk                              └► publisher ─WatchRoutes─► flow (replica on its disk)

The tenants' resolvers are here too: one process (`worker.py`) that answers DNS for all of them, on a virtual address in each.

    flow, upgrader ──who asks (unix sockets)──► worker ── answering ── name_table, rules, routes
                                                  └── exchange ──► other resolvers           spool ──► policy (audit)

Changes that come while a compilation runs are taken together by the next one. A route whose target isn't built is left out of
the blob, and counted.

Limits: 100,000 routes compile in about half a second; 10,000 in about 50 ms. The off-ramp `internet` is a socket of the upgrader's; this service
dials nothing but other resolvers.
"""
