"""Who is here, as the registry is told."""

from __future__ import annotations

from falkirk.api.registry.v1 import presence_service_pb2 as pb
from falkirk.onramp.control import Heard, Opened
from falkirk.onramp.presence import MOST, requests
from falkirk.wire.context import Framing, TunnelContext


def opened(number: int, device: str) -> Opened:
    context = TunnelContext("t", "acme", device, f"name-{device}", "n", "default", ())
    return Opened(number, context, Framing.RAW, 1420, 0, 0, 0, 1_000_000_000 * number)


def test_a_device_is_told_once_by_the_tunnel_that_was_heard_last() -> None:
    tunnels = {number: opened(number, device) for number, device in ((1, "a"), (2, "a"), (3, "b"), (4, "b"))}
    heard = {1: Heard(1, "192.0.2.1:4", 9_000_000_000, 5, 6)}
    (request,) = requests("n", tunnels, heard, {"a", "b"}, whole=False)
    found = {one.device_id: one for one in request.present}
    assert (found["a"].path, found["a"].endpoint, found["a"].received_bytes) == (
        pb.PRESENCE_PATH_WIREGUARD,
        "192.0.2.1:4",
        5,
    )
    assert found["a"].last_handshake.seconds == 9
    assert (found["b"].path, found["b"].endpoint, found["b"].since.seconds) == (pb.PRESENCE_PATH_TUNNEL, "", 4)


def test_news_are_told_and_the_whole_where_it_is_asked_for() -> None:
    tunnels = {2: opened(2, "b"), 3: opened(3, "c")}
    (change,) = requests("n", tunnels, {}, {"a", "c"}, whole=False)
    assert ([one.device_id for one in change.present], list(change.gone_device_ids), change.complete) == (
        ["c"],
        ["a"],
        False,
    )
    (whole,) = requests("n", tunnels, {}, {"a", "c"}, whole=True)
    assert ([one.device_id for one in whole.present], list(whole.gone_device_ids), whole.complete) == (
        ["b", "c"],
        [],
        True,
    )
    # Nothing has changed: the lease is renewed.
    (same,) = requests("n", tunnels, {}, (), whole=False)
    assert (same.node, len(same.present), same.lease_ms) == ("n", 0, 15_000)


def test_many_are_told_in_several_reports_of_which_the_first_begins_anew() -> None:
    tunnels = {number: opened(number, f"device-{number}") for number in range(1, MOST + 3)}
    told = requests("n", tunnels, {}, (), whole=True)
    first = next(told)
    assert (len(first.present), first.complete) == (MOST, True)
    # The last device leaves while the first report is on its way.
    del tunnels[MOST + 2]
    (second,) = told
    assert ([one.device_id for one in second.present], second.complete) == ([f"device-{MOST + 1}"], False)
