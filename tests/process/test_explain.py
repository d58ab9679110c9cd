"""`falkirk explain` against four small services: every stage's answer, and errors that stay their stage's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import dpkt
import grpc
import pytest
from typer.testing import CliRunner

from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc
from falkirk.api.net.v1 import net_pb2
from falkirk.api.onramp.v1 import onramp_service_pb2, onramp_service_pb2_grpc
from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc
from falkirk.api.registry.v1 import route_service_pb2
from falkirk.api.router.v1 import router_service_pb2, router_service_pb2_grpc
from falkirk.cli.main import app
from falkirk.runtime.errors import FalkirkError
from falkirk.wire.packet import Packet, parse, verify
from falkirk.wire.probe import probe

CONTEXT = net_pb2.TunnelContext(
    tenant="acme", device="laptop", virtual_network="default", addresses=["100.96.0.2"], groups=["eng"]
)


class Mesh(
    onramp_service_pb2_grpc.OnrampServiceServicer,
    router_service_pb2_grpc.RouterServiceServicer,
    policy_service_pb2_grpc.PolicyServiceServicer,
    flow_service_pb2_grpc.FlowServiceServicer,
):
    """Answers by the type of the question, and remembers the questions."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answers: dict[type[Any], Any] = {
            onramp_service_pb2.ExplainRequest: onramp_service_pb2.ExplainResponse(admitted=True, context=CONTEXT),
            router_service_pb2.ExplainRequest: router_service_pb2.ExplainResponse(
                routes=[
                    router_service_pb2.ResolvedRoute(
                        route="web",
                        prefix="192.0.2.0/24",
                        target=route_service_pb2.RouteTarget(internet=route_service_pb2.InternetTarget()),
                    )
                ],
                off_ramp="dials from 198.51.100.1",
            ),
            policy_service_pb2.ExplainRequest: policy_service_pb2.ExplainResponse(
                verdict=policy_service_pb2.Verdict(allowed=True, rule="web/http", why="net.port == 80"),
                rules=[policy_service_pb2.RuleTrace(rule="web/http", outcome="matched", when="net.port == 80")],
            ),
            flow_service_pb2.ExplainRequest: flow_service_pb2.ExplainResponse(
                outcome="lift",
                stages=[flow_service_pb2.Stage(name="route", passed=True, detail="192.0.2.0/24", reference="r1")],
            ),
        }

    def Explain(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(request)
        answer = self.answers[type(request)]
        if isinstance(answer, FalkirkError):
            context.set_trailing_metadata(answer.trailing_metadata())
            context.abort(answer.code, answer.message)
        return answer


COMMAND = ("explain", "--tenant", "acme", "--device", "laptop")


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def mesh(run_dir: Path) -> Iterator[Mesh]:
    found = Mesh()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    registrations: tuple[tuple[str, Callable[[Any, Any], None]], ...] = (
        ("onramp", onramp_service_pb2_grpc.add_OnrampServiceServicer_to_server),
        ("router", router_service_pb2_grpc.add_RouterServiceServicer_to_server),
        ("policy", policy_service_pb2_grpc.add_PolicyServiceServicer_to_server),
        ("flow", flow_service_pb2_grpc.add_FlowServiceServicer_to_server),
    )
    for service, register in registrations:
        register(found, server)
        (run_dir / "read").mkdir(exist_ok=True)
        server.add_insecure_port(f"unix:{run_dir}/read/{service}.sock")
    server.start()
    yield found
    server.stop(None).wait()


def explain(run_dir: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app,
        [
            *("explain", "--run-dir", str(run_dir), "--tenant", "acme", "--device", "laptop"),
            *("--dst", "192.0.2.7", "--port", "80", *options),
        ],
    )
    return result.exit_code, result.output


def test_every_stage_is_asked_for_the_admitted_context(mesh: Mesh, run_dir: Path) -> None:
    status, output = explain(run_dir)
    assert status == 0, output
    assert [line for line in output.splitlines() if not line.startswith(" ")] == [
        "onramp:",
        "router:",
        "policy:",
        "flow:",
    ]
    for text in (
        "admitted: device laptop of tenant acme, virtual network default",
        "taken   192.0.2.0/24 by route web -> internet",
        "off-ramp: dials from 198.51.100.1",
        "allowed: net.port == 80 [web/http]",
        "passed  route: 192.0.2.0/24 [r1]",
        "outcome: lift",
    ):
        assert text in output
    questions = {type(question).__module__.split("_")[0].rpartition(".")[2]: question for question in mesh.asked}
    assert questions["router"].virtual_network == "default"
    assert questions["policy"].question.context == CONTEXT
    assert questions["policy"].question.protocol == net_pb2.PROTOCOL_TCP
    assert (questions["flow"].context, questions["flow"].destination_port) == (CONTEXT, 80)


def test_json(mesh: Mesh, run_dir: Path) -> None:
    mesh.answers[flow_service_pb2.ExplainRequest] = flow_service_pb2.ExplainResponse(outcome="answer_rst")
    status, output = explain(run_dir, "--json")
    answer = json.loads(output)
    assert (status, answer["outcome"]) == (1, "answer_rst")
    assert answer["policy"]["verdict"]["rule"] == "web/http"
    assert answer["onramp"]["context"]["addresses"] == ["100.96.0.2"]


def test_an_error_stays_with_its_stage(mesh: Mesh, run_dir: Path) -> None:
    mesh.answers[onramp_service_pb2.ExplainRequest] = onramp_service_pb2.ExplainResponse(
        code="UNKNOWN_DEVICE", message="tenant acme has no device laptop"
    )
    mesh.answers[router_service_pb2.ExplainRequest] = FalkirkError(
        grpc.StatusCode.NOT_FOUND, "UNKNOWN_TENANT", "no acme"
    )
    mesh.answers[flow_service_pb2.ExplainRequest] = flow_service_pb2.ExplainResponse(outcome="drop")
    status, output = explain(run_dir)
    assert status == 1
    assert "refused: UNKNOWN_DEVICE: tenant acme has no device laptop" in output
    assert "no answer: UNKNOWN_TENANT: no acme" in output
    assert "not asked: the device wouldn't be admitted" in output


def test_without_a_mesh(run_dir: Path) -> None:
    status, output = explain(run_dir)
    assert status == 3
    assert output.count("SERVICE_UNREACHABLE") == 3


def test_a_name_is_not_a_destination(run_dir: Path) -> None:
    status, output = explain(run_dir, "--dst", "example.com")
    assert status == 2
    assert "--dst" in output


def asked_packets(mesh: Mesh) -> list[Packet]:
    return [
        parse(question.packet, 0, len(question.packet))
        for question in mesh.asked
        if isinstance(question, flow_service_pb2.ExplainRequest)
    ]


def test_a_whole_packet_is_made_of_options(mesh: Mesh, run_dir: Path) -> None:
    words = ("--sport", "7", "--ttl", "3", "--flags", "SA", "--length", "600", "--no-df")
    assert explain(run_dir, *words)[0] == 0
    (packet,) = asked_packets(mesh)
    assert (packet.source, packet.destination) == (bytes([100, 96, 0, 2]), bytes([192, 0, 2, 7]))
    assert (packet.source_port, packet.destination_port, packet.ttl, packet.flags) == (7, 80, 3, 18)
    assert (packet.total_length, packet.dont_fragment) == (600, False)


def test_without_an_address_to_speak_from_the_flow_is_asked_for(mesh: Mesh, run_dir: Path) -> None:
    """Of IPv6 the device has none: the flow tracker says so itself."""
    mesh.answers[flow_service_pb2.ExplainRequest] = flow_service_pb2.ExplainResponse(outcome="drop")
    result = CliRunner().invoke(app, [*COMMAND, "--run-dir", str(run_dir), "--dst", "2001:db8::7", "--port", "80"])
    assert result.exit_code == 1
    (question,) = (q for q in mesh.asked if isinstance(q, flow_service_pb2.ExplainRequest))
    assert (question.packet, question.destination_address) == (b"", "2001:db8::7")


@pytest.mark.parametrize("outcome", ["forward", "flow", "wait"])
def test_whatever_gets_on_is_success(mesh: Mesh, run_dir: Path, outcome: str) -> None:
    mesh.answers[flow_service_pb2.ExplainRequest] = flow_service_pb2.ExplainResponse(outcome=outcome)
    assert explain(run_dir)[0] == 0


def test_a_capture_is_judged_packet_by_packet(mesh: Mesh, run_dir: Path, tmp_path: Path) -> None:
    source, destination = bytes([100, 96, 0, 2]), bytes([192, 0, 2, 7])
    wrong = bytearray(probe(17, source, destination, 7, 53, length=100))
    wrong[26:28] = b"\x12\x34"
    sent = [probe(6, source, destination, 7, 443), bytes(wrong), b"\x45\0\0\x05"]
    path = tmp_path / "x.pcap"
    with path.open("wb") as file:
        writer = dpkt.pcap.Writer(file, linktype=101)
        for packet in sent:
            writer.writepkt(packet)

    def run(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*COMMAND, "--run-dir", str(run_dir), "--packet", str(path), *options])
        return result.exit_code, result.output

    status, output = run()
    assert status == 0, output
    assert [line for line in output.splitlines() if not line.startswith(" ")] == [
        "onramp:",
        "packet 1:",
        "packet 2:",
        "packet 3:",
    ]
    flows = [q for q in mesh.asked if isinstance(q, flow_service_pb2.ExplainRequest)]
    assert [question.packet for question in flows] == sent
    rules = [q.question for q in mesh.asked if isinstance(q, policy_service_pb2.ExplainRequest)]
    assert [(q.destination_port, q.protocol) for q in rules] == [
        (443, net_pb2.PROTOCOL_TCP),
        (53, net_pb2.PROTOCOL_UDP),
    ]
    mesh.asked.clear()
    mesh.answers[flow_service_pb2.ExplainRequest] = flow_service_pb2.ExplainResponse(outcome="answer_rst")
    status, output = run("--json", "--count", "2", "--fix-checksums")
    answer = json.loads(output)
    assert (status, answer["outcome"], len(answer["packets"])) == (1, "answer_rst", 2)
    assert answer["packets"][1]["policy"]["verdict"]["rule"] == "web/http"
    flows = [q for q in mesh.asked if isinstance(q, flow_service_pb2.ExplainRequest)]
    for question in flows:
        verify(question.packet, parse(question.packet, 0, len(question.packet)))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--dst", "192.0.2.7"),
        ("--dst", "192.0.2.7", "--port", "80", "--src", "fd00::2"),
        ("--dst", "192.0.2.7", "--port", "80", "--flags", "SX"),
        ("--dst", "192.0.2.7", "--protocol", "tpc"),
        ("--packet", "/nonexistent"),
        ("--packet", __file__),
        ("--packet", __file__, "--dst", "192.0.2.7"),
    ],
)
def test_wrong_usage(mesh: Mesh, run_dir: Path, words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*COMMAND, "--run-dir", str(run_dir), *words])
    assert result.exit_code == 2
    assert mesh.asked == []
