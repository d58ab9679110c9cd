"""Where devices were, over restarts."""

from __future__ import annotations

from pathlib import Path

from falkirk.onramp.endpoints import SLACK, Endpoints


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "data" / "endpoints"
    endpoints = Endpoints(path)
    assert list(endpoints) == []
    endpoints.set("d-1", "192.0.2.1:51820")
    endpoints.set("d-2", "[2001:db8::1]:5")
    endpoints.set("d-3", "192.0.2.3:1")
    endpoints.set("d-1", "192.0.2.9:51820")
    endpoints.forget("d-3")
    endpoints.set("d-4", "")
    endpoints.save()
    assert path.stat().st_mode & 0o777 == 0o600
    again = Endpoints(path)
    assert list(again) == [("d-1", "192.0.2.9:51820"), ("d-2", "[2001:db8::1]:5")]
    again.set("d-1", "192.0.2.9:51820")
    again.forget("d-9")
    assert not again.dirty
    # Nothing has changed.
    path.unlink()
    again.save()
    assert not path.exists()


def test_a_broken_file_costs_its_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "endpoints"
    path.write_text("d-1 192.0.2.1:51820\n\nd-2\nd-3 192.0.2.3\nd-4 [2001:db8::1]:51820\nd-5 192.0.2.5:51\nd-6 192.0.")
    cut = Endpoints(path)
    assert [device for device, _ in cut] == ["d-1", "d-4", "d-5"]
    # Nothing is put behind half a line.
    cut.set("d-7", "192.0.2.7:7")
    cut.save()
    assert path.read_text().splitlines() == [
        "d-1 192.0.2.1:51820",
        "d-4 [2001:db8::1]:51820",
        "d-5 192.0.2.5:51",
        "d-7 192.0.2.7:7",
    ]


def test_a_change_is_a_line_until_there_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "endpoints"
    endpoints = Endpoints(path)
    most = SLACK + 2 * 2
    for number in range(1, most):
        endpoints.set("d-1", f"192.0.2.1:{number}")
        if number == 1:
            endpoints.set("d-2", "192.0.2.2:2")
        endpoints.save()
        assert len(path.read_text().splitlines()) == number + 1
    again = Endpoints(path)
    assert list(again) == [("d-1", f"192.0.2.1:{most - 1}"), ("d-2", "192.0.2.2:2")]
    again.set("d-2", "192.0.2.2:3")
    again.save()
    assert path.read_text() == f"d-1 192.0.2.1:{most - 1}\nd-2 192.0.2.2:3\n"
    assert path.stat().st_mode & 0o777 == 0o600
