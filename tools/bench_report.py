"""The bench's result: one object for programs, a table with ratios for people. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Medians = Mapping[str, Mapping[str, float]]


def _ratio(value: float | None, of: float | None) -> float | None:
    """To three digits; None where either is missing."""
    return round(value / of, 3) if value is not None and of else None


def _throughput(of: Mapping[str, float], veth: Mapping[str, float], direction: str, streams: int) -> dict[str, Any]:
    """Both directions are compared with the veth's forward rate of as many connections: the limit on this machine."""
    value = of.get(f"{direction}_{streams}")
    return {
        "gbit_s": None if value is None else round(value, 3),
        "of_veth": _ratio(value, veth.get(f"forward_{streams}")),
    }


def _contestant(of: Mapping[str, float], medians: Medians) -> dict[str, Any]:
    """Everything that was measured of one."""
    veth, loopback = medians["veth"], medians["loopback"]
    connections, p50, p99, messages = (of.get(key) for key in ("connections", "rtt_p50", "rtt_p99", "messages"))
    return {
        "forward": _throughput(of, veth, "forward", 1),
        "reverse": _throughput(of, veth, "reverse", 1),
        "eight": {
            "forward": _throughput(of, veth, "forward", 8),
            "reverse": _throughput(of, veth, "reverse", 8),
        },
        "connections": {
            "per_s": None if connections is None else round(connections),
            "of_loopback": _ratio(connections, loopback["connections"]),
            "cpu_us": {key[4:]: round(value, 1) for key, value in of.items() if key.startswith("cpu:")},
            "kernel_us": {key[7:]: round(value, 1) for key, value in of.items() if key.startswith("kernel:")},
        },
        "rtt_us": {
            "p50": None if p50 is None else round(p50, 1),
            "p99": None if p99 is None else round(p99, 1),
            "of_loopback_p50": _ratio(p50, loopback["rtt_p50"]),
        },
        "small_packets": {
            "messages_per_s": None if messages is None else round(messages),
            "of_loopback": _ratio(messages, loopback["messages"]),
        },
    }


def report(
    medians: Medians,
    failed: Mapping[str, int],
    gave_up: Mapping[str, int],
    baseline: Mapping[str, Any],
    shape: Mapping[str, Any],
) -> dict[str, Any]:
    """Medians by contestant and measurement, turned into the bench's JSON object."""
    veth, loopback = medians["veth"], medians["loopback"]
    peers = {
        name: _contestant(of, medians) for name, of in medians.items() if name not in {"veth", "loopback", "falkirk"}
    }
    against = _against(medians.get("falkirk", {}), peers)
    own = _contestant(medians.get("falkirk", {}), medians)
    for direction in ("forward", "reverse"):
        own[direction]["of_best_peer"] = against.get(direction)
    if own["connections"]["cpu_us"]:
        own["connections"]["of_loopback_without_python"] = _without_python(
            own["connections"], loopback, baseline["cpus"]
        )
    return {
        "veth_gbit_s": round(veth["forward_1"], 3),
        **own,
        "peers": peers,
        "veth": {key: round(value, 1) for key, value in veth.items()},
        "loopback": {key: round(value, 1) for key, value in loopback.items()},
        "failed_connections": dict(failed),
        "failed_measurements": dict(gave_up),
        "against_best_peer": against,
        "baseline": dict(baseline),
        "configuration": dict(shape),
    }


def _without_python(connections: Mapping[str, Any], loopback: Mapping[str, float], processors: int) -> float | None:
    """What connections/s over loopback's could be at most, did the interpreter take no time at all: what remains is the kernel's part, and the
    load's. Holds where all processors are busy, as they are on a machine of two."""
    python = sum(connections["cpu_us"].values()) - sum(connections["kernel_us"].values())
    everything = processors * 1e6 / connections["per_s"]
    return _ratio(processors * 1e6 / max(everything - python, 1e-9), loopback["connections"])


def _against(falkirk: Mapping[str, float], peers: Mapping[str, Any]) -> dict[str, Any]:
    """Falkirk's figures over the best peer's; for the round trip below 1 is better."""
    if not peers or not falkirk:
        return {}
    best = {
        key: max((peer[key]["gbit_s"] for peer in peers.values() if peer[key]["gbit_s"]), default=None)
        for key in ("forward", "reverse")
    }
    connections = max(
        (peer["connections"]["per_s"] for peer in peers.values() if peer["connections"]["per_s"]), default=None
    )
    round_trip = min((peer["rtt_us"]["p50"] for peer in peers.values() if peer["rtt_us"]["p50"]), default=None)
    return {
        "forward": _ratio(falkirk.get("forward_1"), best["forward"]),
        "reverse": _ratio(falkirk.get("reverse_1"), best["reverse"]),
        "connections": _ratio(falkirk.get("connections"), connections),
        "rtt_p50": _ratio(falkirk.get("rtt_p50"), round_trip),
    }


COLUMNS = (
    "",
    "forward",
    "of veth",
    "reverse",
    "of veth",
    "8 fwd",
    "8 rev",
    "conn/s",
    "of lo",
    "rtt p50",
    "p99",
    "msg/s",
)


def _row(name: str, of: Mapping[str, Any]) -> tuple[Any, ...]:
    eight, connections, round_trip = of["eight"], of["connections"], of["rtt_us"]
    return (
        name,
        *(of["forward"][key] for key in ("gbit_s", "of_veth")),
        *(of["reverse"][key] for key in ("gbit_s", "of_veth")),
        *(eight[key]["gbit_s"] for key in ("forward", "reverse")),
        *(connections[key] for key in ("per_s", "of_loopback")),
        *(round_trip[key] for key in ("p50", "p99")),
        of["small_packets"]["messages_per_s"],
    )


def interpreter(baseline: Mapping[str, Any]) -> str:
    """The Python that it ran on, and the processor."""
    python = baseline["python"]
    how = "" if python["optimised"] else ", built WITHOUT optimisation (half the speed)"
    return f"{baseline['cpu_model']}; Python {python['version']}{how}"


def show(result: Mapping[str, Any]) -> str:
    """For people."""
    baseline, shape, veth, loopback = (result[key] for key in ("baseline", "configuration", "veth", "loopback"))
    on = [name for name, value in baseline["offloads"].items() if value]
    rows: list[tuple[Any, ...]] = [COLUMNS]
    if result["forward"]["gbit_s"] is not None:
        rows.append(_row("falkirk", result))
    rows += [_row(name, peer) for name, peer in result["peers"].items()]
    limit = (veth["forward_1"], 1, veth["reverse_1"], "", veth["forward_8"], veth["reverse_8"])
    rows.append(("raw veth", *limit, veth["connections"], "", veth["rtt_p50"], veth["rtt_p99"], veth["messages"]))
    own = (loopback["connections"], 1, loopback["rtt_p50"], loopback["rtt_p99"], loopback["messages"])
    rows.append(("loopback", "", "", "", "", "", "", *own))
    widths = [max(len(_cell(row[column])) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(_cell(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [
        "",
        f"Gbit/s of payload, connections and 64-byte messages a second, round trips in microseconds; medians of {shape['rounds']} rounds.",
        f"baseline: veth, MTU {baseline['mtu']}, {baseline['congestion_control']}, offloads {', '.join(on) or 'unknown'}; "
        f"kernel {baseline['kernel']}, {baseline['cpus']} processors; " + interpreter(baseline),
        f"falkirk: default configuration, {shape['rules']} rules, {shape['routes']} routes, {shape['framing']} framing by {shape['transport']}",
    ]
    if result["against_best_peer"]:
        against = ", ".join(f"{key} {value}" for key, value in result["against_best_peer"].items())
        lines.append(f"falkirk / best peer: {against}")
    spent = {name: value for name, value in result["connections"].get("cpu_us", {}).items() if value >= 1}
    if spent:
        kernel = result["connections"]["kernel_us"]
        said = ", ".join(
            f"{name} {value:.0f} ({kernel.get(name, 0):.0f} in the kernel)"
            for name, value in sorted(spent.items(), key=lambda item: -item[1])
        )
        lines.append(f"processor time of a connection, us: {said}")
        lines.append(
            f"connections/loopback were it not for Python's share: {result['connections']['of_loopback_without_python']}"
        )
    failures = {name: count for name, count in result["failed_connections"].items() if count}
    if failures:
        lines.append(f"failed connections: {failures}")
    if result["failed_measurements"]:
        lines.append(f"measurements that gave nothing: {result['failed_measurements']}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return (
        "-"
        if value is None
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
