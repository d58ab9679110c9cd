"""`falkirk flow top`: who uses most right now, by device, user, group or destination.

On a terminal a view that is drawn anew each interval (Ctrl-C ends it); elsewhere, or with --json, one table or one JSON object an interval. With
--count it ends after so many.

Limit: rates are over the interval, from counts that workers write down once a second.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Annotated, Final, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.flow.v1 import flow_service_pb2_grpc as pb_grpc
from falkirk.cli.connection import Json, RunDir, calling, until_interrupted
from falkirk.cli.output import joined, print_json, print_table

COLUMNS: Final = ("flows", "up/s", "down/s", "up", "down")
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")

By = Literal["device", "user", "group", "destination"]


def top(
    run_dir: RunDir,
    by: Annotated[By, typer.Option(help="What a row stands for.")] = "device",
    tenant: Annotated[str, typer.Option(help="Only this tenant (its name).")] = "",
    interval: Annotated[int, typer.Option(min=1, max=60, help="Seconds between looks.")] = 1,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Rows that are shown at most.")] = 20,
    count: Annotated[int, typer.Option(min=0, help="End after so many looks; 0 goes on.")] = 0,
    json: Json = False,
) -> None:
    """Show who uses most, live: bytes a second by device, user, group or destination."""
    request = pb.TopRequest(by=f"TOP_BY_{by.upper()}", tenant=tenant, interval_s=interval, limit=limit)
    view = Console()
    drawn = view.is_terminal and not json
    with until_interrupted(), calling(run_dir, "flow") as channel:
        stream: Iterable[pb.TopResponse] = pb_grpc.FlowServiceStub(channel).Top(request)
        with Live(console=view, screen=True, auto_refresh=False) if drawn else nullcontext() as live:
            for message in itertools.islice(stream, count or None):
                if live is not None:
                    live.update(table(message, by), refresh=True)
                elif json:
                    print_json(message, line=True)
                else:
                    print_table(head(by), (cells(row, by) for row in message.rows))
                    print(f"{message.count} in all: {summary(message)}\n")
                    sys.stdout.flush()


def head(by: By) -> tuple[str, ...]:
    """Column titles."""
    return ("tenant", by, *(("user", "groups") if by == "device" else ()), *COLUMNS)


def cells(row: pb.TopResponse.Row, by: By) -> tuple[str, ...]:
    """A row's cells, as its titles."""
    nobody = {"user": "(no owner)", "group": "(no group)"}.get(by, "")
    return (
        row.tenant,
        row.name or nobody,
        *((row.user, joined(row.groups)) if by == "device" else ()),
        str(row.flows),
        amount(row.bytes_up_s),
        amount(row.bytes_down_s),
        amount(row.bytes_up),
        amount(row.bytes_down),
    )


def summary(message: pb.TopResponse) -> str:
    """All rows in a line, also those that aren't shown."""
    total = message.total
    return f"{total.flows} flows, {amount(total.bytes_up_s)}/s up, {amount(total.bytes_down_s)}/s down"


def table(message: pb.TopResponse, by: By) -> Table:
    """The view."""
    when = message.time.ToDatetime().strftime("%H:%M:%S UTC")
    view = Table(title=f"{when}  {message.count} by {by}: {summary(message)}", title_justify="left", box=None)
    for title in head(by):
        view.add_column(title.upper(), justify="right" if title in COLUMNS else "left", no_wrap=True)
    for row in message.rows:
        busy = row.bytes_up_s or row.bytes_down_s
        view.add_row(*cells(row, by), style="bold" if busy else "dim")
    return view


def amount(size: int) -> str:
    """Bytes for people, in powers of 1000 with three digits."""
    value, unit = float(size), 0
    while value >= 999.5 and unit + 1 < len(_UNITS):
        value, unit = value / 1000, unit + 1
    return f"{size} B" if not unit else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {_UNITS[unit]}"
