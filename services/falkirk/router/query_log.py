"""Audit records of questions, as the resolver writes them. PURE.

One line of JSON a question, event `query`, with the fields that records of flows have (`falkirk.runtime.spool.AuditRecord`) for whose it was and
over which flow it came, so that `flow_id` leads from one to the other, and those of `Said` for what was asked and answered.
"""

from __future__ import annotations

import datetime
from ipaddress import ip_address
from typing import NamedTuple

import msgspec

from falkirk.decide import resolver
from falkirk.router.answering import Said
from falkirk.wire.asker import Asker
from falkirk.wire.protocol import name as protocol_name

_SECOND = 1_000_000_000


class Ids(NamedTuple):
    """A record's id."""

    node: str
    worker: int
    epoch: int
    sequence: int


def line(ids: Ids, wall_ns: int, asker: Asker, said: Said, took_ns: int) -> str:
    """One record; `wall_ns` is wall-clock time, `took_ns` how long the answer took."""
    seconds, rest = divmod(wall_ns, _SECOND)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    context = asker.context
    fields: dict[str, object] = {
        "event": "query",
        "flow_id": asker.flow_id.hex(),
        "time": f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z",
        **ids._asdict(),
        "tenant": context.tenant,
        "tenant_id": context.tenant_id,
        "device": context.device,
        "device_id": context.device_id,
        "user": context.user,
        "groups": list(context.groups),
        "virtual_network": context.virtual_network,
        "protocol": protocol_name(asker.protocol),
        "source": str(ip_address(asker.source)),
        "source_port": asker.source_port,
        "destination": str(ip_address(asker.destination)),
        "destination_port": resolver.PORT,
        **msgspec.to_builtins(said),
        "duration_ns": took_ns,
    }
    return msgspec.json.encode({name: value for name, value in fields.items() if value != "" and value != []}).decode()
