"""Presence as transcripts of reports, leases and watchers."""

from __future__ import annotations

from falkirk.registry.presence import Presences


def report(table: Presences[str], node: str, now: float, present: dict[str, str], **options: object) -> bool:
    """A report with a lease of 10 s."""
    given = {"gone": (), "complete": False, "lease_s": 10.0, **options}
    return table.report(node, present, now=now, **given)  # type: ignore[arg-type]


def seen(table: Presences[str]) -> dict[tuple[str, str], str]:
    """Everything, by place."""
    return dict(table.all())


def test_a_node_that_is_unknown_must_say_everything() -> None:
    table: Presences[str] = Presences()
    assert not report(table, "n1", 0.0, {"d1": "here"})
    assert seen(table) == {}
    assert not table.knows("n1")
    assert report(table, "n1", 0.0, {"d1": "here"}, complete=True)
    assert report(table, "n1", 1.0, {"d2": "here"})
    assert seen(table) == {("n1", "d1"): "here", ("n1", "d2"): "here"}


def test_a_complete_report_replaces_and_a_difference_takes_away_what_it_names() -> None:
    table: Presences[str] = Presences()
    report(table, "n1", 0.0, {"d1": "a", "d2": "a", "d3": "a"}, complete=True)
    report(table, "n1", 1.0, {"d1": "b"}, gone=["d2", "never"])
    assert seen(table) == {("n1", "d1"): "b", ("n1", "d3"): "a"}
    report(table, "n1", 2.0, {"d4": "a"}, complete=True)
    assert seen(table) == {("n1", "d4"): "a"}


def test_a_lease_that_ends_takes_all_of_its_node_and_nothing_else() -> None:
    table: Presences[str] = Presences()
    report(table, "n1", 0.0, {"d1": "a"}, complete=True)
    report(table, "n2", 5.0, {"d1": "a"}, complete=True)
    assert table.next_deadline() == 10.0
    assert table.expire(9.99) == []
    assert table.expire(10.0) == ["n1"]
    assert seen(table) == {("n2", "d1"): "a"}
    assert not report(table, "n1", 10.5, {}), "the node is asked for everything again"
    assert table.next_deadline() == 15.0


def test_each_report_renews_the_lease() -> None:
    table: Presences[str] = Presences()
    report(table, "n1", 0.0, {"d1": "a"}, complete=True)
    report(table, "n1", 8.0, {})
    assert table.expire(17.9) == []
    assert table.expire(18.0) == ["n1"]
    assert table.next_deadline() is None


def test_a_watcher_is_told_what_changed_once_however_often_it_did() -> None:
    table: Presences[str] = Presences()
    report(table, "n1", 0.0, {"d1": "a"}, complete=True)
    watcher = table.watch()
    assert list(watcher.changed) == [("n1", "d1")]
    watcher.changed = {}
    report(table, "n1", 1.0, {"d1": "a"})
    assert watcher.changed == {}, "nothing changed"
    report(table, "n1", 2.0, {"d1": "b", "d2": "a"})
    report(table, "n1", 3.0, {"d1": "c"}, gone=["d2"])
    assert list(watcher.changed) == [("n1", "d1"), ("n1", "d2")]
    assert (table.get(("n1", "d1")), table.get(("n1", "d2"))) == ("c", None)
    table.unwatch(watcher)
    report(table, "n1", 4.0, {"d3": "a"})
    assert ("n1", "d3") not in watcher.changed


def test_a_device_is_replaced_or_dropped_wherever_it_is() -> None:
    table: Presences[str] = Presences()
    for node in ("n1", "n2"):
        report(table, node, 0.0, {"d1": "old", "d2": "old"}, complete=True)
    watcher = table.watch()
    watcher.changed = {}
    table.replace("d1", {"n1": "new", "n2": "new"})
    table.replace("d2", None)
    assert seen(table) == {("n1", "d1"): "new", ("n2", "d1"): "new"}
    assert len(watcher.changed) == 4
    assert len(table) == 2
