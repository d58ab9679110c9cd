"""Packets between a TUN device and a tunnel, as fast as one thread of Python moves them.

One preallocated buffer a direction; each descriptor is drained to EAGAIN within a budget, so that neither direction
starves the other. A tunnel that is full stops the reading of the device (whose queue then drops, as a slow link's
would) until it can be written again; a device that refuses a packet (a bad vnet header, no memory) costs that packet,
and is counted by the error's name.

`vnet` framing: one read is one datagram, header and all. `raw` framing: packets that wait are packed into one datagram
of at most `PACKED` bytes, which saves a system call each at the other end; datagrams that come are unpacked.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

from falkirk.linux import sockets, tun
from falkirk.wire.context import Framing
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import split

TUNNEL_BUFFER: Final = 4 * 1024 * 1024
"""Bytes that may wait in the tunnel each way."""
BUDGET: Final = 32
"""Reads of one descriptor in a turn."""
PACKED: Final = 64 * 1024
"""Bytes of packets in one raw datagram."""
_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


class Pump:
    """Moves packets until told to stop, or the tunnel ends (`closed`)."""

    def __init__(self, device: int, tunnel: socket.socket, framing: Framing, mtu: int, *, packed: bool = True) -> None:
        """Both must be non-blocking, and stay the caller's. `mtu`: the device's, bytes. `packed`: with raw framing, send
        several packets in a datagram."""
        sockets.raise_buffers(tunnel, TUNNEL_BUFFER)
        self._device = device
        self._tunnel = tunnel
        self._last = PACKED - mtu if packed else 0
        """Where in a raw datagram the last packet may begin."""
        self._out = bytearray(max(tun.MAX_READ, PACKED))
        self._out_view = memoryview(self._out)
        self._in = bytearray(2 * tun.MAX_READ)
        self._in_view = memoryview(self._in)
        self._waiting = 0
        self._send_waiting = self._take_vnet if framing is Framing.VNET else self._take_raw
        self._deliver = self._deliver_vnet if framing is Framing.VNET else self._deliver_raw
        self._epoll = select.epoll()
        self._others: dict[int, Callable[[], None]] = {}
        self.closed = False
        """The tunnel's other end is gone."""
        self.dropped: Counter[str] = Counter()
        """Packets lost here, by reason."""
        self.sent_datagrams = self.received_datagrams = 0
        self._epoll.register(device, select.EPOLLIN)
        self._epoll.register(tunnel, select.EPOLLIN)

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call this once, when the descriptor becomes readable."""
        self._others[fd] = on_readable
        self._epoll.register(fd, select.EPOLLIN)

    def turn(self, timeout: float | None = None) -> bool:
        """Wait for work (seconds; None: as long as it takes) and do it; False where there was none in time."""
        device, tunnel = self._device, self._tunnel.fileno()
        events = self._epoll.poll(timeout)
        for fd, mask in events:
            if fd == device:
                self._send_waiting()
            elif fd == tunnel:
                if self._waiting and mask & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
                    self._resume()
                if mask & ~select.EPOLLOUT:
                    self._deliver()
            else:
                self._epoll.unregister(fd)
                self._others.pop(fd)()
        return bool(events)

    def close(self) -> None:
        """Free what the pump itself holds."""
        self._epoll.close()

    # device -> tunnel

    def _take_vnet(self) -> None:
        readv, device, buffers = os.readv, self._device, (self._out,)
        send, view = self._tunnel.send, self._out_view
        for _ in range(BUDGET):
            try:
                length = readv(device, buffers)
            except BlockingIOError:
                return
            try:
                send(view[:length])
            except OSError as error:
                if not self._survives(error, length):
                    return
            else:
                self.sent_datagrams += 1

    def _take_raw(self) -> None:
        readv, device, view, last = os.readv, self._device, self._out_view, self._last
        for _ in range(BUDGET):
            length = 0
            more = True
            while length <= last:
                try:
                    length += readv(device, (view[length:],))
                except BlockingIOError:
                    more = False
                    break
            if length:
                try:
                    self._tunnel.send(view[:length])
                except OSError as error:
                    if not self._survives(error, length):
                        return
                else:
                    self.sent_datagrams += 1
            if not more:
                return

    def _survives(self, error: OSError, length: int) -> bool:
        """A datagram that couldn't be sent: keep it and wait, count it, or end; may reading go on?"""
        if error.errno == errno.EAGAIN:
            self._waiting = length
            self._epoll.unregister(self._device)
            self._epoll.modify(self._tunnel, select.EPOLLIN | select.EPOLLOUT)
            return False
        if error.errno in _GONE:
            self._end()
            return False
        self._count("tunnel", error)
        return True

    def _resume(self) -> None:
        """The tunnel can be written again: first what waits, then the device."""
        try:
            self._tunnel.send(self._out_view[: self._waiting])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in _GONE:
                self._end()
                return
            self._count("tunnel", error)
        else:
            self.sent_datagrams += 1
        self._waiting = 0
        self._epoll.modify(self._tunnel, select.EPOLLIN)
        self._epoll.register(self._device, select.EPOLLIN)

    # tunnel -> device

    def _deliver_vnet(self) -> None:
        receive, buffer, view = self._tunnel.recv_into, self._in, self._in_view
        write, device = os.write, self._device
        for _ in range(BUDGET):
            try:
                length = receive(buffer)
            except BlockingIOError:
                return
            except ConnectionResetError:
                length = 0
            if not length:
                self._end()
                return
            self.received_datagrams += 1
            try:
                write(device, view[:length])
            except OSError as error:
                self._count("device", error)

    def _deliver_raw(self) -> None:
        view = self._in_view
        for _ in range(BUDGET):
            try:
                length = self._tunnel.recv_into(view)
            except BlockingIOError:
                return
            except ConnectionResetError:
                length = 0
            if not length:
                self._end()
                return
            self.received_datagrams += 1
            try:
                for start, size in split(view, length):
                    self._write(view[start : start + size])
            except MalformedPacket as error:
                self.dropped[error.reason] += 1

    def _write(self, packet: memoryview) -> None:
        try:
            os.write(self._device, packet)
        except OSError as error:
            self._count("device", error)

    def _end(self) -> None:
        if not self.closed:
            self.closed = True
            self._epoll.unregister(self._tunnel)
            if not self._waiting:
                self._epoll.unregister(self._device)

    def _count(self, where: str, error: OSError) -> None:
        self.dropped[f"{where}_{errno.errorcode.get(error.errno or 0, 'error').lower()}"] += 1
