"""Trains of datagrams on real sockets, and an interface's control socket."""

from __future__ import annotations

import socket
import stat
import threading
from pathlib import Path

import pytest

from falkirk.linux import trains
from falkirk.linux.wireguard import control


def _wait(sock: socket.socket, buffer: memoryview) -> tuple[int, int, trains.Address]:
    sock.setblocking(True)
    sock.settimeout(10)
    try:
        sock.recv(1, socket.MSG_PEEK)
    finally:
        sock.setblocking(False)
    got = trains.receive(sock, buffer)
    assert got is not None
    return got


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_one_socket_speaks_both_families_and_trains_keep_their_datagrams(host: str) -> None:
    buffer = memoryview(bytearray(trains.MAX_RECEIVE))
    sizes = [1000] * 70 + [300] + [1200, 1200, 40] + [1300]
    datagrams = [bytes((number,)) * size for number, size in enumerate(sizes)]
    with trains.open_socket() as one, trains.open_socket() as other:
        assert trains.receive(other, buffer) is None
        there = trains.destination(one, host, other.getsockname()[1])
        assert trains.send(one, there, datagrams) == 0
        came: list[bytes] = []
        while len(came) < len(datagrams):
            length, segment, address = _wait(other, buffer)
            assert str(address[0]).removeprefix("::ffff:") == host
            assert address[1] == one.getsockname()[1]
            came += [bytes(buffer[at : min(at + segment, length)]) for at in range(0, length, segment)]
        assert came == datagrams
        # An address as it came is one to send to.
        assert trains.send(other, address, [b"back"]) == 0
        assert _wait(one, buffer)[0] == 4


def test_a_receiver_that_is_not_there_disturbs_nobody() -> None:
    buffer = memoryview(bytearray(trains.MAX_RECEIVE))
    with trains.open_socket() as one, trains.open_socket() as other:
        with trains.open_socket() as gone:
            port = gone.getsockname()[1]
        assert trains.send(one, trains.destination(one, "127.0.0.1", port), [b"x" * 100] * 3) == 0
        assert trains.send(other, trains.destination(other, "127.0.0.1", one.getsockname()[1]), [b"here"]) == 0
        assert _wait(one, buffer)[0] == 4


def test_what_the_kernel_does_not_take_is_told() -> None:
    with trains.open_socket("127.0.0.1") as sock:
        assert trains.send(sock, ("127.0.0.1", 9), [bytes(65_600), bytes(10), bytes(65_600)]) == 2
        with pytest.raises(ValueError, match="there is no IPv6 here"):
            trains.destination(sock, "::1", 1)


def test_control_answers_and_tells_its_command(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with pytest.raises(control.NotRunning):
        control.ask(path, "status")
    commands: list[str] = []
    with control.listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        listener.setblocking(True)

        def serve() -> None:
            commands.extend(control.answer(listener.accept()[0], lambda: {"state": "good"}) for _ in range(4))

        thread = threading.Thread(target=serve)
        thread.start()
        assert control.ask(path, "status") == {"state": "good"}
        with socket.socket(socket.AF_UNIX) as junk:
            junk.connect(str(path))
            junk.sendall(b"junk\n")
            assert junk.recv(100) == b""
        with pytest.raises(OSError, match="up already"):
            control.listen(path)
        assert control.ask(path, "down") == {"state": "good"}
        thread.join()
    assert commands == ["status", "", "status", "down"]
    # What a killed one left is replaced.
    control.listen(path).close()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("at", "asked"), [("", "127.0.0.2"), ("", "127.0.0.1"), ("", "::1"), ("0.0.0.0", "127.0.0.2")])
def test_an_answer_comes_from_the_address_that_was_asked(at: str, asked: str, count: int) -> None:
    with trains.open_socket(at, told=True) as node, trains.open_socket() as client:
        there = trains.destination(client, asked, node.getsockname()[1])
        assert trains.send(client, there, [b"question"]) == 0
        _, _, address = _wait(node, buffer := memoryview(bytearray(65536)))
        assert trains.sender(address)[1] == client.getsockname()[1]
        datagrams = [bytes([number]) * 100 for number in range(count)]
        assert trains.send(node, address, datagrams) == 0
        came = b""
        while len(came) < 100 * count:
            length, _, source = _wait(client, buffer)
            came += bytes(buffer[:length])
            assert source == there
        assert came == b"".join(datagrams)


def test_an_address_that_is_not_ours_any_more_is_not_insisted_on() -> None:
    with trains.open_socket(told=True) as node, trains.open_socket() as client:
        there = trains.destination(client, "127.0.0.2", node.getsockname()[1])
        assert trains.send(client, there, [b"question"]) == 0
        _, _, address = _wait(node, buffer := memoryview(bytearray(65536)))
        mapped = bytes(10) + b"\xff\xff" + bytes((203, 0, 113, 9)) + bytes(4)
        assert trains.send(node, (*trains.sender(address), mapped), [b"answer", b"second"]) == 0
        came = b""
        while len(came) < 12:
            length, _, source = _wait(client, buffer)
            came += bytes(buffer[:length])
            assert source[0] == "::ffff:127.0.0.1"
        assert came == b"answersecond"
