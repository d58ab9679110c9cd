"""Measures Falkirk against the machine's limits and its peers. Every figure is a median over interleaved rounds, every ratio of one run.

    lift      throughput, connections, round trips, against raw veth, loopback and peers
    raw1500   plain packets of 1,500 bytes, against nothing batched
    udp       datagrams of 1,400 bytes, against peers
    pps       small packets through one worker
    flows     what a flow costs where there are 10,000 rules and 100,000 routes
    wireguard the node as a WireGuard server, against wireguard-go

Progress goes to standard error. Needs root.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from tools import bench_flows, bench_lift, bench_pps, bench_raw, bench_report, bench_udp, bench_wireguard
from tools.bench_stage import say
from tools.netlab import LabError, guard_signals

BENCHES = {"raw1500": bench_raw, "udp": bench_udp, "pps": bench_pps, "flows": bench_flows, "wireguard": bench_wireguard}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, module in ({"lift": bench_lift} | BENCHES).items():
        one = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.add_argument(
            "--rounds", type=int, default=3, help="interleaved rounds, at least 3 for a result to be quoted"
        )
        one.add_argument("--seconds", type=float, default=2, help="length of each measurement")
        if name == "lift":
            one.add_argument(
                "--peers-only", action="store_true", help="leave Falkirk out: what the machine and the peers give"
            )
    arguments = parser.parse_args()
    guard_signals()
    for tool in ("ip", "iperf3", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            say(f"{tool} is missing")
            return 2
    try:
        if arguments.what == "lift":
            result = bench_lift.bench(arguments.rounds, arguments.seconds, without_falkirk=arguments.peers_only)
            text = bench_report.show(result)
        else:
            module = BENCHES[arguments.what]
            result = module.bench(arguments.rounds, arguments.seconds)
            text = f"{module.show(result)}\n\n{_stands_on(result)}"
    except LabError as error:
        say(str(error))
        return 1
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0


def _stands_on(result: dict[str, object]) -> str:
    """What the figures stand on, for people."""
    baseline, configuration = result["baseline"], result["configuration"]
    assert isinstance(baseline, dict)
    assert isinstance(configuration, dict)
    return (
        f"medians of {configuration['rounds']} rounds of {configuration['seconds']:g} s; {configuration['rules']:,} rules, "
        f"{configuration['routes']:,} routes, {baseline['congestion_control']}, kernel {baseline['kernel']}, "
        f"{baseline['cpus']} processors; {bench_report.interpreter(baseline)}"
    )


if __name__ == "__main__":
    sys.exit(main())
