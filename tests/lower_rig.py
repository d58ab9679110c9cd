"""Two devices, and what stands between them where streams are lowered: two kernels and the upgrader of the laptop's worker, all played by hand."""

from __future__ import annotations

from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.handover import Connected, Message, Prepare
from falkirk.wire.packet import Packet, parse, verify
from falkirk.wire.slots import LOWERED
from tests.flow_rig import PORT, TENANT, read
from tests.forward_rig import LAPTOP, NAS, Pair, tcp

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
R, V = Framing.RAW, Framing.VNET
FRAMINGS = {"raw": (R, R), "vnet": (V, V), "raw-vnet": (R, V), "vnet-raw": (V, R)}
FAMILIES = (4, 6)
PORTS = (40000, 22)
POLICIES = (
    PolicySource(
        TENANT,
        "main",
        0,
        [
            RuleSource("ssh", 'device.name == "laptop" && net.dst_device == "nas"', "allow", "l4"),
            RuleSource("back", 'device.name == "nas" && net.dst_device == "laptop" && net.port > 1024', "allow", "l4"),
            RuleSource("off", 'net.dst_device == "off"', "allow", "l4"),
        ],
    ),
)


class Lowered:
    """The pair of devices, and what stands between: two kernels and the upgrader of the laptop's worker."""

    def __init__(self, pair: Pair, family: int, framings: tuple[Framing, Framing]) -> None:
        self.pair, self.family = pair, family
        self.rig = pair.rigs[0]
        self.there = LAPTOP[family], NAS[family]
        self.framing = framings[0]
        # Packets for another worker's tunnel cross as super-packets.
        self.lower_framing = framings[1] if len(pair.rigs) == 1 else V
        self.slot = self.lower = 0

    # the laptop and the NAS

    def laptop(self, flags: int, sequence: int = 1000, acknowledged: int = 0, ports: tuple[int, int] = PORTS) -> None:
        self.pair.laptop.send(tcp(*self.there, ports, flags, sequence, acknowledged))

    def nas(self, flags: int, sequence: int = 5000, acknowledged: int = 0, ports: tuple[int, int] = PORTS) -> None:
        self.pair.nas.send(tcp(*self.there[::-1], ports[::-1], flags, sequence, acknowledged))

    def at(self, end: str) -> list[Packet]:
        return [packet for packet, _ in getattr(self.pair, end).received()]

    # the upgrader

    def asked(self) -> list[Message]:
        self.pair.step()
        return self.rig.asked()

    def prepared(self) -> Prepare:
        (message,) = self.asked()
        assert isinstance(message, Prepare)
        self.slot, self.lower = message.slot, message.lower
        return message

    def say(self, *messages: Message) -> None:
        self.rig.say_upgrader(*messages)
        self.pair.step()

    # the kernels

    def _address(self, slot: int) -> bytes:
        plan = self.rig.plan
        address = plan.address4 if self.family == 4 else plan.address6
        return address(self.rig.number, slot & ~LOWERED)

    def lowering(self, flags: int, sequence: int = 7000, acknowledged: int = 0) -> None:
        """The kernel that lowers sends to the slot."""
        own = self._address(self.rig.plan.slot(self.lower_framing, 1))
        packet = segment(own, self._address(self.lower), *PORTS, sequence, acknowledged, flags, 65535)
        self.rig.lower_tun[self.lower_framing].send(vnet.ZERO + packet)
        self.pair.step()

    def lifting(self, flags: int, sequence: int = 3000, acknowledged: int = 1001) -> None:
        """The kernel that lifts answers the slot."""
        own = self._address(self.rig.plan.slot(self.framing, 1))
        packet = segment(own, self._address(self.slot), PORT, PORTS[0], sequence, acknowledged, flags, 65535)
        self.rig.tun[self.framing].send(vnet.ZERO + packet)
        self.pair.step()

    def inside(self, tuns: dict[Framing, object], framing: Framing) -> list[Packet]:
        self.pair.step()
        packets = []
        for data in read(tuns[framing]):  # type: ignore[arg-type]
            packet = parse(data, 10, len(data) - 10)
            if not data[0] & 1:
                verify(data, packet)
            packets.append(packet)
        return packets

    def lifted(self) -> list[Packet]:
        """What the kernel that lifts has got."""
        return self.inside(self.rig.tun, self.framing)  # type: ignore[arg-type]

    def lowered(self) -> list[Packet]:
        """What the kernel that lowers has got."""
        return self.inside(self.rig.lower_tun, self.lower_framing)  # type: ignore[arg-type]

    # a whole connection

    def dialled(self) -> None:
        """The NAS has accepted."""
        self.laptop(SYN)
        self.prepared()
        self.lowering(SYN)
        assert [packet.flags for packet in self.at("nas")] == [SYN]
        self.nas(SYN | ACK, 5000, 7001)
        assert [packet.flags for packet in self.lowered()] == [SYN | ACK]
        self.lowering(ACK, 7001, 5001)
        assert [packet.flags for packet in self.at("nas")] == [ACK]

    def open(self) -> None:
        """Both connections are there."""
        self.dialled()
        self.say(Connected(self.slot, 1))
        assert [packet.flags for packet in self.lifted()] == [SYN]
        self.lifting(SYN | ACK)
        self.laptop(ACK, 1001, 3001)
        assert [packet.flags for packet in self.at("laptop")] == [SYN | ACK]
        assert [packet.flags for packet in self.lifted()] == [ACK]

    def legs(self) -> int:
        """That are in use or linger."""
        return sum(flow is not None for lane in self.rig.worker.lowering.lanes.values() for flow in lane.flows)

    def pass_time(self, seconds: int) -> None:
        """Second by second, so that nothing is skipped."""
        for _ in range(seconds):
            self.pair.pass_time(1)
