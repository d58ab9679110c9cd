"""The usual exchanges of a case in one line each: a handshake, so many bytes one way or the other, an end."""

from __future__ import annotations

import time

from tests.packets import craft
from tests.packets.craft import Endpoints, pattern
from tests.packets.ground import BARE, Ground
from tests.packets.script import Step


class Exchange(Ground):
    """What goes on until something is reached."""

    def open(self, step: Step) -> None:
        """A connection: SYN 1000 with the step's options, SYN-ACK, ACK; the server accepts."""
        connection = self._connection(step)
        self._say(connection, step, "S", 1000, 0, b"", options=True)
        syn_ack = self._expect_flags(step, connection, "S.")
        if syn_ack.fields["ack"] != 1001:
            raise self._wrong(step, f"it acknowledges {syn_ack.fields['ack']}")
        self._say(connection, step, ".", 1001, 1, b"")
        self.server.accept()

    def push(self, step: Step) -> None:
        """`push FROM N`: N bytes of the client's stream from a sequence number on, each segment acknowledged in its turn."""
        connection = self._connection(step)
        at, left, size = int(step.words[0]), int(step.words[1]), step.number("mss", 1000)
        while left:
            part = min(left, size)
            self._say(connection, step, "P.", at, connection.next_in, pattern(at - connection.first - 1, part))
            at, left = at + part, left - part
            deadline = time.monotonic() + self.deadline
            while connection.acked is None or connection.acked - at & 0x80000000:
                if self._receive(deadline) is None:
                    raise self._wrong(step, f"{at} isn't acknowledged")

    def flood(self, step: Step) -> None:
        """`flood FROM`: the client's stream from a sequence number on, until the window is closed and everything is acknowledged."""
        connection = self._connection(step)
        at = connection.acked = int(step.words[0])
        deadline = time.monotonic() + 3 * self.deadline
        while connection.window or connection.acked != at:
            room = connection.acked + connection.window - at
            while room > 0:
                part = min(room, 32000 if self.road.partial else 1400)
                ends = Endpoints(
                    self.road.address(self.family), self._resolve("server"), connection.port, self.server.port
                )
                sent = pattern(at - connection.first - 1, part)
                segment = craft.tcp(BARE, ends, ".", at, (connection.base or 0) + connection.next_in, sent)
                gso = 1400 if part > 1400 else 0
                self.road.send(craft.ip(BARE, ends, self.family, 6, segment), gso=gso)
                at, room = at + part, room - part
            if self._receive(deadline, told=False) is None:
                raise self._wrong(step, f"the window is still open at {at}")
        connection.next_out = at
        self.server.owed = at - connection.first - 1
        self.transcript.append(f"    {'':4} {self.server.owed} bytes filled it")

    def take(self, step: Step) -> None:
        """`take N`: N bytes of the server's stream, in order, and no acknowledgment."""
        self._gather(step, acknowledged=False)

    def fetch(self, step: Step) -> None:
        """`fetch N [client=SEQ]`: N bytes of the server's stream, in order, each segment acknowledged."""
        self._gather(step, acknowledged=True)

    def _gather(self, step: Step, *, acknowledged: bool) -> None:
        connection = self._connection(step)
        at, sequence = connection.next_in, step.number("client", 1001)
        end = at + int(step.words[0])
        deadline = time.monotonic() + self.deadline
        while at < end:
            packet = self._receive(deadline)
            if packet is None:
                raise self._wrong(step, f"nothing came at {at}")
            if packet.kind != "tcp" or packet.flags.strip("P") != ".":
                raise self._wrong(step, f"came: {packet}")
            if not packet.payload:
                continue
            if connection.relative(packet.sequence) + len(packet.payload) <= at:
                # A segment again whose acknowledgment crossed it.
                continue
            if connection.relative(packet.sequence) != at or packet.payload != pattern(at - 1, len(packet.payload)):
                raise self._wrong(step, f"at {at} came: {packet}")
            at += len(packet.payload)
            if step.has("mss") and len(packet.payload) > step.number("mss"):
                raise self._wrong(step, f"a segment of {len(packet.payload)} bytes")
            if acknowledged:
                self._say(connection, step, ".", sequence, at, b"")
        if at != end:
            raise self._wrong(step, f"{at - end} bytes too many")

    def close(self, step: Step) -> None:
        """`close SEQ`: the client ends first; the server follows."""
        connection = self._connection(step)
        sequence, at = int(step.words[0]), connection.next_in
        self._say(connection, step, "F.", sequence, at, b"")
        self.server.receive_end()
        self.server.close()
        fin = self._expect_flags(step, connection, "F.")
        if fin.fields["ack"] != sequence + 1:
            raise self._wrong(step, f"it acknowledges {fin.fields['ack']}")
        self._say(connection, step, ".", sequence + 1, connection.next_in, b"")
