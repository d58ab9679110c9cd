"""Rules, routes and devices change under live flows: which ones end, with what reason, and what it costs the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.flow import control
from falkirk.flow import review as review_module
from falkirk.flow.live import RULE_BYTES, LiveReader
from falkirk.wire.build import segment
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.handover import Abort, Closed, Connected, Held, Hello, Prepare, Recontext, TunnelClosed
from falkirk.wire.packet import parse
from tests.flow_rig import ALLOW_WEB, DEVICE4, SERVER4, TENANT, FlowRig, context, read, route
from tests.forward_rig import LAPTOP, NAS, Pair, between, connected, datagram, device, own
from tests.unit.flow.test_worker_lift import ACK, RST, SYN, Client, established

STAFF = RuleSource("staff", '"staff" in identity.groups', "allow")
HEALTHY = RuleSource("healthy", 'device.posture["disk"] == "encrypted"', "allow")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


def policy(*rules: RuleSource) -> list[PolicySource]:
    return [PolicySource(TENANT, "new", 0, list(rules))]


def ends(rig: FlowRig) -> dict[int, str]:
    """Reasons of ended flows by destination port."""
    return {record.destination_port: record.reason for record in rig.records() if record.event == "ended"}


def live(rig: FlowRig) -> dict[int, str]:
    """Rules of live flows by destination port, as anybody reads them."""
    reader = LiveReader(rig.data_dir / "flow" / "live" / "worker-0")
    found = {record.destination_port: record.rule for record in reader}
    reader.close()
    return found


def gone(rig: FlowRig, *flows: Prepare) -> None:
    """The upgrader resets these streams; their kernel's RST finds its way."""
    for flow in flows:
        rig.say_upgrader(Closed(flow.slot, "aborted", 0, 0))


@pytest.mark.parametrize("framing", list(Framing))
def test_a_rule_that_denies_ends_its_flows_and_no_others(rig: FlowRig, framing: Framing) -> None:
    web, mail = (Client(rig, framing, 4, to=port) for port in (80, 143))
    allowed, _ = established(web)
    forbidden, slot = established(mail)
    rig.change_rules(
        policy(RuleSource("web", "net.port == 80", "allow"), RuleSource("no-mail", "net.port == 143", "deny"))
    )
    assert rig.asked() == [Abort(forbidden.slot)]
    mail.kernel(slot, RST, 9001)
    gone(rig, forbidden)
    (reset,) = mail.received()
    assert reset.flags & RST
    assert ends(rig) == {143: "policy_changed: new/no-mail"}
    assert live(rig) == {80: "new/web"}
    web.send(ACK, 1001, 9001)
    assert len(web.inside()) == 1
    gone(rig, allowed)


def test_without_rules_everything_ends(rig: FlowRig) -> None:
    clients = [Client(rig, Framing.RAW, family, to=port) for family, port in ((4, 80), (6, 81))]
    flows = [established(client)[0] for client in clients]
    rig.change_rules([])
    assert rig.asked() == [Abort(flow.slot) for flow in flows]
    for client, flow in zip(clients, flows, strict=True):
        client.kernel(rig.plan.address4(0, flow.slot) if client.to == 80 else rig.plan.address6(0, flow.slot), RST)
    gone(rig, *flows)
    assert ends(rig) == dict.fromkeys((80, 81), "policy_changed: default deny")


def test_a_flow_that_is_held_is_refused(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    client.send(SYN)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.change_rules([])
    assert rig.asked() == [Abort(prepare.slot)]
    (answer,) = client.received()
    assert answer.flags & RST
    assert ends(rig) == {80: "policy_changed: default deny"}
    rig.say_upgrader(Connected(prepare.slot, 1))
    assert rig.asked() == [Abort(prepare.slot)]
    assert client.inside() == []
    assert rig.balanced()


ELSEWHERE = bytes([192, 0, 2, 7])


@pytest.mark.parametrize(
    ("routes", "reason"),
    [
        ([route("f4", "default4", "0.0.0.0/0")], None),
        ([route("f4", "default4", "0.0.0.0/0"), route("aa", "finer", "203.0.113.0/24")], None),
        ([route("f5", "renamed", "0.0.0.0/0")], None),
        ([route("f4", "default4", "0.0.0.0/0", egress4=ELSEWHERE)], "route_changed: default4"),
        (
            [route("f4", "default4", "0.0.0.0/0"), route("aa", "hole2", "203.0.113.5/32", "blackhole")],
            "route_changed: blackhole",
        ),
        ([], "route_changed: no_route"),
    ],
)
def test_routes(rig: FlowRig, routes: list[object], reason: str | None) -> None:
    client = Client(rig, Framing.RAW, 4)
    flow, slot = established(client)
    rig.change_routes(*routes)  # type: ignore[arg-type]
    assert rig.asked() == ([Abort(flow.slot)] if reason else [])
    if reason:
        client.kernel(slot, RST, 9001)
        gone(rig, flow)
    assert ends(rig) == ({80: reason} if reason else {})


def who(groups: tuple[str, ...], posture: dict[str, str]) -> TunnelContext:
    return msgspec.structs.replace(context(), groups=groups, posture=posture)


@pytest.mark.parametrize(
    ("after", "ended"),
    [
        (who(("staff",), {"disk": "encrypted"}), {}),
        (who((), {"disk": "encrypted"}), {80: "device_changed: default deny"}),
        (who(("staff",), {"disk": "clear"}), {143: "device_changed: default deny"}),
        (who(("staff", "more"), {"disk": "encrypted", "os": "new"}), {}),
    ],
    ids=["nothing", "group lost", "posture lost", "more"],
)
def test_a_device_that_changes(rig: FlowRig, after: TunnelContext, ended: dict[int, str]) -> None:
    """One tunnel's flows are reviewed; another device's are left alone."""
    web = msgspec.structs.replace(STAFF, when=f"net.port == 80 && {STAFF.when}")
    mail = msgspec.structs.replace(HEALTHY, when=f"net.port == 143 && {HEALTHY.when}")
    rig.change_rules(policy(web, mail))
    sock = rig.tunnel(who=who(("staff",), {"disk": "encrypted"}))
    flows: dict[int, Prepare] = {}
    for port in (80, 143):
        sock.send(segment(DEVICE4, SERVER4, 40000, port, 1, 0, SYN))
        (prepare,) = rig.asked()
        assert isinstance(prepare, Prepare)
        flows[port] = prepare
    rig.said_to_parent()
    rig.say_onramp(Recontext(1, after))
    assert {message.slot for message in rig.asked() if isinstance(message, Abort)} == {flows[at].slot for at in ended}
    assert ends(rig) == ended
    told = [message.context for message in rig.said_to_parent() if isinstance(message, control.TunnelOpened)]
    assert told == ([after] if after != who(("staff",), {"disk": "encrypted"}) else [])
    # What is new counts for new flows, and for whoever asks.
    sock.send(segment(DEVICE4, SERVER4, 40001, 80, 1, 0, SYN))
    assert len(rig.asked()) == ("staff" in after.groups)
    rig.say_onramp(Hello("onramp", 0, 1 << 62))
    (held,) = (message for message in rig.told() if isinstance(message, Held))
    assert held.context == after


@pytest.mark.parametrize(
    "other",
    [
        context(tenant="00000000-0000-4000-8000-00000000000b"),
        context(device="phone"),
        context(addresses=[DEVICE4]),
        msgspec.structs.replace(context(), virtual_network_id="another"),
    ],
    ids=["tenant", "device", "addresses", "network"],
)
def test_a_tunnel_never_becomes_another_devices(rig: FlowRig, other: TunnelContext) -> None:
    client = Client(rig, Framing.RAW, 4)
    flow, _ = established(client)
    rig.told()
    rig.say_onramp(Recontext(1, other))
    assert rig.asked() == [Abort(flow.slot)]
    assert TunnelClosed(1, "context_refused") in rig.told()
    assert ends(rig) == {80: "tunnel_closed"}


def test_a_context_of_a_tunnel_that_is_gone_is_nothing(rig: FlowRig) -> None:
    rig.say_onramp(Recontext(7, context()))
    assert 7 not in rig.worker.tunnels


class Clock:
    """Moves on by a tenth of a slice whenever it is read."""

    def __init__(self) -> None:
        self.now = 0

    def monotonic_ns(self) -> int:
        self.now += review_module.SLICE // 10
        return self.now


def test_packets_go_on_between_slices_and_late_changes_starve_nobody(
    rig: FlowRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred flows of two tunnels, at eleven a turn; a packet of one that stays is taken in each turn."""
    socks = [rig.tunnel(), rig.tunnel(who=context(device="phone"))]
    for sock in socks:
        for port in range(50):
            sock.send(segment(DEVICE4, SERVER4, 40000 + port, 80 if port == 49 else 1000 + port, 1, 0, SYN))
    rig.until(lambda: rig.worker.flow_count == 100)
    rig.asked()
    review = rig.worker.review
    monkeypatch.setattr(review_module, "time", Clock())
    web = policy(RuleSource("web", "net.port == 80", "allow"))
    # Reviews are begun by hand: the rules are in force already.
    real, review.everything = review.everything, lambda: None  # type: ignore[method-assign]
    rig.change_rules(web)
    review.everything = real  # type: ignore[method-assign]
    review.everything()
    left = []
    before = rig.count("received")
    while review.pending:
        socks[1].send(segment(DEVICE4, SERVER4, 40049, 80, 1, 0, SYN))
        rig.worker.turn(0)
        left.append([len(tunnel.flows) for tunnel in rig.worker.tunnels.values()])
        if len(left) == 3:
            # A change in the midst of the first tunnel: the second one's turn doesn't wait for its second one.
            review.everything()
    assert rig.count("received") - before == len(left)
    assert all(sum(was) - sum(now) <= 11 for was, now in pairwise(left))
    assert left[-1] == [1, 1]
    assert set(ends(rig).values()) == {"policy_changed: default deny"}
    assert 10 <= len(left) <= 16


def test_a_reader_sees_the_new_rule_whole(rig: FlowRig) -> None:
    """The live table's rule and route are replaced in place, and cut like the first ones."""
    client = Client(rig, Framing.RAW, 4)
    established(client)
    long = "r" * 100
    rig.change_rules([PolicySource(TENANT, long, 0, [RuleSource(long, "true", "allow")])])
    assert live(rig) == {80: f"{long}/{long}"[:RULE_BYTES]}
    rig.change_rules(ALLOW_WEB)
    assert live(rig) == {80: "main/all"}


def test_answers_stay_readable(rig: FlowRig) -> None:
    """Nothing but resets is said to a client whose held flow ends."""
    client = Client(rig, Framing.RAW, 4)
    client.send(SYN)
    rig.asked()
    rig.change_rules([])
    (data,) = read(client.sock)
    packet = parse(data, 0, len(data))
    assert (packet.flags & RST, packet.acknowledgment) == (RST, 1001)


def denied_by_rule(pair: Pair) -> str:
    for rig in pair.rigs:
        rig.change_rules(policy(RuleSource("no-nas", 'net.dst_device == "nas"', "deny")))
    return "policy_changed: new/no-nas"


def owner_changed(pair: Pair) -> str:
    """The rule asks for the destination's owner, whom the router writes into the route."""
    nas = msgspec.structs.replace(device("nas"), user="eve")
    for rig in pair.rigs:
        rig.change_routes(own(nas, "100.96.0.3/32"))
    return "policy_changed: default deny"


def moved(pair: Pair) -> str:
    for rig in pair.rigs:
        rig.change_routes()
    return "route_changed: no_route"


@pytest.mark.parametrize("change", [denied_by_rule, owner_changed, moved])
@pytest.mark.parametrize("workers", [1, 2])
def test_flows_between_devices(tmp_path: Path, workers: int, change: Callable[[Pair], str]) -> None:
    """They end with the reason; a datagram that still comes is answered, and none comes through from either side."""
    there, back = (LAPTOP[4], NAS[4]), (NAS[4], LAPTOP[4])
    with between(tmp_path, workers) as pair:
        connected(pair, 4)
        pair.laptop.send(datagram(*there, 40000, 53, b"question"))
        assert len(pair.nas.bodies()) == 1
        reason = change(pair)
        pair.step()
        assert {record.reason for record in pair.records() if record.event == "ended"} == {reason}
        assert (pair.flows(), pair.passages()) == (0, 0)
        pair.laptop.bodies()
        pair.nas.bodies()
        pair.laptop.send(datagram(*there, 40000, 53, b"again"))
        (answer,) = (packet for packet, _ in pair.laptop.received())
        assert answer.icmp_type == 3
        assert (answer.icmp_code == 13) is (change is not moved)
        pair.nas.send(datagram(*back, 53, 40000, b"late"))
        assert pair.laptop.bodies() == []
        assert pair.balanced()
