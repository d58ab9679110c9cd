"""Sessions of UDP that lead to the tenant's resolver. Its TCP is in tests/netns/test_resolver.py."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.decide.routes import RouteEntry
from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.linux import seqpacket
from falkirk.wire import asker, handover, icmp
from falkirk.wire.context import Framing
from falkirk.wire.handover import OpenSocket, Recontext, SocketFailed
from tests.flow_rig import TENANT, FlowRig, context
from tests.unit.flow.udp_client import FAMILIES, Client, unreachable

DENY = [PolicySource(TENANT, "main", 0, [RuleSource("mute", "net.port == 53", "deny")])]


def ways() -> list[RouteEntry]:
    """The servers of both families as resolvers."""
    return [
        RouteEntry("", "resolver", f"{socket.inet_ntop(kind, FAMILIES[family][1])}/{bits}", "resolver")
        for family, kind, bits in ((4, socket.AF_INET, 32), (6, socket.AF_INET6, 128))
    ]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path, policies=())
    rig.change_routes(*ways())
    yield rig
    rig.close()


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def client(request: pytest.FixtureRequest, rig: FlowRig) -> Iterator[Client]:
    client = Client(rig, *request.param)
    client.to = 53
    yield client
    client.close()


def opened(client: Client) -> socket.socket:
    """The resolver's end of a session that has asked `first`."""
    client.send(b"first")
    wish = client.wish()
    ours, theirs = seqpacket.pair()
    client.rig.give_socket(wish, theirs, local=0)
    assert seqpacket.receive(ours, 100) == (b"first", [])
    return ours


def test_the_resolver_is_told_who_asks_before_the_question(client: Client) -> None:
    client.send(b"first")
    wish = client.wish()
    said = asker.decode(wish.preface)
    assert (said.protocol, said.source, said.source_port) == (17, client.device, 40000)
    assert (said.destination, said.context) == (client.server, context())
    assert said.flow_id == wish.flow_id


def test_questions_and_replies_pass_as_they_are(client: Client) -> None:
    rig = client.rig
    with opened(client) as resolver:
        client.send(b"second", ttl=3)
        assert seqpacket.receive(resolver, 100) == (b"second", [])
        resolver.send(b"reply")
        ((packet, data),) = client.packets()
        assert (packet.source, packet.source_port, packet.destination_port) == (client.server, 53, 40000)
        assert data.endswith(b"reply")
        # Nothing can be asked in no bytes, which would read as the end.
        client.send(b"")
        assert seqpacket.receive(resolver, 100) is None
    assert rig.drops() == {"dns_malformed": 1}
    assert rig.balanced()


def test_a_reply_beyond_the_mtu_comes_in_fragments(client: Client) -> None:
    with opened(client) as resolver:
        resolver.send(bytes(4000))
        packets = client.packets()
        assert len(packets) == 3
        assert all(packet.is_fragment and packet.total_length <= 1500 for packet, _ in packets)


def test_a_resolver_that_goes_ends_the_session_and_the_next_question_begins_another(client: Client) -> None:
    rig = client.rig
    opened(client).close()
    rig.until(lambda: rig.worker.flow_count == 0)
    assert rig.records()[-1].reason == "resolver_lost"
    with opened(client):
        assert rig.worker.flow_count == 1


def test_where_no_resolver_is_the_port_looks_closed(client: Client) -> None:
    rig = client.rig
    client.send(b"first")
    rig.say_upgrader(SocketFailed(client.wish().token, errno.ECONNREFUSED))
    ((error, _),) = client.packets()
    assert (error.icmp_type, error.icmp_code) == unreachable(client, icmp.Unreachable.PORT)
    assert rig.records()[-1].reason == "resolver_away"
    assert rig.balanced()


def test_other_ports_look_closed_whatever_the_rules_say(client: Client) -> None:
    rig = client.rig
    rig.change_rules([PolicySource(TENANT, "main", 0, [RuleSource("all", "true", "allow")])])
    client.to = 54
    client.send(b"first")
    ((error, _),) = client.packets()
    assert (error.icmp_type, error.icmp_code) == unreachable(client, icmp.Unreachable.PORT)
    assert rig.records()[-1].reason == "not_dns"


def test_a_rule_that_denies_it_ends_what_there_is(client: Client) -> None:
    with opened(client):
        client.rig.change_rules(DENY)
        assert client.rig.records()[-1].reason == "policy_changed: main/mute"
        assert client.rig.worker.flow_count == 0


def test_a_device_that_is_another_now_is_told_anew_without_its_noticing(client: Client) -> None:
    rig = client.rig
    with opened(client) as resolver:
        changed = msgspec.structs.replace(context(), groups=("staff",))
        rig.say_onramp(Recontext(1, changed))
        rig.until(lambda: rig.worker.flow_count == 0)
        assert seqpacket.receive(resolver, 100) == (b"", [])
    client.send(b"first")
    assert asker.decode(client.wish().preface).context == changed
    assert client.packets(wait=False) == []


def test_what_a_device_says_of_itself_never_breaks_the_pair_to_the_upgrader(rig: FlowRig) -> None:
    """64 questions at once of a device with as many facts as the registry takes: its facts stay here, the questions go."""
    facts = {f"fact-{number}": "x" * 1024 for number in range(64)}
    client = Client(rig, Framing.RAW, 4, msgspec.structs.replace(context(), posture=facts))
    client.to = 53
    for port in range(40000, 40064):
        client.port = port
        client.sock.send(client.datagram(b"first"))
    wishes = [wish for wish in rig.asked() if isinstance(wish, OpenSocket)]
    assert len(wishes) == 64
    assert {len(asker.decode(wish.preface).context.posture) for wish in wishes} == {0}
    middling = [handover.OpenSocket(1, 17, bytes(4), 53, b"", 0, bytes(16), preface=bytes(asker.MAX))] * 64
    datagrams = list(handover.batches([*middling]))
    assert max(map(len, datagrams)) <= handover.MAX_DATAGRAM
    assert sum(len(handover.FLOW_TO_UPGRADER.decode(data)) for data in datagrams) == 64
    client.close()
