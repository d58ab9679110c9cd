"""The bench's arithmetic and the shape of its JSON."""

from __future__ import annotations

import json

from tools.bench_report import report, show

VETH = {"forward_1": 40.0, "reverse_1": 38.0, "forward_8": 30.0, "reverse_8": 30.0}
LOAD = {"connections": 20_000.0, "rtt_p50": 60.0, "rtt_p99": 100.0, "messages": 100_000.0}
FALKIRK = {"forward_1": 16.0, "reverse_1": 14.0, "forward_8": 15.0, "reverse_8": 12.0}
SLOW = {
    "connections": 5_000.0,
    "rtt_p50": 150.0,
    "rtt_p99": 240.0,
    "messages": 40_000.0,
    "cpu:flow.worker": 300.0,
    "kernel:flow.worker": 100.0,
}
PEER = {"forward_1": 4.0, "reverse_1": 7.0, "forward_8": 4.0, "reverse_8": 7.0}
MEDIANS = {"veth": VETH | LOAD, "loopback": LOAD, "falkirk": FALKIRK | SLOW, "pasta": PEER | LOAD}
BASELINE = {
    "mtu": 1500,
    "offloads": {"tcp-segmentation-offload": True},
    "congestion_control": "reno",
    "kernel": "6",
    "cpus": 2,
    "cpu_model": "A processor",
    "python": {"version": "3.11.2", "optimised": False},
}
SHAPE = {"rules": 1000, "routes": 10_000, "framing": "vnet", "transport": "device", "rounds": 3, "seconds": 3.0}


def test_ratios_are_of_the_veth_and_of_loopback() -> None:
    result = report(MEDIANS, {"falkirk": 0}, {}, BASELINE, SHAPE)
    assert result["veth_gbit_s"] == 40.0
    assert result["forward"] == {"gbit_s": 16.0, "of_veth": 0.4, "of_best_peer": 4.0}
    assert result["reverse"] == {"gbit_s": 14.0, "of_veth": 0.35, "of_best_peer": 2.0}
    assert result["eight"]["forward"] == {"gbit_s": 15.0, "of_veth": 0.5}
    assert result["connections"] == {
        "per_s": 5000,
        "of_loopback": 0.25,
        "cpu_us": {"flow.worker": 300.0},
        "kernel_us": {"flow.worker": 100.0},
        # 400 us on two processors, 200 of them Python's.
        "of_loopback_without_python": 0.5,
    }
    assert result["rtt_us"] == {"p50": 150.0, "p99": 240.0, "of_loopback_p50": 2.5}
    assert result["small_packets"] == {"messages_per_s": 40_000, "of_loopback": 0.4}
    assert result["against_best_peer"] == {"forward": 4.0, "reverse": 2.0, "connections": 0.25, "rtt_p50": 2.5}
    assert set(result["peers"]["pasta"]) >= {"forward", "reverse", "connections", "rtt_us"}
    json.dumps(result)


def test_without_falkirk_or_peers_there_are_no_ratios_to_them() -> None:
    result = report({"veth": VETH | LOAD, "loopback": LOAD}, {}, {}, BASELINE, SHAPE)
    assert result["forward"] == {"gbit_s": None, "of_veth": None, "of_best_peer": None}
    assert result["peers"] == {}
    assert result["against_best_peer"] == {}


def test_the_table_has_a_row_for_everyone_and_says_what_was_measured() -> None:
    shown = show(report(MEDIANS, {"pasta": 3}, {}, BASELINE, SHAPE))
    for text in (
        "falkirk",
        "pasta",
        "raw veth",
        "loopback",
        "MTU 1500, reno",
        "1000 rules, 10000 routes",
        "{'pasta': 3}",
        "WITHOUT optimisation",
        "flow.worker 300 (100 in the kernel)",
    ):
        assert text in shown
