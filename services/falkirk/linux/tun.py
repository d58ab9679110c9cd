"""TUN devices: layer 3 interfaces whose wire is a descriptor.

One read or write on the descriptor is one IP packet, behind a 10-byte virtio-net header (`=BBHHHH`: flags, gso_type,
hdr_len, gso_size, csum_start, csum_offset) where the device was opened with `vnet`. `offloads` say what the reader
accepts: without any, reads are plain packets with complete checksums, though writes on a `vnet` device may still be
super-packets. A device lives as long as a descriptor of it, in the namespace where it was opened.

Limit: one queue a device; multiqueue steering was measured and doesn't keep a flow on its queue.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final

DEVICE: Final = Path("/dev/net/tun")

TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNGETIFF: Final = 0x800454D2
TUNGETVNETHDRSZ: Final = 0x800454D7
IFF_TUN: Final = 0x0001
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000

TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08
TUN_F_USO4: Final = 0x20
TUN_F_USO6: Final = 0x40

NO_OFFLOADS: Final = 0
TCP_OFFLOADS: Final = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
"""Partial checksums and TCP super-packets of both families; with a `vnet` device only."""
UDP_OFFLOADS: Final = TUN_F_USO4 | TUN_F_USO6
"""UDP super-packets of both families: kernels from 6.2 on."""
VNET_HEADER_SIZE: Final = 10
MAX_PACKET: Final = 65535
MAX_READ: Final = VNET_HEADER_SIZE + MAX_PACKET + 1
"""A buffer of this size holds anything that a device gives."""
TX_QUEUE_LENGTH: Final = 4000
_NUMBERS: Final = (10, 200)
"""Of the character device, misc major and minor."""


class TunUnavailable(Exception):
    """No TUN device can be made here; `remedy` is what an administrator can do about it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


def open_tun(name: str, vnet: bool, offloads: int) -> int:
    """Make (or attach to) the device in the current network namespace; a non-blocking, close-on-exec descriptor.

    Raises TunUnavailable where the machine or its permissions stand in the way, OSError (EBUSY, EINVAL) otherwise.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unavailable(error) from error
    try:
        flags = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if vnet else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if vnet or offloads:
            fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
    except PermissionError as error:
        os.close(fd)
        raise TunUnavailable(
            f"making the TUN device {name} isn't permitted here",
            "run it in a network namespace of its own, or give it CAP_NET_ADMIN",
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def fault(fd: int, vnet: bool) -> str:
    """Why a descriptor isn't a TUN device that packets framed so can be exchanged with; empty where it is one."""
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or (os.major(status.st_rdev), os.minor(status.st_rdev)) != _NUMBERS:
        return "it isn't a TUN device"
    try:
        request = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
        (size,) = struct.unpack("=i", fcntl.ioctl(fd, TUNGETVNETHDRSZ, bytes(4)))
    except OSError as error:
        return f"it isn't attached to an interface ({error.strerror})"
    (flags,) = struct.unpack_from("=H", request, 16)
    wanted = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if vnet else 0)
    if flags & (IFF_TUN | IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) != wanted or (vnet and size != VNET_HEADER_SIZE):
        return f"it must be a layer 3 device without packet information, {'with' if vnet else 'without'} a 10-byte virtio-net header"
    return ""


def take_uso(fd: int) -> bool:
    """Have a `vnet` device with TCP's offloads give UDP super-packets too; False where the kernel knows none, and takes none either."""
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, TCP_OFFLOADS | UDP_OFFLOADS)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _unavailable(error: OSError) -> TunUnavailable:
    if error.errno == errno.ENOENT:
        return TunUnavailable(
            f"{DEVICE} doesn't exist",
            f"as root: modprobe tun; mkdir -p {DEVICE.parent} && mknod -m 0666 {DEVICE} c 10 200",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return TunUnavailable(
            f"{DEVICE} may not be opened by uid {os.geteuid()} ({error.strerror})",
            f"as root: chmod 0666 {DEVICE} (in a container: allow the device c 10:200)",
        )
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return TunUnavailable(f"the kernel has no TUN driver ({error.strerror})", "as root: modprobe tun")
    return TunUnavailable(f"{DEVICE} can't be opened ({error.strerror})", "see the kernel's log")
