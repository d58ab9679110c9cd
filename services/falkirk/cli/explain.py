"""`falkirk explain`: what would become of a packet, asked of every stage that would judge it. Nothing is sent.

Four questions: the on-ramp (would this device be admitted, as whom?), the router (which route covers the destination?), policy (which rule
decides?), and the flow tracker (all of it, stage by stage, by the functions and from the replicas that packets are judged by). The answers of owners and
of the flow tracker agree unless a change is under way or an owner is away; then the flow tracker's is what happens. A service that doesn't answer is
one stage's error, not the end of the others.

The packet is made of options (a SYN, unless they say otherwise), or read from a capture: `--packet FILE` takes pcap and pcapng, as tcpdump, Wireshark
or `falkirk capture` write them, and each packet is judged as if the device had sent it, by itself.

Exit status: 0 where every packet would get on, 1 where one wouldn't, 2 for wrong usage, 3 where a stage that decides couldn't be asked. With --json one
object: {"outcome", "onramp", "router", "policy", "flow"}, each the service's answer in protobuf's JSON, {"error": {"code", "reason", "message"}}, or
null where it wasn't asked; with --packet {"outcome", "onramp", "packets": [{"number", "outcome", "router", "policy", "flow"}]}, whose outcome is
`passes` where all of them get on, else the first other one. Outcomes are those of FlowService.Explain; `refused` where the device
wouldn't be admitted; `unknown` where nobody could say.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from falkirk.cli.questions import Answers, Flow, Questions, flow_of
from falkirk.wire.probe import completed, probe
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP
from falkirk.wire.protocol import number as protocol_number

UNREACHED: Final = 3
PASSES: Final = frozenset(("lift", "forward", "flow", "wait"))
"""Outcomes of what gets on."""
FLAGS: Final = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32, "E": 64, "C": 128}
PACKETS: Final = 100
SOURCE_PORT: Final = 49152


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("explain")(explain)


def explain(
    tenant: Annotated[str, typer.Option(help="The tenant's name.")],
    device: Annotated[str, typer.Option(help="The device's name.")],
    dst: Annotated[str, typer.Option(help="The destination address.")] = "",
    port: Annotated[
        int, typer.Option("--port", "--dport", min=0, max=65535, help="The destination port; ICMP has none.")
    ] = 0,
    protocol: Annotated[
        str, typer.Option("--protocol", "--proto", help="tcp, udp, icmp (either family's), another name, or a number.")
    ] = "tcp",
    src: Annotated[str, typer.Option(help="The source address; the device's own if not given.")] = "",
    sport: Annotated[
        int, typer.Option(min=0, max=65535, help="The source port; of ICMP the identifier.")
    ] = SOURCE_PORT,
    ttl: Annotated[int, typer.Option(min=0, max=255, help="TTL or hop limit.")] = 64,
    flags: Annotated[str, typer.Option(help="TCP flags, by their letters (FSRPAUEC).")] = "S",
    length: Annotated[int, typer.Option(min=0, max=65535, help="Bytes of the packet; 0 takes its headers alone.")] = 0,
    df: Annotated[bool, typer.Option("--df/--no-df", help="IPv4: don't fragment.")] = True,
    packet: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Judge the packets of this capture instead.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="With --packet: the first so many.")] = PACKETS,
    fix_checksums: Annotated[
        bool, typer.Option("--fix-checksums", help="With --packet: as if the device had completed checksums.")
    ] = False,
    virtual_network: Annotated[str, typer.Option(help="Virtual network; the device's own if not given.")] = "",
    run_dir: Annotated[Path | None, typer.Option(help="Sockets of the mesh. [$FALKIRK_RUN_DIR]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell what would become of a packet, stage by stage; nothing is sent."""
    where = _run_dir(run_dir)
    if packet is None:
        destination = _address(dst, "--dst")
        number = _number(protocol, destination.version)
        source = _address(src, "--src") if src else None
        if source is not None and source.version != destination.version:
            raise typer.BadParameter("source and destination are of two families", param_hint="--src")
        if not port and number in (TCP, UDP):
            raise typer.BadParameter("a destination port from 1 to 65535 is needed", param_hint="--port")
        bits = _flags(flags)
        questions = Questions(where, tenant, device, virtual_network)
        whose = source.packed if source is not None else questions.address(destination.version)
        ends = (whose, destination.packed, sport, port)
        made = probe(number, *ends, ttl=ttl, flags=bits, length=length, dont_fragment=df) if whose else b""
        answers = questions.about(Flow(str(destination), port, number), made)
        outcome = _outcome(answers)
        _say(as_json, {"outcome": outcome} | _plain_all(answers), render(answers))
    else:
        if dst or src or port:
            raise typer.BadParameter("addresses and ports are the packets' own", param_hint="--packet")
        chosen = _read(packet, count, fix_checksums=fix_checksums)
        questions = Questions(where, tenant, device, virtual_network)
        judged = [questions.about(flow_of(data), data) for data in chosen]
        outcomes = [_outcome(answers) for answers in judged]
        outcome = next((one for one in outcomes if one not in PASSES), "passes")
        told = [
            {"number": place, "outcome": one} | {name: _plain(answers[name]) for name in ("router", "policy", "flow")}
            for place, (one, answers) in enumerate(zip(outcomes, judged, strict=True), start=1)
        ]
        whole = {"outcome": outcome, "onramp": _plain(questions.admission), "packets": told}
        _say(as_json, whole, _render_all(judged))
    good = outcome == "passes" or outcome in PASSES
    raise typer.Exit(UNREACHED if outcome == "unknown" else 0 if good else 1)


def _address(text: str, option: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _number(name: str, version: int) -> int:
    number = protocol_number(name)
    if not 0 <= number <= 255:
        raise typer.BadParameter(f"{name!r} is neither a protocol's name nor its number", param_hint="--protocol")
    return ICMPV6 if number == ICMP and version == 6 else number


def _flags(letters: str) -> int:
    unknown = set(letters.upper()) - set(FLAGS)
    if unknown:
        raise typer.BadParameter(f"flags are letters of {''.join(FLAGS)}", param_hint="--flags")
    return sum(FLAGS[letter] for letter in set(letters.upper()))


def _read(path: Path, count: int, *, fix_checksums: bool) -> list[bytes]:
    from falkirk.cli.packet_file import packets

    try:
        chosen = [data for _, data in islice(packets(path), count)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--packet") from error
    if not chosen:
        raise typer.BadParameter(f"{path}: no IP packet in it", param_hint="--packet")
    return [completed(data) for data in chosen] if fix_checksums else chosen


def _outcome(answers: Answers) -> str:
    refused = getattr(answers["onramp"], "admitted", True) is False
    return "refused" if refused else str(getattr(answers["flow"], "outcome", "unknown"))


def _say(as_json: bool, value: dict[str, Any], lines: Iterator[str]) -> None:
    typer.echo(msgspec.json.encode(value) if as_json else "\n".join(lines))


def _plain_all(answers: Answers) -> dict[str, Any]:
    return {name: _plain(answer) for name, answer in answers.items()}


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


def _render_all(judged: Sequence[Answers]) -> Iterator[str]:
    """For people: the on-ramp's answer once, then the stages of each packet."""
    yield from _render(judged[0], ("onramp",))
    for place, answers in enumerate(judged, start=1):
        yield f"packet {place}:"
        yield from list(_render(answers, ("flow",)))[1:]


def render(answers: Answers) -> Iterator[str]:
    """For people: a paragraph a service."""
    yield from _render(answers, ("onramp", "router", "policy", "flow"))


def _render(answers: Answers, services: Sequence[str]) -> Iterator[str]:
    for service in services:
        answer = answers[service]
        yield f"{service}:"
        if answer is None:
            refused = getattr(answers["onramp"], "admitted", True) is False
            unknown = isinstance(answers["onramp"], Exception)
            why = "the device wouldn't be admitted" if refused else "it can't begin a flow"
            why = "the on-ramp didn't answer" if unknown and service == "policy" else why
            yield f"  not asked: {why}"
        elif isinstance(answer, Exception):
            yield f"  no answer: {answer}"
        else:
            yield from (f"  {line}" for line in _LINES[service](answer))


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
        yield f"{'taken  ' if place == 0 else 'covered'} {route.prefix} by route {route.route} -> {'the resolver' if route.resolver else target_text(route)}"
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


_LINES: Final = {"onramp": _onramp, "router": _router, "policy": _policy, "flow": _flow}
