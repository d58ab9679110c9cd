"""Snapshots on disk: one file that is whole or not there, with its revision and a version tag.

The file is two bytes of length (big endian), that long a MessagePack header (magic, layout version, store epoch, revision number, SHA-256 of these and
the bytes, length), zeros up to byte 512, then the bytes. `save` writes beside it, fsyncs, renames and fsyncs the directory; `load` refuses what is cut, damaged or of another layout version
with `BlobError`, so that a replica from a newer or broken process reads as none. What the bytes mean has its own version at their head.

Packet workers use this to open what their parent's `BlobReplica` keeps, so it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from pathlib import Path
from typing import Final

import msgspec

MAGIC: Final = "falkirk-blob"
LAYOUT: Final = 1
HEADER_BYTES: Final = 512


class BlobError(Exception):
    """The file isn't a whole snapshot of this layout."""


class Blob(msgspec.Struct, frozen=True):
    """A snapshot: the revision (store epoch and number) and its bytes."""

    epoch: str
    number: int
    data: bytes


class _Header(msgspec.Struct, frozen=True, array_like=True):
    magic: str
    layout: int
    epoch: str
    number: int
    sha256: bytes
    length: int


_decoder: Final = msgspec.msgpack.Decoder(_Header)


def save(path: Path, blob: Blob) -> None:
    """Replaces the file, durably. Raises OSError."""
    digest = _digest(blob.epoch, blob.number, blob.data)
    header = msgspec.msgpack.encode(_Header(MAGIC, LAYOUT, blob.epoch, blob.number, digest, len(blob.data)))
    if len(header) + 2 > HEADER_BYTES:
        raise ValueError("the epoch is too long")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    with open(draft, "wb") as file:
        file.write((len(header).to_bytes(2, "big") + header).ljust(HEADER_BYTES, b"\0"))
        file.write(blob.data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: Path) -> Blob:
    """Reads a snapshot. Raises FileNotFoundError, BlobError."""
    content = path.read_bytes()
    header = _check(path, memoryview(content))
    return Blob(header.epoch, header.number, content[HEADER_BYTES:])


def mapped(path: Path, *, checked: bool = True) -> memoryview:
    """A snapshot's bytes as they lie in the file, which is replaced by others but never changed: all processes that map it share the kernel's copy.

    Unless `checked` only its length is. Raises OSError, BlobError.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < HEADER_BYTES:
            raise BlobError(f"{path}: cut short")
        content = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    if checked:
        _check(path, content)
    return content[HEADER_BYTES:]


def _check(path: Path, content: memoryview) -> _Header:
    if len(content) < HEADER_BYTES:
        raise BlobError(f"{path}: cut short")
    try:
        header = _decoder.decode(content[2 : 2 + int.from_bytes(content[:2], "big")])
    except msgspec.DecodeError as error:
        raise BlobError(f"{path}: {error}") from error
    if header.magic != MAGIC or header.layout != LAYOUT:
        raise BlobError(f"{path}: {header.magic} layout {header.layout}, this process reads layout {LAYOUT}")
    data = content[HEADER_BYTES:]
    if len(data) != header.length or _digest(header.epoch, header.number, data) != header.sha256:
        raise BlobError(f"{path}: damaged")
    return header


def remove(path: Path) -> None:
    """Forgets a snapshot."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _digest(epoch: str, number: int, data: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(f"{epoch} {number} ".encode())
    digest.update(data)
    return digest.digest()
