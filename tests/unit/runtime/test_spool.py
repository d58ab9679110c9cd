"""The audit spool: lines whole and in order, also where the writer was killed or the disk was full."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from falkirk.runtime import spool
from falkirk.runtime.spool import SpoolWriter, epoch_of, last_words, repair, segments


def line(epoch: int, sequence: int, event: str = "started", flow_id: str = "") -> str:
    return f'{{"event":"{event}","flow_id":"{flow_id or sequence}","epoch":{epoch},"sequence":{sequence},"node":"n"}}'


def text(directory: Path) -> str:
    return "".join(path.read_text() for path in segments(directory))


def test_a_turns_records_are_one_write_of_whole_lines(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "deep" / "spool", 5)
    assert [writer.next(), writer.next()] == [1, 2]
    writer.add("one")
    writer.add("zwei ü")
    assert text(tmp_path / "deep" / "spool") == ""
    assert writer.flush()
    assert text(tmp_path / "deep" / "spool") == "one\nzwei ü\n"
    writer.close()
    (path,) = segments(tmp_path / "deep" / "spool")
    assert (epoch_of(path), path.stat().st_mode & 0o777) == (5, 0o600)


def test_a_full_segment_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 50)
    writer = SpoolWriter(tmp_path, 5)
    for number in range(10):
        writer.add(f"{number:020}")
        assert writer.flush()
    writer.close()
    assert len(segments(tmp_path)) == 4
    assert text(tmp_path).split() == [f"{number:020}" for number in range(10)]


def test_a_disk_that_takes_nothing_keeps_the_records_waiting(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, 5)
    writer.add("zero")
    assert writer.flush()
    real = os.dup(writer._file)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file)
    writer.add("one")
    assert not writer.flush()
    assert writer.error
    writer.add("two")
    assert not writer.flush()
    os.dup2(real, writer._file)
    writer.add("three")
    assert writer.flush()
    assert not writer.stuck
    assert text(tmp_path) == "zero\none\ntwo\nthree\n"
    writer.close()
    os.close(real)
    os.close(full)


def test_a_line_that_was_half_written_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SpoolWriter(tmp_path, 5)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    writer.add("abcdef")
    assert not writer.flush()
    assert writer.stuck
    monkeypatch.undo()
    writer.add("ghi")
    assert writer.flush()
    assert text(tmp_path) == "abcdef\nghi\n"
    writer.close()


@pytest.mark.parametrize(("before", "after"), [("", ""), ("a\n", "a\n"), ("a\nb", "a\n"), ("torn", "")])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, before: str, after: str) -> None:
    (tmp_path / "00000000000000000005-00000000.ndjson").write_text("old\n")
    newest = tmp_path / "00000000000000000005-00000001.ndjson"
    newest.write_text(before)
    repair(tmp_path)
    assert newest.read_text() == after
    assert text(tmp_path) == "old\n" + after


def test_no_spool_needs_no_repair(tmp_path: Path) -> None:
    repair(tmp_path)
    words = last_words(tmp_path, 1)
    assert (words.sequence, words.ended) == (0, set())


def test_last_words_are_those_of_the_epochs_newest_two_segments(tmp_path: Path) -> None:
    def put(epoch: int, number: int, *lines: str) -> None:
        path = tmp_path / f"{epoch:020d}-{number:08d}.ndjson"
        path.write_text("".join(f"{line}\n" for line in lines))

    put(4, 0, line(4, 900, "ended", "x"))
    put(5, 0, line(5, 1), line(5, 2, "ended", "a"))
    put(5, 1, line(5, 3), line(5, 4, "ended", "b"))
    put(5, 2, line(5, 5, "denied", "c"), line(5, 6, "ended", "d"))
    words = last_words(tmp_path, 5)
    assert (words.sequence, words.ended) == (6, {"b", "d"})
    assert last_words(tmp_path, 6).sequence == 0
