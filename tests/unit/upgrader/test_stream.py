"""The rules of a stream, as tables and transcripts."""

from __future__ import annotations

import select

import pytest

from falkirk.upgrader.stream import (
    DIALLED,
    EDGE,
    PARKED,
    READ,
    WRITE,
    Command,
    End,
    Phase,
    Reason,
    Stream,
    fin,
    interest,
    took,
)


def _ends() -> tuple[End[str], End[str]]:
    return End("client", READ), End("upstream", READ)


def _stream() -> Stream[str]:
    return Stream(7, End("upstream", DIALLED), active=100.0, timeout_s=10.0, idle_s=60)


def test_masks_are_epolls() -> None:
    assert (READ, WRITE, EDGE) == (select.EPOLLIN, select.EPOLLOUT, select.EPOLLET)
    assert DIALLED == select.EPOLLOUT | select.EPOLLET


@pytest.mark.parametrize(
    ("ended", "waiting", "other_waiting", "mask"),
    [
        (False, 0, 0, READ),
        (False, 5, 0, PARKED),
        (False, 0, 5, READ | WRITE),
        (False, 5, 5, WRITE),
        (True, 0, 0, PARKED),
        (True, 5, 0, PARKED),
        (True, 0, 5, WRITE),
        (True, 5, 5, WRITE),
    ],
)
def test_interest(ended: bool, waiting: int, other_waiting: int, mask: int) -> None:
    """`waiting`: bytes of this end that the other doesn't take; `other_waiting`: bytes that this one doesn't take."""
    end, other = _ends()
    end.ended, end.waiting, other.waiting = int(ended), waiting, other_waiting
    assert interest(end, other) == mask


@pytest.mark.parametrize(
    ("events", "commands"),
    [
        # Both FINs with nothing on the way.
        (["client fin", "upstream fin"], [Command.PASS_FIN, Command.FINISH]),
        (["upstream fin", "client fin"], [Command.PASS_FIN, Command.FINISH]),
        # A FIN waits for the bytes before it.
        (["client sent 10 took 4", "client fin", "client flush 6"], [None, None, Command.PASS_FIN]),
        (
            ["client sent 10 took 0", "client fin", "client flush 9", "client flush 1"],
            [None, None, None, Command.PASS_FIN],
        ),
        # The other direction goes on after it.
        (["client fin", "upstream sent 10 took 10", "upstream fin"], [Command.PASS_FIN, None, Command.FINISH]),
        (
            ["client fin", "upstream sent 10 took 3", "upstream fin", "upstream flush 7"],
            [Command.PASS_FIN, None, None, Command.FINISH],
        ),
        # Both FINs wait, and pass in the order in which the bytes go.
        (
            [
                "client sent 9 took 1",
                "upstream sent 9 took 1",
                "client fin",
                "upstream fin",
                "upstream flush 8",
                "client flush 8",
            ],
            [None, None, None, None, Command.PASS_FIN, Command.FINISH],
        ),
        # A FIN passes once.
        (["client fin", "client fin"], [Command.PASS_FIN, None]),
    ],
)
def test_fins(events: list[str], commands: list[Command | None]) -> None:
    client, upstream = _ends()
    got = []
    for event in events:
        who, what, *numbers = event.split()
        end, other = (client, upstream) if who == "client" else (upstream, client)
        if what == "fin":
            got.append(fin(end, other))
        elif what == "sent":
            got.append(took(end, other, int(numbers[0]), int(numbers[2])))
        else:
            got.append(took(end, other, end.waiting, int(numbers[0])))
    assert got == commands


def test_an_end_counts_what_the_other_took() -> None:
    client, upstream = _ends()
    took(client, upstream, 10, 4)
    assert (client.relayed, client.waiting) == (4, 6)
    took(client, upstream, 6, 6)
    assert (client.relayed, client.waiting) == (10, 0)


def test_phases_and_their_deadlines() -> None:
    stream = _stream()
    assert (stream.phase, stream.expires()) == (Phase.DIALLING, 110.0)
    stream.connected(103.0, 30.0)
    assert (stream.phase, stream.expires(), stream.expired()) == (Phase.HELD, 133.0, Reason.NEVER_OPENED)
    stream.opened("client", READ, 104.0)
    assert (stream.phase, stream.expires(), stream.expired()) == (Phase.OPEN, 164.0, Reason.IDLE)
    stream.active = 150.0
    assert stream.expires() == 210.0


def test_whose_reset_it_was() -> None:
    stream = _stream()
    assert stream.relayed() == (0, 0)
    stream.opened("client", READ, 104.0)
    assert stream.client is not None
    assert stream.reset_by(stream.client) == Reason.CLIENT_RESET
    assert stream.reset_by(stream.upstream) == Reason.UPSTREAM_RESET
    stream.client.relayed, stream.upstream.relayed = 3, 4
    assert stream.relayed() == (3, 4)
