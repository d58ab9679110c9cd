"""Admitted tunnels, and copies of their descriptors. Those of WireGuard devices have none: they come by a trunk.

    WAITING   admitted; its flow worker isn't connected, or hasn't answered. Ends by `Adopted`, or is refused after the timeout
    HELD      the flow worker reads it

When a flow worker is replaced (another generation), what it held is sent to the new one without a greeting; whether a greeting of a
WAITING tunnel was written can't be known then, so it may be written twice, but never not at all.

Closing tells the flow worker first, then shuts the connection for every copy of the descriptor.

Limits: about 0.4 kB a tunnel beside its context. A device's tunnels are counted where they are: its producers' at worker 0, and at the device's own worker the one by WireGuard, which
thus comes on top where those are two.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterable
from zlib import crc32

from falkirk.linux.seqpacket import Peer
from falkirk.onramp import admission, gate
from falkirk.onramp.admission import Admission
from falkirk.onramp.board import Board
from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.links import FlowLink
from falkirk.onramp.reactor import Reactor, Timer
from falkirk.onramp.tables import Tables, Touched
from falkirk.wire.context import Framing, Transport, TunnelContext
from falkirk.wire.handover import Adopt, Held, Recontext, TunnelClosed


class Tunnel:
    """One admitted producer."""

    __slots__ = (
        "admission",
        "admitted_at",
        "context",
        "framing",
        "generation",
        "greeting",
        "id",
        "mtu",
        "peer",
        "sock",
        "timer",
        "transport",
        "waiting",
        "worker",
    )

    def __init__(
        self,
        number: int,
        sock: socket.socket | None,
        peer: Peer,
        context: TunnelContext,
        framing: Framing,
        transport: Transport,
        mtu: int,
        worker: int,
    ) -> None:
        self.id, self.sock, self.peer, self.context = number, sock, peer, context
        self.framing, self.transport, self.mtu, self.worker = framing, transport, mtu, worker
        self.admission: Admission | None = None
        """None where it was admitted by an earlier on-ramp and hasn't been reviewed."""
        self.admitted_at = 0
        self.waiting = False
        """True until a flow worker has taken it."""
        self.greeting = b""
        """What the flow worker says to the producer then; empty where that has been said, or nobody listens."""
        self.generation = 0
        """Of the flow worker that reads it; 0 while none has said so."""
        self.timer: Timer | None = None


class TunnelTable:
    """All tunnels. `opened`, `changed` and `ended` tell the parent; `refused` counts. Of tunnels without a descriptor `taken` and `gone` tell whoever moves
    their packets."""

    def __init__(
        self,
        reactor: Reactor,
        links: list[FlowLink],
        board: Board,
        opened: Callable[[Tunnel, bool], None],
        changed: Callable[[Tunnel], None],
        ended: Callable[[Tunnel, str], None],
        refused: Callable[[Code], None],
        taken: Callable[[Tunnel], None],
        gone: Callable[[Tunnel], None],
        *,
        mtu: int,
        adopt_timeout_s: float,
        max_tunnels: int,
        max_per_device: int,
    ) -> None:
        self._reactor, self._links, self._board = reactor, links, board
        self._opened, self._changed, self._ended, self._refused = opened, changed, ended, refused
        self._taken, self._gone = taken, gone
        self._mtu, self._adopt_timeout_s = mtu, adopt_timeout_s
        self._max_tunnels, self._max_per_device = max_tunnels, max_per_device
        self._tunnels: dict[int, Tunnel] = {}
        self._by_device: dict[str, tuple[int, ...]] = {}
        """Numbers by device: of most one, for which a set would be four times as large."""

    def __len__(self) -> int:
        return len(self._tunnels)

    def __contains__(self, number: int) -> bool:
        return number in self._tunnels

    def admit(
        self,
        sock: socket.socket | None,
        peer: Peer,
        admitted: Admission,
        request: ContextRequest,
        now: int,
        mtu: int = 0,
    ) -> int:
        """A new tunnel, and its number; `now` is wall-clock nanoseconds, `mtu` 0 the on-ramp's own. No socket where the request's transport is the
        trunk. Raises Refusal, and the socket stays the caller's."""
        device_id = admitted.context.device_id
        if self._board.tunnels() >= self._max_tunnels:
            raise Refusal(Code.LIMIT, f"this node has {self._max_tunnels} tunnels")
        if len(self._by_device.get(device_id, ())) >= self._max_per_device:
            raise Refusal(Code.LIMIT, f"device {admitted.context.device} has {self._max_per_device} tunnels")
        worker = crc32(device_id.encode()) % len(self._links)
        mtu = mtu or self._mtu
        number = self._board.take(self._tunnels)
        tunnel = Tunnel(number, sock, peer, admitted.context, request.framing, request.transport, mtu, worker)
        tunnel.admission, tunnel.admitted_at, tunnel.waiting = admitted, now, True
        if sock is not None:
            tunnel.greeting = admission.greeting(tunnel.id, tunnel.context, mtu, request.framing, request.transport)
        tunnel.timer = self._reactor.later(self._adopt_timeout_s, lambda: self._on_adopt_timeout(tunnel))
        self._insert(tunnel)
        self._adopt(tunnel)
        return tunnel.id

    def hold(
        self, worker: int, generation: int, what: Held, sock: socket.socket | None, peer: Peer, now: int
    ) -> Tunnel | None:
        """A tunnel that a flow worker reads since before this on-ramp; None where it is known."""
        number = what.tunnel
        known = self._tunnels.get(number)
        if known is not None:
            if sock is not None:
                sock.close()
            if what.context != known.context:
                # It changed while the link was down.
                self._recontext(known)
            self.adopted(number, generation)
            return None
        tunnel = Tunnel(number, sock, peer, what.context, what.framing, what.transport, what.mtu, worker)
        tunnel.generation, tunnel.admitted_at = generation, now
        self._board.seen(number)
        self._insert(tunnel)
        self._opened(tunnel, True)
        return tunnel

    def link_up(self, worker: int, generation: int) -> None:
        """Hand over what this generation of the flow worker doesn't read yet."""
        for tunnel in self._tunnels.values():
            if tunnel.worker == worker and tunnel.generation != generation:
                self._adopt(tunnel)

    def adopted(self, number: int, generation: int) -> None:
        """A flow worker reads the tunnel."""
        tunnel = self._tunnels.get(number)
        if tunnel is None:
            return
        tunnel.generation = generation
        if tunnel.timer is not None:
            tunnel.timer.cancel()
        if tunnel.waiting:
            tunnel.waiting, tunnel.greeting, tunnel.timer = False, b"", None
            self._opened(tunnel, False)
        if tunnel.sock is None:
            self._taken(tunnel)

    def adopt_refused(self, number: int, code: str, message: str) -> None:
        """A flow worker doesn't take the tunnel."""
        tunnel = self._tunnels.get(number)
        if tunnel is None:
            return
        if tunnel.waiting:
            self._fail(tunnel, Code.ADOPT_REFUSED, f"{code}: {message}")
        else:
            self.close(number, f"adopt_refused: {code}", tell_flow=False)

    def close(self, number: int, reason: str, *, tell_flow: bool = True) -> None:
        """End a tunnel, where it is there."""
        tunnel = self._tunnels.get(number)
        if tunnel is None:
            return
        self._remove(tunnel)
        if tell_flow:
            self._links[tunnel.worker].send(TunnelClosed(number, reason))
            self._links[tunnel.worker].flush()
        if tunnel.waiting:
            self._refused(Code.GONE)
        else:
            self._ended(tunnel, reason)
        if tunnel.sock is not None:
            gate.discard(tunnel.sock)
        else:
            self._gone(tunnel)

    def touched_by(self, touched: Touched) -> set[int]:
        """Tunnels that a change may concern."""
        found: set[int] = set()
        for device in touched.devices:
            found.update(self._by_device.get(device, ()))
        if touched.tenants:
            found.update(
                number for number, tunnel in self._tunnels.items() if tunnel.context.tenant_id in touched.tenants
            )
        return found

    def ids(self) -> Iterable[int]:
        """All tunnels."""
        return list(self._tunnels)

    def review(self, number: int, tables: Tables) -> None:
        """Tell the flow worker what the tunnel's context is now, or close the tunnel where it has none any more."""
        tunnel = self._tunnels.get(number)
        if tunnel is None:
            return
        if tunnel.admission is None:
            tunnel.admission = admission.resumed(tables, tunnel.context)
        found = admission.review(tables, tunnel.admission)
        if isinstance(found, Admission):
            if found is not tunnel.admission:
                tunnel.admission, tunnel.context = found, found.context
                self._recontext(tunnel)
                if not tunnel.waiting:
                    self._changed(tunnel)
        elif tunnel.waiting:
            self._fail(tunnel, Code.NOT_READY, f"{found} while the tunnel was opened; try again")
        else:
            self.close(number, found)

    def _recontext(self, tunnel: Tunnel) -> None:
        self._links[tunnel.worker].send(Recontext(tunnel.id, tunnel.context))

    def _insert(self, tunnel: Tunnel) -> None:
        self._tunnels[tunnel.id] = tunnel
        self._board.count(len(self._tunnels))
        device = tunnel.context.device_id
        self._by_device[device] = (*self._by_device.get(device, ()), tunnel.id)
        if tunnel.sock is not None:
            # Hang-ups are always told; reading is the flow worker's.
            self._reactor.add(
                tunnel.sock.fileno(), select.EPOLLRDHUP, lambda _: self.close(tunnel.id, "producer_closed")
            )

    def _remove(self, tunnel: Tunnel) -> None:
        if tunnel.sock is not None:
            self._reactor.remove(tunnel.sock.fileno())
        del self._tunnels[tunnel.id]
        self._board.count(len(self._tunnels))
        device = tunnel.context.device_id
        others = tuple(number for number in self._by_device.pop(device) if number != tunnel.id)
        if others:
            self._by_device[device] = others
        if tunnel.timer is not None:
            tunnel.timer.cancel()

    def _adopt(self, tunnel: Tunnel) -> None:
        message = Adopt(
            tunnel.id,
            tunnel.context,
            tunnel.framing,
            tunnel.mtu,
            tunnel.greeting,
            tunnel.transport,
            descriptors=int(tunnel.sock is not None),
        )
        self._links[tunnel.worker].send(message, tunnel.sock)

    def _on_adopt_timeout(self, tunnel: Tunnel) -> None:
        self._fail(tunnel, Code.NOT_READY, f"flow worker {tunnel.worker} doesn't take tunnels now; try again")

    def _fail(self, tunnel: Tunnel, code: Code, message: str) -> None:
        """Refuse a tunnel that was admitted but never read."""
        self._remove(tunnel)
        self._links[tunnel.worker].send(TunnelClosed(tunnel.id, code.lower()))
        self._links[tunnel.worker].flush()
        self._refused(code)
        if tunnel.sock is not None:
            gate.refuse(tunnel.sock, Refusal(code, message).answer())
        else:
            self._gone(tunnel)
