"""The feed: state, SYNCED, then each transaction once, whatever the reader's pace."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from falkirk.registry.kinds import BY_NUMBER, parse
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.watch import Event, Feed, Interest, Piece, Step, Synced
from tests.unit.registry.conftest import Ledger, make

ALL = Interest((1, 4, 2, 3, 5, 6))
DEADLINE_S = 20


def play(
    ledger: Ledger, script: Callable[[Feed], Awaitable[None]], *, max_watches: int = 8, feed_bytes: int = 1 << 20
) -> None:
    """Run a script with a feed that hears of the ledger's commits as the service's does."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        feed = Feed(ledger.store, max_watches, feed_bytes)

        def committed(transaction: Any) -> None:
            loop.call_soon_threadsafe(feed.publish, transaction)

        ledger.store.on_commit = committed
        async with asyncio.timeout(DEADLINE_S):
            await script(feed)

    asyncio.run(run())


async def write(ledger: Ledger, name: str, **values: Any) -> None:
    """Make or change a user, off the loop."""
    await asyncio.to_thread(ledger.apply, make("user", name, "acme", **values))


async def until_synced(events: AsyncGenerator[Event, None]) -> list[Event]:
    """The first state and its end."""
    found: list[Event] = []
    async for event in events:
        found.append(event)
        if isinstance(event, Synced):
            return found
    raise AssertionError("a watch has no end")


async def refused(events: AsyncGenerator[Event, None]) -> Reason:
    """Why a watch ends."""
    with pytest.raises(Refused) as caught:
        await anext(events)
    return caught.value.reason


def test_state_then_synced_then_each_transaction(acme: Ledger) -> None:
    async def script(feed: Feed) -> None:
        events = feed.watch(ALL, None)
        first = await until_synced(events)
        assert [type(event) for event in first] == [Piece, Synced]
        assert {event.revision for event in first} == {1}
        await write(acme, "ann")
        await write(acme, "bob")
        steps = [await anext(events), await anext(events)]
        assert [step.revision for step in steps] == [2, 3]
        assert feed.watches == 1
        await events.aclose()
        assert feed.watches == 0

    play(acme, script)


def test_an_empty_store_is_synced_at_once(ledger: Ledger) -> None:
    async def script(feed: Feed) -> None:
        assert await until_synced(feed.watch(ALL, None)) == [Synced(0)]

    play(ledger, script)


def test_a_resumed_watch_is_synced_where_it_was_and_gets_what_it_missed(acme: Ledger) -> None:
    for name in ("ann", "bob", "cid"):
        acme.create("user", name, "acme")

    async def script(feed: Feed) -> None:
        events = feed.watch(ALL, (acme.store.epoch, 2))
        assert await anext(events) == Synced(2)
        assert [(await anext(events)).revision for _ in range(2)] == [3, 4]
        await write(acme, "dan")
        assert (await anext(events)).revision == 5
        await events.aclose()

    play(acme, script)


def test_a_revision_of_another_epoch_or_out_of_range_is_refused(acme: Ledger) -> None:
    async def script(feed: Feed) -> None:
        for resume in (("elsewhere", 1), (acme.store.epoch, 2)):
            assert await refused(feed.watch(ALL, resume)) is Reason.REVISION_GONE

    play(acme, script)


def test_what_is_of_no_interest_is_an_empty_step(acme: Ledger) -> None:
    async def script(feed: Feed) -> None:
        events = feed.watch(Interest((5,)), None)
        await until_synced(events)
        await write(acme, "ann")
        assert await anext(events) == Step(2, ())
        await events.aclose()

    play(acme, script)


def test_one_watch_too_many_is_refused(acme: Ledger) -> None:
    async def script(feed: Feed) -> None:
        first = feed.watch(ALL, None)
        await anext(first)
        assert await refused(feed.watch(ALL, None)) is Reason.TOO_MANY_WATCHES
        await first.aclose()
        second = feed.watch(ALL, None)
        await anext(second)
        await second.aclose()

    play(acme, script, max_watches=1)


def test_a_stopped_reader_goes_on_from_the_history(acme: Ledger) -> None:
    async def script(feed: Feed) -> None:
        events = feed.watch(ALL, None)
        await until_synced(events)
        for number in range(50):
            await write(acme, f"u{number}")
        assert [(await anext(events)).revision for _ in range(50)] == list(range(2, 52))
        await events.aclose()

    play(acme, script, feed_bytes=1000)


def test_a_reader_that_fell_behind_the_history_is_cut(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.db", history_bytes=2000)
    ledger.create("tenant", "acme")

    async def script(feed: Feed) -> None:
        events = feed.watch(ALL, None)
        await until_synced(events)
        for number in range(50):
            await write(ledger, f"u{number}")
        assert await refused(events) is Reason.WATCH_TOO_SLOW
        assert feed.watches == 0

    play(ledger, script, feed_bytes=1000)
    ledger.store.close()


async def _follow(
    feed: Feed, pace: random.Random, until: int, resume: tuple[str, int] | None
) -> tuple[dict[str, bytes], list[int], int]:
    """A watcher of some pace: its state, the revisions of its steps, and where it synced."""
    state: dict[str, bytes] = {}
    steps: list[int] = []
    synced = -1
    events = feed.watch(ALL, resume)
    async for event in events:
        match event:
            case Piece(bodies=bodies):
                assert synced < 0
                for kind, body in bodies:
                    state[parse(BY_NUMBER[kind], body).metadata.id] = body
            case Synced(revision=revision):
                assert synced < 0
                synced = revision
            case Step(revision=revision, changes=changes):
                steps.append(revision)
                for change in changes:
                    if change.body is None:
                        del state[change.id]
                    else:
                        state[change.id] = change.body
        for _ in range(pace.randrange(3)):
            await asyncio.sleep(0)
        if synced >= 0 and event.revision >= until:
            await events.aclose()
            break
    return state, steps, synced


def test_watchers_of_any_pace_end_with_the_store_and_miss_nothing(acme: Ledger) -> None:
    chance = random.Random(7)
    writes = 150

    def work() -> None:
        for number in range(writes):
            name = f"u{chance.randrange(20)}"
            if acme.get("user", name, "acme") and chance.random() < 0.4:
                acme.delete("user", name, "acme")
            else:
                acme.apply(make("user", name, "acme", email=f"{number}@example.com"))

    async def script(feed: Feed) -> None:
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(asyncio.to_thread(work))
            watching = [tasks.create_task(_follow(feed, random.Random(seed), writes + 1, None)) for seed in range(6)]
            await writing
            late = tasks.create_task(_follow(feed, random.Random(9), writes + 1, None))
            watching.append(late)
        final = acme.store.snapshot(ALL.kinds).result()
        expected = {parse(BY_NUMBER[kind], body).metadata.id: body for kind, body in final.bodies}
        for task in watching:
            state, steps, synced = task.result()
            assert state == expected
            assert steps == list(range(synced + 1, writes + 2))

    play(acme, script, feed_bytes=3000)
