"""`falkirk explain`: what would become of a flow, asked of every stage that would decide it.

Four questions: the on-ramp (would this device be admitted, as whom?), the router (which route covers the destination?), policy (which rule
decides?), and the flow tracker (all of it, from the replicas that packets are decided by). The answers of owners and of the flow tracker agree unless a
change is under way or an owner is away; then the flow tracker's is what happens. A service that doesn't answer is one stage's error, not
the end of the others.

Exit status: 0 where the flow would pass, 1 where it wouldn't, 2 for wrong usage, 3 where a stage that decides couldn't be asked. With --json one
object: {"outcome", "onramp", "router", "policy", "flow"}, each the service's answer in protobuf's JSON, {"error": {"code", "reason", "message"}}, or
null where it wasn't asked. The outcome is `lift` or `forward` (to a device) where the flow would pass; `refused` where the device wouldn't be admitted; the flow tracker's
`answer_rst` (denied), `answer_unreachable` (no route) or `drop` (a blackhole) otherwise; `unknown` where nobody could say.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer

SECONDS: Final = 5.0
UNREACHED: Final = 3
PASSES: Final = ("lift", "forward")


Answers = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("explain")(explain)


def explain(
    tenant: Annotated[str, typer.Option(help="The tenant's name.")],
    device: Annotated[str, typer.Option(help="The device's name.")],
    dst: Annotated[str, typer.Option(help="The destination address.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The destination port; ICMP has none.")] = 0,
    protocol: Annotated[Literal["tcp", "udp", "icmp"], typer.Option(help="The protocol.")] = "tcp",
    virtual_network: Annotated[str, typer.Option(help="Virtual network; the device's own if not given.")] = "",
    run_dir: Annotated[Path | None, typer.Option(help="Sockets of the mesh. [$FALKIRK_RUN_DIR]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell what would become of a flow, stage by stage; nothing is sent."""
    try:
        destination = str(ipaddress.ip_address(dst))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dst") from error
    if not port and protocol != "icmp":
        raise typer.BadParameter("a destination port from 1 to 65535 is needed", param_hint="--port")
    answers = ask(_run_dir(run_dir), tenant, device, virtual_network, destination, port, protocol)
    refused = getattr(answers["onramp"], "admitted", True) is False
    outcome = "refused" if refused else getattr(answers["flow"], "outcome", "unknown")
    if as_json:
        typer.echo(
            msgspec.json.encode({"outcome": outcome, **{name: _plain(answer) for name, answer in answers.items()}})
        )
    else:
        typer.echo("\n".join(render(answers)))
    raise typer.Exit(UNREACHED if outcome == "unknown" else 0 if outcome in PASSES else 1)


def ask(
    run_dir: Path, tenant: str, device: str, virtual_network: str, destination: str, port: int, protocol: str
) -> Answers:
    """Each stage's response by service, or the FalkirkError that came instead."""
    from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc
    from falkirk.api.net.v1 import net_pb2
    from falkirk.api.onramp.v1 import onramp_service_pb2, onramp_service_pb2_grpc
    from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc
    from falkirk.api.router.v1 import router_service_pb2, router_service_pb2_grpc

    wanted = f"PROTOCOL_{protocol.upper()}"
    answers: Answers = {}
    answers["onramp"] = admission = _ask(
        run_dir,
        "onramp",
        lambda channel: onramp_service_pb2_grpc.OnrampServiceStub(channel).Explain,
        onramp_service_pb2.ExplainRequest(tenant=tenant, device=device, virtual_network=virtual_network),
    )
    refused = getattr(admission, "admitted", True) is False
    admitted = not refused and not isinstance(admission, Exception)
    context = admission.context if admitted else net_pb2.TunnelContext(tenant=tenant, device=device)
    answers["router"] = _ask(
        run_dir,
        "router",
        lambda channel: router_service_pb2_grpc.RouterServiceStub(channel).Explain,
        router_service_pb2.ExplainRequest(
            tenant=tenant, virtual_network=context.virtual_network or virtual_network, destination_address=destination
        ),
    )
    routes = getattr(answers["router"], "routes", ())
    if admitted:
        answers["policy"] = _ask(
            run_dir,
            "policy",
            lambda channel: policy_service_pb2_grpc.PolicyServiceStub(channel).Explain,
            policy_service_pb2.ExplainRequest(
                question=policy_service_pb2.Question(
                    context=context,
                    destination_address=destination,
                    destination_port=port,
                    protocol=wanted,
                    destination_device=routes[0].device if routes else None,
                )
            ),
        )
    else:
        answers["policy"] = None
    if refused:
        answers["flow"] = None
        return answers
    # Without the on-ramp's answer the flow tracker still knows whom an open tunnel speaks for.
    answers["flow"] = _ask(
        run_dir,
        "flow",
        lambda channel: flow_service_pb2_grpc.FlowServiceStub(channel).Explain,
        flow_service_pb2.ExplainRequest(
            tenant=tenant,
            device=device,
            destination_address=destination,
            destination_port=port,
            protocol=wanted,
            context=context if admitted else None,
        ),
    )
    return answers


def _ask(run_dir: Path, service: str, method: Callable[[Any], Any], request: Any) -> Any:
    import grpc

    from falkirk.runtime.client import sync_channel
    from falkirk.runtime.errors import FalkirkError, from_rpc

    try:
        with sync_channel(run_dir, service) as channel:
            return method(channel)(request, timeout=SECONDS)
    except grpc.RpcError as error:
        return from_rpc(error)
    except FalkirkError as error:
        return error


def _run_dir(given: Path | None) -> Path:
    from falkirk.runtime.settings import default_run_dir

    named = os.environ.get("FALKIRK_RUN_DIR")
    return given or (Path(named) if named else default_run_dir())


def _plain(answer: Any) -> Any:
    from google.protobuf import json_format

    if answer is None:
        return None
    if isinstance(answer, Exception):
        error: Any = answer
        return {"error": {"code": error.code.name, "reason": error.reason, "message": error.message}}
    return json_format.MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def render(answers: Answers) -> Iterator[str]:
    """For people: a paragraph a service."""
    for service, lines in (("onramp", _onramp), ("router", _router), ("policy", _policy), ("flow", _flow)):
        answer = answers[service]
        yield f"{service}:"
        if answer is None:
            why = (
                "the on-ramp didn't answer"
                if isinstance(answers["onramp"], Exception)
                else "the device wouldn't be admitted"
            )
            yield f"  not asked: {why}"
        elif isinstance(answer, Exception):
            yield f"  no answer: {answer}"
        else:
            yield from (f"  {line}" for line in lines(answer))


def _onramp(answer: Any) -> Iterator[str]:
    if not answer.admitted:
        yield f"refused: {answer.code}: {answer.message}"
        return
    context = answer.context
    yield f"admitted: device {context.device} of tenant {context.tenant}, virtual network {context.virtual_network}"
    yield f"addresses {', '.join(context.addresses)}; user {context.user or '-'}; groups {', '.join(context.groups) or '-'}"


def _router(answer: Any) -> Iterator[str]:
    from falkirk.cli.fields import target_text

    for place, route in enumerate(answer.routes):
        yield f"{'taken  ' if place == 0 else 'covered'} {route.prefix} by route {route.route} -> {target_text(route)}"
    if not answer.routes:
        yield "no route covers the destination"
    if answer.off_ramp:
        yield f"off-ramp: {answer.off_ramp}"


def _policy(answer: Any) -> Iterator[str]:
    verdict = answer.verdict
    yield f"{'allowed' if verdict.allowed else 'denied'}: {verdict.why} [{verdict.rule or 'default deny'}]"
    for rule in answer.rules:
        error = f" ({rule.error})" if rule.error else ""
        yield f"  {rule.outcome:<17} {rule.rule}: {rule.when}{error}"


def _flow(answer: Any) -> Iterator[str]:
    for stage in answer.stages:
        reference = f" [{stage.reference}]" if stage.reference else ""
        yield f"{'passed ' if stage.passed else 'stopped'} {stage.name}: {stage.detail}{reference}"
    yield f"outcome: {answer.outcome}"
