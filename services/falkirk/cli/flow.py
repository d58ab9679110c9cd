"""`falkirk flow list|get|watch|top|kill|stats`: what is being carried, for whom, why, and how much."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final, Literal

import typer

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.flow.v1 import flow_service_pb2_grpc as pb_grpc
from falkirk.api.net.v1 import net_pb2
from falkirk.cli.connection import Json, RunDir, calling, until_interrupted
from falkirk.cli.output import print_json, print_table
from falkirk.cli.top import top

PAGE: Final = 1000
SECONDS: Final = 30.0
COLUMNS: Final = ("id", "state", "tenant", "device", "user", "source", "destination", "rule", "up", "down", "age")

app = typer.Typer(help="Live flows of this node.", no_args_is_help=True)

Tenant = Annotated[str, typer.Option(help="Only this tenant (its name).")]
Device = Annotated[str, typer.Option(help="Only this device (its name).")]
Destination = Annotated[str, typer.Option("--dst", help="Only flows to this address or prefix.")]
Port = Annotated[int, typer.Option(help="Only flows to this port.", min=0, max=65535)]
Protocol = Annotated[
    Literal["", "tcp", "udp", "icmp", "other"],
    typer.Option(help="Only flows of this protocol; icmp is either family's."),
]


def register(app_: typer.Typer) -> None:
    """Add the commands."""
    app.command("top")(top)
    app_.add_typer(app, name="flow")


def _filter(tenant: str, device: str, dst: str, port: int, protocol: str) -> pb.FlowFilter:
    wanted = f"PROTOCOL_{protocol.upper() or 'UNSPECIFIED'}"
    return pb.FlowFilter(tenant=tenant, device=device, destination=dst, destination_port=port, protocol=wanted)


@app.command("list")
def list_(
    run_dir: RunDir,
    tenant: Tenant = "",
    device: Device = "",
    dst: Destination = "",
    port: Port = 0,
    protocol: Protocol = "",
    json: Json = False,
) -> None:
    """Show live flows; counts are at most a second old."""
    chosen = _filter(tenant, device, dst, port, protocol)
    everything = pb.ListResponse()
    with calling(run_dir, "flow") as channel:
        stub = pb_grpc.FlowServiceStub(channel)
        token = ""
        while True:
            page = stub.List(pb.ListRequest(filter=chosen, page_size=PAGE, page_token=token), timeout=SECONDS)
            everything.flows.extend(page.flows)
            token = page.next_page_token
            if not token:
                break
    if json:
        print_json(everything)
    else:
        print_table(COLUMNS, map(_row, everything.flows))


@app.command()
def get(run_dir: RunDir, flow: Annotated[str, typer.Argument(help="The flow's id.")]) -> None:
    """Show one live flow, as JSON."""
    with calling(run_dir, "flow") as channel:
        print_json(pb_grpc.FlowServiceStub(channel).Get(pb.GetRequest(id=flow), timeout=SECONDS))


@app.command()
def watch(
    run_dir: RunDir,
    tenant: Tenant = "",
    device: Device = "",
    dst: Destination = "",
    port: Port = 0,
    protocol: Protocol = "",
    live: Annotated[bool, typer.Option(help="Show the live flows first.")] = True,
    json: Json = False,
) -> None:
    """Show flows as they start, are denied and end; until interrupted."""
    chosen = _filter(tenant, device, dst, port, protocol)
    with until_interrupted(), calling(run_dir, "flow") as channel:
        stub = pb_grpc.FlowServiceStub(channel)
        for event in stub.Watch(pb.WatchRequest(filter=chosen, include_live=live)):
            if json:
                print_json(event, line=True)
                continue
            if event.dropped:
                print(f"({event.dropped} events lost: this terminal is too slow)")
            print(_line(event), flush=True)


@app.command()
def kill(
    run_dir: RunDir,
    flow: Annotated[str, typer.Argument(help="The flow's id.")],
    reason: Annotated[str, typer.Option(help="Why; goes into the audit log.")] = "",
) -> None:
    """End a flow: of TCP both sides get a reset, of anything else the initiator an ICMP error."""
    with calling(run_dir, "flow") as channel:
        pb_grpc.FlowServiceStub(channel).Terminate(pb.TerminateRequest(id=flow, reason=reason), timeout=SECONDS)


@app.command()
def stats(run_dir: RunDir, json: Json = False) -> None:
    """Show packets, drops by reason, flows and slots of each worker."""
    with calling(run_dir, "flow") as channel:
        answer = pb_grpc.FlowServiceStub(channel).Stats(pb.StatsRequest(), timeout=SECONDS)
    if json:
        print_json(answer)
        return
    for worker in answer.workers:
        rows = [
            ("flows", worker.flows),
            ("tunnels", worker.tunnels),
            ("paired", worker.paired),
            ("slots active", worker.slots_active),
            ("slots resting", worker.slots_resting),
            ("slots in all", worker.slots_total),
            ("packets received", worker.received),
            ("packets forwarded", worker.forwarded),
            ("packets answered", worker.answered),
            *((f"dropped: {drop.name}", drop.value) for drop in worker.drops),
            *((f"flows {counter.name}", counter.value) for counter in worker.counters),
        ]
        print_table((f"worker {worker.worker}", "count"), rows)
    print(f"audit records that wait for policy: {answer.spooled}")
    columns = ("replica", "revision", "live", "source", "items")
    print_table(columns, [(r.name, r.revision.number, r.live, r.source, r.items) for r in answer.replicas])


def _row(flow: pb.Flow) -> tuple[object, ...]:
    age = timedelta(microseconds=(flow.last_time.ToNanoseconds() - flow.start_time.ToNanoseconds()) // 1000)
    return (
        flow.id,
        pb.FlowState.Name(flow.state).removeprefix("FLOW_STATE_").lower(),
        flow.context.tenant,
        flow.context.device,
        flow.context.user,
        endpoint(flow.key.source_address, flow.key.source_port),
        _destination(flow),
        flow.rule or "(default)",
        flow.bytes_up,
        flow.bytes_down,
        f"{age.total_seconds():.0f}s",
    )


def _destination(flow: pb.Flow) -> str:
    where = endpoint(flow.key.destination_address, flow.key.destination_port)
    return f"{flow.destination_device}={where}" if flow.destination_device else where


def _line(event: pb.WatchResponse) -> str:
    flow = event.flow
    key: net_pb2.FlowKey = flow.key
    what = pb.WatchResponse.Event.Name(event.event).removeprefix("EVENT_").lower()
    source, destination = (
        endpoint(key.source_address, key.source_port),
        _destination(flow),
    )
    whose = f"{flow.context.tenant}/{flow.context.device}" + (f" ({flow.context.user})" if flow.context.user else "")
    line = f"{what:8}{flow.id}  {whose}  {source} -> {destination}"
    if what == "started":
        return f"{line}  by {flow.rule or '(default)'}"
    if what == "denied":
        return f"{line}  {flow.reason}, by {flow.rule or '(default deny)'}"
    return f"{line}  {flow.reason}, {flow.bytes_up} B up, {flow.bytes_down} B down"


def endpoint(address: str, port: int) -> str:
    """Address and port as people write them (RFC 3986: IPv6 in brackets)."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
