"""Wiring of the on-ramp's parent."""

from __future__ import annotations

import asyncio
import sys

from prometheus_client import Gauge

from falkirk.api.onramp.v1 import onramp_service_pb2_grpc
from falkirk.api.registry.v1 import registry_service_pb2 as registry
from falkirk.onramp import keys, parsers
from falkirk.onramp.admission import Grants
from falkirk.onramp.context import Code
from falkirk.onramp.control import PASSED, WIREGUARD
from falkirk.onramp.parent import Parent
from falkirk.onramp.presence import Reporter
from falkirk.onramp.service import OnrampService
from falkirk.onramp.settings import Settings
from falkirk.runtime import client, telemetry
from falkirk.runtime.metrics import CountersCollector
from falkirk.runtime.replica import ResourceReplica
from falkirk.runtime.roads import AlreadyRunning
from falkirk.runtime.server import Server
from falkirk.runtime.settings import SettingsError, Shell, arguments

KINDS = (registry.KIND_TENANT, registry.KIND_USER, registry.KIND_DEVICE, registry.KIND_VIRTUAL_NETWORK)
ADMISSIONS = ("admitted", "closed", *(code.value for code in Code))


async def serve(shell: Shell, settings: Settings) -> None:
    """Until SIGTERM."""
    server = Server("onramp", shell)
    parent = Parent(shell, settings, server.set_ready)
    channel = client.channel(shell, "registry")
    replica = ResourceReplica("resources", shell.data("onramp") / "replica", channel, KINDS, parent.on_change)
    reporter = Reporter(shell.node, parent, channel)
    service = OnrampService(
        parent,
        Grants(settings.grants(), settings.device_uids()),
        replica,
        lambda: [server.process(), *parent.processes()],
    )
    server.add(
        onramp_service_pb2_grpc.add_OnrampServiceServicer_to_server, service, "falkirk.api.onramp.v1.OnrampService"
    )

    def refusals() -> list[tuple[dict[str, str], int]]:
        counts = parent.counts()
        names = [code.value for code in Code] + [name for name in counts if name.startswith(WIREGUARD)]
        return [({"service": "onramp", "reason": name.lower()}, counts[name]) for name in names]

    server.metrics.register(
        CountersCollector(
            "falkirk_onramp_admissions",
            "Answers to producers (admitted, or the code of the refusal), and closed tunnels.",
            ("result",),
            lambda: [({"result": name}, count) for name, count in parent.counts().items() if name in ADMISSIONS],
        )
    )
    server.metrics.register(
        CountersCollector(
            "falkirk_drops",
            "Tunnels refused, and what comes by WireGuard and comes to nothing, by reason.",
            ("service", "reason"),
            refusals,
        )
    )
    server.metrics.register(
        CountersCollector(
            "falkirk_onramp_passed_on",
            "Datagrams that came to one worker and were given to another, whose device they are of.",
            (),
            lambda: [({}, parent.counts()[PASSED])],
        )
    )
    Gauge("falkirk_onramp_tunnels", "Open tunnels.", registry=server.metrics).set_function(lambda: len(parent.tunnels))
    await server.run(replica.run, parent.run, parent.expire, reporter.run)


def main() -> int:
    """Reads settings and serves; the exit status."""
    shell, settings = arguments("onramp", Settings)
    telemetry.setup("onramp", shell)
    try:
        parsers.load(settings.context_parser)
        asyncio.run(serve(shell, settings))
    except (SettingsError, AlreadyRunning, parsers.UnknownParser, keys.UnusableKey) as error:
        print(f"falkirk onramp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
