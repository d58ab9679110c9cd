"""What `falkirk flow top` shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.cli import top

ROW = pb.TopResponse.Row(
    tenant="acme", name="laptop", user="ann", groups=["eng", "sre"], flows=3, bytes_up_s=1500, bytes_down_s=2_000_000
)
MESSAGE = pb.TopResponse(rows=[ROW], total=ROW, count=7)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1500, "1.50 kB"),
        (99_900, "99.9 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (2_345_678_901, "2.35 GB"),
        (5_000_000_000_000_000_000, "5000 PB"),
    ],
)
def test_amounts_have_three_digits(size: int, text: str) -> None:
    assert top.amount(size) == text


@pytest.mark.parametrize("by", ["device", "user", "group", "destination"])
def test_a_row_has_a_cell_for_each_title(by: top.By) -> None:
    assert len(top.cells(ROW, by)) == len(top.head(by))


def test_flows_of_nobody_are_called_so() -> None:
    assert top.cells(pb.TopResponse.Row(tenant="acme"), "user")[1] == "(no owner)"
    assert top.cells(pb.TopResponse.Row(tenant="acme"), "group")[1] == "(no group)"


def test_the_view_names_who_it_is_and_how_many_there_are() -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(top.table(MESSAGE, "device"))
    text = output.getvalue()
    assert "7 by device: 3 flows, 1.50 kB/s up, 2.00 MB/s down" in text
    for cell in ("laptop", "ann", "eng,sre", "1.50 kB", "2.00 MB"):
        assert cell in text
