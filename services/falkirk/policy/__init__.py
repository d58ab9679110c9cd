"""May this flow exist, and who knows of it: compiled rules for every packet worker, and the audit log.

    registry ──Watch──► rulebook ── compile, in a thread ──► publisher ──WatchRules──► flow
                           │
                           └► table ──► Decide, Explain      the same bytes, the same module: falkirk.decide.rules

    flow ──Deliver──► audit ──► store ── NDJSON segments, one fsync a batch ──► acknowledgement
                        │
                        └► Tail, Query, span `audit` of sampled flows

Goals: what is pushed is what `Explain` explains; rules are never pushed before the registry's are known (a flow tracker keeps
its own until then); an audit record that was acknowledged is on disk, once.

While the registry is away the rules on disk stay in force. While this service is away flow decides by what it has, and keeps
its records until they are acknowledged. Limits: see `falkirk.decide.rules` and `falkirk.policy.store`.
"""
