"""The JSON of the bench's subcommands, from medians that were made up: fields, ratios, and that people's text has every figure."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from falkirk.decide import rules as rule_table
from tools import bench_flood, bench_flows, bench_pps, bench_raw, bench_udp, bench_wireguard
from tools.bench_stage import Samples, attempt, medians, processor, python, ratio, resources, unrelated
from tools.netlab import LabError

BASELINE = {"cpu_model": "X", "python": python(), "kernel": "6", "cpus": 2, "congestion_control": "cubic"}
SHAPE = {"rules": 1000, "routes": 10_000, "rounds": 3, "seconds": 2.0, "took_s": 1.0}


def test_raw1500() -> None:
    sides = {"forward": 3.0, "reverse": 2.0, "forward_cpu": 0.1, "reverse_cpu": 0.2}
    slow = {"forward": 1.0, "reverse": 1.0, "forward_cpu": 0.4, "reverse_cpu": 0.4}
    result = bench_raw.report({"batched": sides, "unbatched": slow}, BASELINE, SHAPE)
    assert (result["gbit_s"], result["of_unbatched"]) == (3.0, 3.0)
    assert (result["reverse"]["gbit_s"], result["reverse"]["of_unbatched"]) == (2.0, 2.0)
    assert result["worker_cpu_of_unbatched"] == 0.25
    assert result["unbatched_gbit_s"] == {"forward": 1.0, "reverse": 1.0}
    json.dumps(result)
    assert "3.0" in bench_raw.show(result)


def test_udp() -> None:
    found = {
        "falkirk": {"forward": 2.0, "reverse": 3.0, "forward_lost": 0.1, "reverse_lost": 0.0},
        "pasta": {"forward": 1.0, "reverse": 1.5, "forward_lost": 0.2, "reverse_lost": 0.0},
        "slirp4netns": {"forward": 0.5, "forward_lost": 0.2},
        "veth": {"forward": 8.0, "reverse": 8.0, "forward_lost": 0.0, "reverse_lost": 0.0},
    }
    result = bench_udp.report(found, {"slirp4netns": 1}, BASELINE, SHAPE)
    assert result["gbit_s"] == 2.0
    assert result["of_peers"] == {"pasta": 2.0, "slirp4netns": 4.0}
    assert result["of_best_peer"] == 2.0
    assert result["reverse"]["of_peers"] == {"pasta": 2.0}
    json.dumps(result)
    shown = bench_udp.show(result)
    assert all(name in shown for name in ("falkirk", "pasta", "slirp4netns", "raw veth"))


def test_udp_without_a_peer() -> None:
    one = {"forward": 2.0, "reverse": 3.0, "forward_lost": 0.1, "reverse_lost": 0.0}
    result = bench_udp.report({"falkirk": one, "veth": one}, {}, BASELINE, SHAPE)
    assert (result["of_peers"], result["of_best_peer"]) == ({}, None)


def test_pps() -> None:
    many, single = (
        {"kpps": 260.04, "kpps_cpu": 300.0, "kernel": 0.314},
        {"kpps": 130.0, "kpps_cpu": 150.0, "kernel": 0.5},
    )
    found = {f"{kind}:{packed}": of for kind in bench_pps.KINDS for packed, of in ((40, many), (1, single))}
    found["ack:40"] = {"kpps": 195.0, "kpps_cpu": 200.0, "kernel": 0.6}
    result = bench_pps.report(found, BASELINE, SHAPE)
    assert (result["kpps_per_worker"], result["headline"]) == (260.0, "udp_mixed")
    for kind, kpps, of in (("udp_bursts", 260.0, 2.0), ("udp_mixed", 260.0, 2.0), ("ack", 195.0, 1.5)):
        assert result[kind]["kpps_per_worker"] == kpps
        assert result[kind]["unpacked"]["kpps_per_worker"] == 130.0
        assert result[kind]["of_unpacked"] == of
    json.dumps(result)
    shown = bench_pps.show(result)
    assert all(word in shown for word in ("260.0", "195.0", *bench_pps.KINDS))


def test_flows() -> None:
    found = {
        "setup": {"per_s": 2500.4, "failed": 0.0, "cpu:flow.worker": 80.0},
        "decision": {"p50": 20.0, "p99": 45.0},
        "steady": {"p50": 100.0, "p99": 150.0},
        "replacing": {"p50": 110.0, "p99": 900.0},
    }
    idle = {"flow.worker": 500.0, "upgrader.worker": 450.0}
    result = bench_flows.report(found, idle, BASELINE, SHAPE)
    assert (result["setup_per_s"], result["decision_us"], result["bytes_per_idle_flow"]) == (2500, 20.0, 950)
    assert result["setup_cpu_us"] == {"flow.worker": 80.0}
    json.dumps(result)
    assert "950 bytes" in bench_flows.show(result)


def test_the_configuration_is_of_valid_rules_and_distinct_routes() -> None:
    documents = list(resources(10_000, 100_000))
    prefixes = [one["spec"]["prefix"] for one in documents if one["kind"] == "Route"]
    assert len(set(prefixes)) == len(prefixes) == 100_000
    rules = [rule for one in documents if one["kind"] == "Policy" for rule in one["spec"]["rules"]]
    assert len(rules) == 10_000
    some = [rule_table.RuleSource(rule["name"], rule["when"], "allow") for rule in (*rules[:8], *rules[-8:])]
    assert rule_table.check(some) == []
    assert unrelated(9_999)["name"] == "rule-9999"


def test_a_failure_is_tried_once_more_and_a_second_one_ends_all_but_peers() -> None:
    samples: Samples = {}
    tries: Iterator[LabError | dict[str, float]] = iter(
        [LabError("once"), {"x": 1.0}, LabError("twice"), LabError("thrice"), LabError("4"), LabError("5")]
    )

    def sample() -> dict[str, float]:
        found = next(tries)
        if isinstance(found, LabError):
            raise found
        return found

    assert attempt(samples, "falkirk", sample)
    assert not attempt(samples, "pasta", sample, may_fail=True)
    with pytest.raises(LabError, match="5"):
        attempt(samples, "falkirk", sample)
    assert medians(samples) == {"falkirk": {"x": 1.0}}
    assert (ratio(1.0, None), ratio(None, 1.0), ratio(1.0, 3.0)) == (None, None, 0.333)


def test_the_machine_is_told() -> None:
    assert processor()
    assert set(python()) == {"version", "implementation", "optimised", "prefix"}


def floods() -> dict[str, dict[str, list[float]]]:
    """Samples of a bench."""
    transfer = {f"{one}:{key}": 1.0 for one in bench_flood.DIRECTIONS for key in ("gbit_s", "per_cpu_second")}
    flooded = {"per_s": 20_000.0, "cookie_replies": 5000.0, "cpu": 0.2, "lost": 0.0, "no_cookie": 6000.0}
    samples = {kind: {key: [value] for key, value in transfer.items()} for kind in bench_flood.KINDS}
    for kind in ("control", "strangers", "device"):
        samples[kind] |= {key: [value] for key, value in flooded.items()}
    samples["control"]["up:gbit_s"] = [0.8]
    samples["strangers"]["up:gbit_s"] = [0.72, 0.1, 0.9]
    return samples


def test_floods() -> None:
    result = bench_flood.report(floods())
    assert result["kept_of_control"] == {"strangers": {"up": 0.9, "down": 1.0}, "device": {"up": 1.25, "down": 1.0}}
    assert result["kept_of_quiet"]["strangers"] == {"up": 0.72, "down": 1.0}
    assert result["control_of_quiet"] == {"up": 0.8, "down": 1.0}
    json.dumps(result)
    shown = "\n".join(bench_flood.show(result))
    assert all(word in shown for word in ("0.9 / 1.0", "0.72 / 1.0", "6,000", "20%", *bench_flood.KINDS))


def test_wireguard() -> None:
    one = {f"{direction}{unit}": 1.0 for direction in bench_wireguard.DIRECTIONS for unit in ("", "_cpu")}
    found = {"falkirk": {key: 2 * value for key, value in one.items()}, bench_wireguard.DEBIAN: one}
    idle = {
        "bytes": {"onramp.worker": 2000.4, "flow": 500.0, "policy": 0.0},
        "cpu_s": {"onramp.worker": 0.9, "flow": 0.001},
        "enrolled_s": 20.0,
        "joined_s": 8.04,
    }
    handshakes = {"renewed": 5000.4, "first": 4000.0}
    small = {"kpps": 90.0, "kpps_per_cpu_second": 100.0}
    result = bench_wireguard.report(found, floods(), handshakes, small, idle, BASELINE, SHAPE)
    assert (result["pps"], result["small_packets"]["kpps_per_cpu_second"]) == (90_000, 100.0)
    against = result["of_debian_wireguard_go"]
    assert (against["throughput"], against["per_cpu_second"], result["of_newest_wireguard_go"]) == (2.0, 2.0, None)
    assert (result["bytes_per_idle_device"], result["bytes_by_process"]) == (2500, {"onramp.worker": 2000, "flow": 500})
    assert result["idle_cpu"] == {"seconds_a_minute": 0.9, "by_process": {"onramp.worker": 0.9}, "keepalive_s": 25}
    assert result["flood"]["kept_of_control"]["strangers"]["up"] == 0.9
    json.dumps(result)
    shown = bench_wireguard.show(result)
    assert all(word in shown for word in ("5,000", "2,500 bytes", "joined in 8.0 s", "strangers"))
