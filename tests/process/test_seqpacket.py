"""SEQPACKET sockets: datagrams, descriptors, the end, permissions."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from falkirk.linux import seqpacket


def test_a_pair_carries_datagrams_and_descriptors() -> None:
    left, right = seqpacket.pair()
    with left, right:
        reader, writer = os.pipe()
        assert seqpacket.receive(right, 100) is None
        assert seqpacket.send(left, b"one", [writer, reader])
        assert seqpacket.send(left, b"two")
        received = seqpacket.receive(right, 100)
        assert received
        data, (writer2, reader2) = received
        assert data == b"one"
        os.write(writer2, b"x")
        assert os.read(reader, 1) == b"x"
        assert not os.get_inheritable(reader2)
        assert seqpacket.receive(right, 100) == (b"two", [])
        for descriptor in (reader, writer, reader2, writer2):
            os.close(descriptor)


def test_numbers_serve_as_well_as_socket_objects() -> None:
    left, right = seqpacket.pair()
    with left, right, open(os.devnull) as null:
        assert seqpacket.send(left.fileno(), b"x", [null.fileno()])
        assert seqpacket.send(left.fileno(), b"y")
        received = seqpacket.receive(right.fileno(), 100)
        assert received
        assert received[0] == b"x"
        os.close(received[1][0])
        assert seqpacket.receive(right.fileno(), 100) == (b"y", [])
        assert seqpacket.receive(right.fileno(), 100) is None
        left.close()
        assert seqpacket.receive(right.fileno(), 100) == (b"", [])


def test_a_reader_may_take_no_descriptors() -> None:
    left, right = seqpacket.pair()
    with left, right, open(os.devnull) as null:
        before = len(list(Path("/proc/self/fd").iterdir()))
        assert seqpacket.send(left, b"x", [null.fileno()])
        assert seqpacket.receive(right, 100, max_descriptors=0) == (b"x", [])
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_full_socket_says_so() -> None:
    left, right = seqpacket.pair()
    with left, right:
        sent = 0
        while seqpacket.send(left, bytes(1000)):
            sent += 1
        assert sent > 10
        assert not seqpacket.send(left, b"x", [right.fileno()])


def test_a_peer_that_died_with_data_unread_is_the_end() -> None:
    left, right = seqpacket.pair()
    with left:
        seqpacket.send(left, b"never read")
        right.close()
        assert seqpacket.receive(left, 100) == (b"", [])
        with pytest.raises(OSError, match="Broken pipe"):
            seqpacket.send(left, b"x")


def test_no_empty_datagrams() -> None:
    left, right = seqpacket.pair()
    with left, right, pytest.raises(ValueError, match="empty"):
        seqpacket.send(left, b"")


def test_a_listener_has_its_mode_and_knows_its_peers(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    umask = os.umask(0o077)
    with seqpacket.listen(path, 0o666) as listener:
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert seqpacket.accept(listener) is None
        with seqpacket.connect(path) as client:
            server = seqpacket.accept(listener)
            assert server
            with server:
                assert seqpacket.peer(server) == (os.getpid(), os.geteuid(), os.getegid())
                assert not server.getblocking()
                assert client.type == socket.SOCK_SEQPACKET


def test_a_dead_listener_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    seqpacket.listen(path).close()
    with seqpacket.listen(path):
        with pytest.raises(OSError, match="in use"):
            seqpacket.listen(path)
        path.unlink()
    path.write_text("a file")
    with pytest.raises(OSError, match="in use"):
        seqpacket.listen(path)
    assert path.read_text() == "a file"
