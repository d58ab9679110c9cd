"""What a private namespace of the upgrader holds: each worker's TUN devices, addresses and listeners.

`lift{w}v` has all TCP offloads, for tunnels that carry super-packets; `lift{w}r` has a vnet header but no offloads, for
tunnels of plain packets (what is written may still be a super-packet). Each has host number 1 of its slot prefix
(`falkirk.wire.slots`), whose route the address brings along; the listeners wait on the wildcard address for both.

In a namespace for lowering the devices are `lower{w}v` and `lower{w}r`, and instead of listeners there are client sockets, made on demand
(`falkirk.linux.client_sockets`): what is a stream's source address when it is lifted, its slot, is its destination there.

Limits: where /proc/sys can't be written (the report says so), what the kernel remembers of an address stays longer than a
slot rests, and a path that swallows large segments without an ICMP error stalls a stream: there is no socket option for either.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Final

from falkirk.linux import netns, sockets, tun
from falkirk.linux.namespace_messages import HelperSettings, Purpose, WorkerDevices
from falkirk.linux.netlink import Netlink
from falkirk.wire.context import Framing
from falkirk.wire.slots import SlotPlan

PORT_BASE: Final = 1024
"""Worker w listens on this plus w."""
HOST: Final = 1
"""A device's own host number in its slot prefix."""
FALLBACK_CONGESTION: Final = "reno"
"""The one that every kernel has."""
_SETTLE_S: Final = 10.0


def kernel_settings(settings: HelperSettings) -> dict[str, str]:
    """Sysctls of the namespace, by name.

    What the kernel remembers of an address (metrics, path MTU) must be forgotten before a slot's 60 s of rest are over,
    so that the next flow in the slot doesn't inherit it.
    """
    return {
        "net.ipv4.tcp_no_metrics_save": "1",
        "net.ipv4.route.mtu_expires": "30",
        # Only where the namespace belongs to the machine's own user namespace; else IPv6 forgets after 600 s.
        "net.ipv6.route.mtu_expires": "30",
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.default.rp_filter": "0",
        "net.ipv4.tcp_slow_start_after_idle": "0",
        # RFC 4821, for both families: where large segments vanish and nobody says why, smaller ones are tried.
        "net.ipv4.tcp_mtu_probing": "1",
        "net.ipv4.tcp_max_syn_backlog": str(2 * settings.backlog),
        "net.core.somaxconn": str(settings.backlog),
        "net.ipv4.tcp_rmem": f"4096 131072 {settings.tcp_buffer_max}",
        "net.ipv4.tcp_wmem": f"4096 65536 {settings.tcp_buffer_max}",
    }


def make_worker(links: Netlink, settings: HelperSettings, worker: int) -> tuple[WorkerDevices, list[int]]:
    """One worker's devices and listeners in the current namespace, described, with their descriptors."""
    plan = SlotPlan(settings.workers)
    lifts = settings.purpose is Purpose.LIFT
    port = PORT_BASE + worker if lifts else 0
    vnet_device, raw_device = f"{settings.purpose}{worker}v", f"{settings.purpose}{worker}r"
    descriptors = [
        _device(links, settings, plan, worker, vnet_device, Framing.VNET),
        _device(links, settings, plan, worker, raw_device, Framing.RAW),
    ]
    if lifts:
        descriptors.append(_listener(settings, socket.AF_INET, "0.0.0.0", port))
        if netns.has_ipv6():
            descriptors.append(_listener(settings, socket.AF_INET6, "::", port))
    described = WorkerDevices(
        worker=worker,
        vnet_device=vnet_device,
        raw_device=raw_device,
        vnet_mtu=settings.vnet_mtu,
        raw_mtu=settings.raw_mtu,
        port=port,
        descriptors=len(descriptors),
    )
    return described, descriptors


def await_addresses(settings: HelperSettings) -> None:
    """Wait until every device takes packets to its own IPv6 address: the kernel adds the address's route in a work queue, a moment after
    the address. Raises OSError (ETIMEDOUT)."""
    if not netns.has_ipv6():
        return
    plan = SlotPlan(settings.workers)
    wanted = {
        plan.address6(worker, plan.slot(framing, HOST)).hex()
        for worker in range(settings.workers)
        for framing in Framing
    }
    deadline = time.monotonic() + _SETTLE_S
    while wanted - netns.local6():
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, "the kernel doesn't take packets to the devices' IPv6 addresses")
        time.sleep(0.001)  # a poll with a deadline: there is nothing to wait on


def _device(links: Netlink, settings: HelperSettings, plan: SlotPlan, worker: int, name: str, framing: Framing) -> int:
    vnet = framing is Framing.VNET
    fd = tun.open_tun(name, vnet=True, offloads=tun.TCP_OFFLOADS if vnet else tun.NO_OFFLOADS)
    index = socket.if_nametoindex(name)
    if netns.has_ipv6():
        links.no_generated_addresses(index)
    links.set_link(index, mtu=settings.vnet_mtu if vnet else settings.raw_mtu, queue=settings.tx_queue)
    own = plan.slot(framing, HOST)
    links.add_address(index, plan.address4(worker, own), plan.prefix_length4())
    if netns.has_ipv6():
        links.add_address(index, plan.address6(worker, own), plan.prefix_length6())
    return fd


def _listener(settings: HelperSettings, family: socket.AddressFamily, address: str, port: int) -> int:
    listener = sockets.tcp_listener(family, address, port, settings.backlog)
    sockets.set_congestion(listener, settings.congestion, FALLBACK_CONGESTION)
    sockets.urgent_in_line(listener)
    return listener.detach()


def choose_congestion(settings: HelperSettings) -> str:
    """The congestion control that listeners get. By setsockopt, not by sysctl: a namespace that isn't the machine's own
    may only make a control its default that the machine allows everybody, but its owner may set any on a socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return sockets.set_congestion(probe, settings.congestion, FALLBACK_CONGESTION) or sockets.congestion(probe)
