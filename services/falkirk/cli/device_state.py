"""What an enrolled device keeps on its own disk: who it is, its private key, and how its tunnel was set up when it last asked.

One directory (0700) a device: `device.json` (0600) is written before the registry is asked, since the key must not be lost with an answer;
`interface.json`, `interface.sock` and `interface.log` are the running interface's (`falkirk.linux.wireguard`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec

from falkirk.linux.wireguard.request import (
    DEFAULT_INTERFACE,
    DEFAULT_MTU,
    InterfaceRequest,
    PeerRequest,
    decode,
    encode,
)

VERSION: Final = 1


class BadState(Exception):
    """The directory's files can't be used; the text says which and why."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the registry is asked: by its run directory on this machine, or over TCP."""

    run_dir: str = ""
    address: str = ""
    """host:port."""
    roots: str = ""
    """The mesh's roots, PEM: what its certificate must come from."""


class Tunnel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The registry's TunnelConfig, as it was last."""

    addresses: tuple[str, ...] = ()
    mtu: int = DEFAULT_MTU
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    peers: tuple[PeerRequest, ...] = ()


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about this device."""

    private_key: bytes
    place: Place
    device_id: str = ""
    """Empty until the registry has answered."""
    tenant: str = ""
    name: str = ""
    registry_key: bytes = b""
    """What proofs are made with (`falkirk.wireguard.proof`)."""
    tunnel: Tunnel = Tunnel()
    posture: dict[str, str] = {}
    """The facts that were reported last."""
    version: int = VERSION


class State:
    """The directory of one device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "interface.sock"
        self.interface = folder / "interface.json"
        self.log = folder / "interface.log"
        self._file = folder / "device.json"

    def read(self) -> Enrolled | None:
        """None where no device has been here. Raises BadState."""
        try:
            enrolled = msgspec.json.decode(self._file.read_bytes(), type=Enrolled)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadState(f"{self._file}: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise BadState(f"{self._file}: {error}") from None
        if enrolled.version != VERSION or len(enrolled.private_key) != 32:
            raise BadState(
                f"{self._file}: of version {enrolled.version}, or its key isn't one; this program knows version {VERSION}"
            )
        return enrolled

    def write(self, enrolled: Enrolled) -> None:
        """Replace it, all or nothing. Raises BadState."""
        self._put(self._file, msgspec.json.format(msgspec.json.encode(enrolled), indent=2))

    def write_interface(self, enrolled: Enrolled, name: str, *, dns: bool) -> InterfaceRequest:
        """Write down what the interface shall be, and return it. Raises BadState."""
        request = self.request(enrolled, name, dns=dns)
        self._put(self.interface, encode(request))
        return request

    def request(self, enrolled: Enrolled, name: str, *, dns: bool) -> InterfaceRequest:
        """What the interface shall be. Raises BadState where what the registry said isn't usable."""
        tunnel = enrolled.tunnel
        request = InterfaceRequest(
            private_key=enrolled.private_key,
            addresses=tuple(f"{address}/{128 if ':' in address else 32}" for address in tunnel.addresses),
            peers=tunnel.peers,
            name=name or DEFAULT_INTERFACE,
            mtu=tunnel.mtu,
            dns=tunnel.dns if dns else (),
            search=tunnel.search if dns else (),
            control=str(self.socket),
        )
        try:
            return decode(encode(request))
        except ValueError as error:
            raise BadState(f"the tunnel that the registry described can't be set up: {error}") from None

    def _put(self, path: Path, data: bytes) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            scratch = path.with_suffix(".new")
            with contextlib.suppress(FileNotFoundError):
                scratch.unlink()
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            raise BadState(f"{path}: {error.strerror}") from None


def default_folder() -> Path:
    """Root's is the machine's; another user's is his own."""
    given = os.environ.get("FALKIRK_DEVICE_DIR")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/falkirk/device")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "falkirk" / "device"
