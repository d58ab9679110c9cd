"""Snapshots on disk are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from falkirk.runtime import blob
from falkirk.runtime.blob import Blob, BlobError


@pytest.mark.parametrize("data", [b"", b"x", bytes(1_000_000)])
def test_there_and_back(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "new" / "rules.bin"
    for number in (0, 1, 1 << 60):
        blob.save(path, Blob("epoch", number, data))
        assert blob.load(path) == Blob("epoch", number, data)
        assert blob.mapped(path) == data
    assert [found.name for found in path.parent.iterdir()] == ["rules.bin"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rules.bin"
    blob.save(path, Blob("epoch", 1, b"rules"))
    whole = path.read_bytes()
    damaged = [whole[:place] for place in range(len(whole))]
    damaged += [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (0, 1, 3, 20, 40, len(whole) - 1)
    ]
    damaged.append(whole + b"x")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(BlobError):
            assert blob.load(path) == Blob("epoch", 1, b"rules")
        with pytest.raises(BlobError):
            assert bytes(blob.mapped(path)) == b"rules"
    path.write_bytes(whole[: blob.HEADER_BYTES - 1])
    with pytest.raises(BlobError):
        blob.mapped(path, checked=False)
    blob.remove(path)
    blob.remove(path)
    with pytest.raises(FileNotFoundError):
        blob.load(path)


def test_a_mapped_snapshot_stays_as_it_was_when_another_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "routes.bin"
    blob.save(path, Blob("epoch", 1, b"old"))
    held = [blob.mapped(path), blob.mapped(path, checked=False)]
    blob.save(path, Blob("epoch", 2, b"newer"))
    assert [bytes(each) for each in held] == [b"old", b"old"]
    assert bytes(blob.mapped(path)) == b"newer"
