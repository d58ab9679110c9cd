"""Can a private namespace with a TUN device be made here? `python -m falkirk.cli.probe` tries it and says so in one JSON line.

A process of its own, because making a user namespace takes a process with one thread and can't be undone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

import msgspec

from falkirk.linux import netns, tun

SECONDS: Final = 20.0


class Answer(msgspec.Struct, frozen=True):
    """One part of the probe; `remedy` is empty where it went well."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def answers() -> list[Answer]:
    """Tries it in this process, which is of no use afterwards."""
    found = [_device()]
    try:
        netns.unshare_user_and_network()
    except netns.NamespaceUnavailable as error:
        return [*found, Answer("namespaces", False, error.message, error.remedy)]
    found.append(Answer("namespaces", True, "a user and a network namespace could be made"))
    if found[0].ok:
        try:
            os.close(tun.open_tun("probe", True, tun.TCP_OFFLOADS))
        except (tun.TunUnavailable, OSError) as error:
            remedy = (
                error.remedy
                if isinstance(error, tun.TunUnavailable)
                else "the kernel is too old: 5.4 or newer is needed"
            )
            return [*found, Answer("tun_device", False, str(error), remedy)]
        found.append(Answer("tun_device", True, "a TUN device with vnet header and TCP offloads could be made"))
    return found


def _device() -> Answer:
    """The device file, before a namespace changes who we are."""
    try:
        os.close(os.open(tun.DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        try:
            os.close(tun.open_tun("probe", True, 0))  # for its words about what is wrong
        except tun.TunUnavailable as error:
            return Answer("tun", False, error.message, error.remedy)
    return Answer("tun", True, f"{tun.DEVICE} can be opened")


def run() -> list[Answer]:
    """Tries it in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "falkirk.cli.probe"],
            capture_output=True,
            timeout=SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return msgspec.json.decode(done.stdout, type=list[Answer])
    except (subprocess.SubprocessError, msgspec.DecodeError) as error:
        return [
            Answer(
                "namespaces",
                False,
                f"the probe failed: {error}",
                "run `python -m falkirk.cli.probe` and see what it says",
            )
        ]


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(answers()) + b"\n")
