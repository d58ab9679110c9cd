"""`falkirk capture`: packets as they pass, in a file that Wireshark opens.

The file (pcapng) has two interfaces: `tunnel`, as devices send and receive packets, and `namespace`, the same behind the NAT, where the kernel
takes them for a stream. Packets begin with their IP header, and each has a comment of `key=value` words, which Wireshark finds with
`frame.comment contains "reason=denied"`:

    flow, tenant, device, tunnel    whose it is, where that is known
    fate                            forwarded, held (a SYN that waits for its upstream), answered (by Falkirk itself), dropped, sent (out, here)
    reason                          why it was dropped, as `falkirk flow stats` counts it
    outcome, rule                   what was decided for its flow, and by which rule
    gso                             a super-packet: payload of each segment that it stands for
    csum=partial                    the checksum is still to be completed

A filter is an expression of the language of rules over the flow that a packet is of, or would begin: `net.port == 443 && "staff" in identity.groups`.
Packets that this command is too slow for are lost for it, and for nobody else: it says how many at its end, and the file where.

Payload is shown, so it needs the road admin/, and the audit log has who captured what (events capture_started and capture_ended). Exit status 0
at the end, however it came (--seconds, --count, Ctrl-C); 1 where it was refused or broke off.
"""

from __future__ import annotations

import getpass
import os
import sys
import threading
from typing import Annotated, BinaryIO, Final

import grpc
import typer

from falkirk import __version__
from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.flow.v1 import flow_service_pb2_grpc as pb_grpc
from falkirk.cli.connection import RunDir, calling, fail, until_interrupted
from falkirk.wire import pcapng

INTERFACES: Final = (
    ("tunnel", "as devices send and receive it"),
    ("namespace", "behind the NAT, as the private namespace's kernel sends and receives it"),
)
CAPTURING: Final = "falkirk-capturing"
"""Initial metadata of a capture that has begun."""
SENT: Final = pb.CaptureResponse.FATE_SENT


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("capture")(capture)


def capture(
    run_dir: RunDir,
    write: Annotated[str, typer.Option("--write", "-w", help="The file to write (pcapng); - is standard output.")],
    flow: Annotated[str, typer.Option(help="Only this flow (its id).")] = "",
    tenant: Annotated[str, typer.Option(help="Only this tenant (its name).")] = "",
    device: Annotated[str, typer.Option(help="Only this device (its name).")] = "",
    filter: Annotated[
        str, typer.Option(help="Only flows for which this is true (the language of rules): net.port == 443.")
    ] = "",
    dropped: Annotated[bool, typer.Option("--dropped", help="Only packets that are dropped.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Stop after so long; 0 goes on until interrupted.")] = 0,
    count: Annotated[int, typer.Option(min=0, help="Stop after so many packets; 0 goes on.")] = 0,
    snaplen: Annotated[int, typer.Option(min=0, max=65535, help="Keep so many bytes of each; 0 keeps all.")] = 0,
    reason: Annotated[str, typer.Option(help="Why; goes into the audit log.")] = "",
) -> None:
    """Write packets to a file as they pass, both sides of the NAT, dropped ones with why."""
    request = pb.CaptureRequest(
        flow_id=flow, tenant=tenant, device=device, filter=filter, dropped_only=dropped, snaplen=snaplen, by=_by(reason)
    )
    taken = lost = 0
    with calling(run_dir, "flow") as channel, until_interrupted():
        call = pb_grpc.FlowServiceStub(channel).Capture(request)
        # Comes once everybody captures; a refusal has none.
        if not any(key == CAPTURING for key, _ in call.initial_metadata()):
            next(call)  # Raises what it says, before there is a file.
        print("capturing", file=sys.stderr, flush=True)
        timer = threading.Timer(seconds, call.cancel)
        timer.daemon = True
        if seconds:
            timer.start()
        try:
            with _file(write) as file:
                file.write(pcapng.header(f"falkirk {__version__}", INTERFACES, snaplen))
                file.flush()
                for packet in call:
                    file.write(block(packet))
                    file.flush()
                    taken, lost = taken + 1, lost + packet.lost
                    if taken == count:
                        break
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED or not seconds:
                raise
        finally:
            timer.cancel()
            call.cancel()
            print(f"{taken} packets captured, {lost} lost", file=sys.stderr)


def block(packet: pb.CaptureResponse) -> bytes:
    """A packet as a block of the file."""
    return pcapng.packet(
        packet.side - pb.CaptureResponse.SIDE_TUNNEL,
        packet.time.ToNanoseconds(),
        packet.packet,
        packet.length,
        inbound=packet.fate != SENT,
        comment=comment(packet),
        lost=packet.lost,
    )


def comment(packet: pb.CaptureResponse) -> str:
    """What is known of a packet, in words of key=value."""
    said = {
        "flow": packet.flow_id,
        "tenant": packet.tenant,
        "device": packet.device,
        "user": packet.user,
        # A group may have blanks, which would end the word.
        "groups": ",".join(packet.groups).replace(" ", "_"),
        "tunnel": packet.tunnel_id or "",
        "fate": pb.CaptureResponse.Fate.Name(packet.fate).removeprefix("FATE_").lower(),
        "reason": packet.reason,
        "outcome": packet.outcome,
        "rule": packet.rule,
        "gso": packet.gso_size or "",
        "csum": "partial" if packet.checksum_partial else "",
    }
    return " ".join(f"{key}={value}" for key, value in said.items() if value)


def _file(name: str) -> BinaryIO:
    if name == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    try:
        return open(name, "wb", opener=lambda path, flags: os.open(path, flags, 0o600))
    except OSError as error:
        fail(f"{name}: {error.strerror}", "FILE_UNWRITABLE")


def _by(reason: str) -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "?"
    return f"{name} (uid {os.getuid()})" + (f": {reason}" if reason else "")
