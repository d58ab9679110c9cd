"""May there be one flow more? PURE: a worker asks before it begins one, `Explain` before it says that one would begin."""

from __future__ import annotations

from typing import NamedTuple

from falkirk.flow.settings import FlowSettings
from falkirk.wire.context import TunnelContext


class Load(NamedTuple):
    """What there is at the worker that would have the flow."""

    ready: bool
    """It takes flows of this kind: it isn't about to end, and where the flow needs an upgrader there is one."""
    recorded: bool
    """Its audit records can be written."""
    device_flows: int
    """Of the device, on this worker."""
    device_held: int
    """Those of them whose upstream is being dialled."""
    tenant_flows: int
    """Of the tenant, on the node."""
    full: bool
    """The flow table has no place."""


def refusal(load: Load, context: TunnelContext, settings: FlowSettings) -> str | None:
    """Why a device may not have another flow; None where it may. Names are those of counters and of audit records."""
    if not load.ready:
        return "not_ready"
    if not load.recorded:
        return "audit_unwritable"
    if load.device_flows >= (context.device_max_flows or settings.device_flows):
        return "device_limit"
    if load.device_held >= settings.device_held:
        return "device_held_limit"
    if load.tenant_flows >= (context.tenant_max_flows or settings.tenant_flows):
        return "tenant_limit"
    return "table_full" if load.full else None
