"""`falkirk audit query` and `falkirk audit tail`: what happened to flows, by the policy service's audit log.

With --json one record a line, as stored (its fields are documented in `falkirk.runtime.spool`); `query` adds `stored_at`. Without it a table for
people. Exit status 1 with the server's reason where it refuses, 0 otherwise; an interrupted `tail` ends with 0.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
import typer
from google.protobuf.timestamp_pb2 import Timestamp

from falkirk.api.policy.v1 import policy_service_pb2 as pb
from falkirk.api.policy.v1 import policy_service_pb2_grpc as pb_grpc
from falkirk.cli.connection import RunDir, calling, until_interrupted
from falkirk.cli.output import print_table

QUERY_SECONDS: Final = 60.0
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_COLUMNS: Final = ("time", "event", "tenant", "device", "user", "source", "destination", "rule", "detail")

app = typer.Typer(help="Read the audit log.", no_args_is_help=True)

Tenant = Annotated[str, typer.Option(help="Only this tenant (its name).")]
Device = Annotated[str, typer.Option(help="Only this device (its name).")]
Event = Annotated[
    Literal[
        "started", "denied", "ended", "query", "capture_started", "capture_ended", "call_refused", "connection_refused"
    ]
    | None,
    typer.Option(help="Only records of this event."),
]
Flow = Annotated[str, typer.Option("--flow", help="Only this flow (its id).")]
Destination = Annotated[str, typer.Option("--dst", help="Only flows to this address.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def register(app_: typer.Typer) -> None:
    """Add the commands."""
    app_.add_typer(app, name="audit")


@app.command()
def query(
    run_dir: RunDir,
    tenant: Tenant = "",
    device: Device = "",
    event: Event = None,
    flow: Flow = "",
    dst: Destination = "",
    since: Annotated[str, typer.Option(help="Not older than this: 90s, 15m, 1h, 2d, or a time (RFC 3339).")] = "",
    until: Annotated[str, typer.Option(help="Older than this, in the same form.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 1000,
    json: Json = False,
) -> None:
    """Show stored records, newest last."""
    now = datetime.datetime.now(datetime.UTC)
    wanted = pb.AuditFilter(tenant=tenant, device=device, event=event or "", flow_id=flow, destination_address=dst)
    if since:
        wanted.time.start.CopyFrom(moment(since, now))
    if until:
        wanted.time.end.CopyFrom(moment(until, now))
    records: list[dict[str, Any]] = []
    with calling(run_dir, "policy") as channel:
        request = pb.QueryRequest(filter=wanted, limit=limit)
        for response in pb_grpc.AuditServiceStub(channel).Query(request, timeout=QUERY_SECONDS):
            stored_at = {"stored_at": response.stored_at.ToJsonString()}
            records.append(stored_at | msgspec.json.decode(response.record.json))
    if json:
        _lines(records)
    else:
        print_table(_COLUMNS, map(row, records))


@app.command()
def tail(
    run_dir: RunDir,
    tenant: Tenant = "",
    device: Device = "",
    event: Event = None,
    flow: Flow = "",
    dst: Destination = "",
    json: Json = False,
) -> None:
    """Show records as they are stored, until interrupted."""
    wanted = pb.AuditFilter(tenant=tenant, device=device, event=event or "", flow_id=flow, destination_address=dst)
    with until_interrupted(), calling(run_dir, "policy") as channel:
        for response in pb_grpc.AuditServiceStub(channel).Tail(pb.TailRequest(filter=wanted)):
            if json:
                _lines([msgspec.json.decode(response.record.json)])
            else:
                print("  ".join(row(msgspec.json.decode(response.record.json))), flush=True)


def moment(text: str, now: datetime.datetime) -> Timestamp:
    """A time, or a duration before `now`. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+)([smhdw])", text)
    try:
        if match:
            when = now - datetime.timedelta(seconds=int(match[1]) * _UNITS[match[2]])
        else:
            when = datetime.datetime.fromisoformat(text)
            when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        timestamp = Timestamp()
        timestamp.FromDatetime(when)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is neither a duration (90s, 15m, 1h, 2d) nor a time (RFC 3339)") from error
    return timestamp


def row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of the table."""
    return (
        str(record.get("time", record.get("stored_at", "")))[:23],
        str(record.get("event", "")),
        str(record.get("tenant", "")),
        str(record.get("device", "")),
        str(record.get("user", "")),
        _endpoint(record, "source"),
        _endpoint(record, "destination"),
        str(record.get("rule", "")),
        _detail(record),
    )


def _endpoint(record: Mapping[str, Any], side: str) -> str:
    address, port = str(record.get(side, "")), record.get(f"{side}_port")
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _detail(record: Mapping[str, Any]) -> str:
    if record.get("event") == "ended":
        seconds = record.get("duration_ns", 0) / 1e9
        return f"{record.get('reason', '')} {record.get('bytes_up', 0)} up {record.get('bytes_down', 0)} down {seconds:.1f} s"
    if str(record.get("event", "")).endswith("_refused"):
        again = f", {record['count']} times" if record.get("count", 1) > 1 else ""
        who = record.get("caller") or record.get("peer") or f"{record.get('gate', '')}/"
        return f"{record.get('service', '')} {record.get('method', '')}: {record.get('reason', '')} ({who}){again}"
    if record.get("event") == "query":
        asked = f"{record.get('query', '')} {record.get('query_type', '')} {record.get('rcode', '')}"
        return f"{asked} by {record.get('answered_by', '')}" + (f": {record['why']}" if "why" in record else "")
    if "capture_id" in record:
        chosen = f" where {record['filter']}" if "filter" in record else ""
        return f"{record.get('by', '')}{chosen}, {record.get('count', 0)} packets, {record.get('lost', 0)} lost"
    return str(record.get("why") or record.get("reason") or record.get("problem") or "")


def _lines(records: Iterable[Mapping[str, Any]]) -> None:
    for record in records:
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()
