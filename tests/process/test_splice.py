"""Splicing between sockets through pooled pipes."""

from __future__ import annotations

import os
import socket

from falkirk.linux.splice import PIPE_SIZE, Pipes, splice


def test_bytes_go_through_and_the_end_shows() -> None:
    pipes = Pipes(spare=1)
    pipe = pipes.take()
    near, source = socket.socketpair()
    target, far = socket.socketpair()
    for sock in (source, target):
        sock.setblocking(False)
    with near, source, target, far:
        assert splice(source.fileno(), pipe.write, PIPE_SIZE) is None
        near.sendall(b"hello")
        assert splice(source.fileno(), pipe.write, PIPE_SIZE) == 5
        assert splice(pipe.read, target.fileno(), 5) == 5
        assert far.recv(10) == b"hello"
        near.shutdown(socket.SHUT_WR)
        assert splice(source.fileno(), pipe.write, PIPE_SIZE) == 0
    pipes.give_back(pipe, empty=True)
    pipes.close()
    assert pipes.open == 0


def test_only_an_empty_pipe_is_lent_again() -> None:
    pipes = Pipes(spare=2)
    first = pipes.take()
    pipes.give_back(first, empty=True)
    assert pipes.take() is first
    os.write(first.write, b"of another stream")
    pipes.give_back(first, empty=False)
    assert pipes.open == 0


def test_no_more_than_the_spare_ones_are_kept() -> None:
    pipes = Pipes(spare=1)
    for pipe in [pipes.take(), pipes.take()]:
        pipes.give_back(pipe, empty=True)
    assert pipes.open == 1
    pipes.close()
