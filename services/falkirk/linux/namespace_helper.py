"""The process that begins a private namespace: `python -m falkirk.linux.namespace_helper --control-fd N`.

It is exec'ed before gRPC starts, because only a process of one thread may make a user namespace. It makes a user and a
network namespace with what `slot_devices` describes, hands all descriptors to its parent over the control pair, and
stays to answer requests (`namespace_messages`): the parent's, and where the namespace is one for lowering also those of the workers, who ask for
client sockets (`client_sockets`).

Nothing depends on its life: the parent's descriptors keep namespaces, devices and listeners. When it is killed, a
replacement started with `--join` takes its place and no stream is lost. It exits when its parent's end closes.

Limits: no grpc, no asyncio, and nothing imported that takes long; one parent; requests of one asker are answered in order. It leads
no decision: what couldn't be set is reported, and the parent decides.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from falkirk.linux import namespace_messages as messages
from falkirk.linux import netns, seqpacket, slot_devices, tun
from falkirk.linux.client_sockets import ClientSockets
from falkirk.linux.netlink import Netlink

_SEND_TIMEOUT_MS: Final = 5000
"""A parent that reads nothing for so long is gone for the helper."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or join, then answer until the parent is gone. The process's exit code."""
    parser = argparse.ArgumentParser(prog="falkirk namespace helper")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--join", type=int, nargs=2, metavar=("USERNS_FD", "NETNS_FD"))
    options = parser.parse_args(arguments)
    # The terminal's interrupt is for the parent, which ends the helper by closing the pair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=options.control_fd)
    control.setblocking(False)
    try:
        settings = msgspec.json.decode(options.settings, type=messages.HelperSettings)
        if options.join:
            _join(control, *options.join)
        else:
            _make(control, settings)
        _say(control, messages.Ready())
        _answer(control, settings)
    except netns.NamespaceUnavailable as error:
        return _fail(control, "namespace_unavailable", error.message, error.remedy)
    except tun.TunUnavailable as error:
        return _fail(control, "tun_unavailable", error.message, error.remedy)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except (OSError, ValueError) as error:
        return _fail(control, "set_up_failed", str(error), "run falkirk doctor")
    return 0


def _make(control: socket.socket, settings: messages.HelperSettings) -> None:
    netns.unshare_user_and_network()
    report = netns.write_settings(slot_devices.kernel_settings(settings))
    congestion = slot_devices.choose_congestion(settings)
    made = messages.Made(
        network_namespace=netns.inode("net"),
        user_namespace=netns.inode("user"),
        congestion=congestion,
        ipv6=netns.has_ipv6(),
        took=report.took,
        refused=report.refused,
    )
    _say(control, made, [netns.self_descriptor("user"), netns.self_descriptor("net")])
    with Netlink() as links:
        links.set_link(socket.if_nametoindex("lo"))
        for worker in range(settings.workers):
            _say(control, *slot_devices.make_worker(links, settings, worker))
    slot_devices.await_addresses(settings)


def _join(control: socket.socket, user_namespace: int, network_namespace: int) -> None:
    netns.join(user_namespace, network_namespace)
    os.close(user_namespace)
    os.close(network_namespace)
    _say(control, messages.Joined(network_namespace=netns.inode("net")))


def _answer(control: socket.socket, settings: messages.HelperSettings) -> None:
    askers: dict[int, ClientSockets] = {}
    """By the number of their worker."""
    while True:
        poll = select.poll()
        poll.register(control, select.POLLIN)
        for asker in askers.values():
            poll.register(asker.pair, asker.events)
        ready = {fd for fd, _ in poll.poll()}
        for worker, asker in list(askers.items()):
            if asker.pair.fileno() in ready and not asker.serve():
                askers.pop(worker).close()
        if control.fileno() in ready:
            received = seqpacket.receive(control, messages.MAX_DATAGRAM)
            if received is None:
                continue
            data, fds = received
            if not data:
                return
            match messages.TO_HELPER.decode(data):
                case messages.Inspect(request=request):
                    _say(control, messages.Inspected(request=request, devices=device_counters()))
                case messages.Serve(worker=worker):
                    if worker in askers:
                        askers.pop(worker).close()
                    askers[worker] = ClientSockets(socket.socket(fileno=fds[0]), settings, worker)


def device_counters() -> dict[str, messages.DeviceCounters]:
    """Counters of the namespace's devices but loopback, by name."""
    result = {}
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        name, _, columns = line.partition(":")
        numbers = [int(column) for column in columns.split()]
        if name.strip() != "lo":
            result[name.strip()] = messages.DeviceCounters(
                received_packets=numbers[1],
                received_bytes=numbers[0],
                received_dropped=numbers[3],
                sent_packets=numbers[9],
                sent_bytes=numbers[8],
                sent_dropped=numbers[11],
            )
    return result


def _say(control: socket.socket, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
    """Send, waiting for room; the descriptors are the parent's from then on. Raises OSError where it is gone."""
    data = messages.encode(message)
    while not seqpacket.send(control, data, descriptors):
        poll = select.poll()
        poll.register(control, select.POLLOUT)
        if not poll.poll(_SEND_TIMEOUT_MS):
            raise BrokenPipeError("the parent doesn't read")
    for descriptor in descriptors:
        os.close(descriptor)


def _fail(control: socket.socket, code: str, message: str, remedy: str) -> int:
    print(f"falkirk namespace helper: {code}: {message}; {remedy}", file=sys.stderr)
    try:
        seqpacket.send(control, messages.encode(messages.Failed(code, message, remedy)))
    except OSError as error:
        print(f"falkirk namespace helper: the parent is gone ({error.strerror})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
