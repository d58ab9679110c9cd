"""Which tunnel a device has: the newest, an older one again when that closes, and never another tenant's."""

from __future__ import annotations

import pytest

from falkirk.flow.directory import Attachment, Directory
from falkirk.wire.context import Framing


def at(number: int, device: str = "nas", network: str = "n", tenant: str = "t", worker: int = 0) -> Attachment:
    return Attachment(number, worker, tenant, device, network, Framing.RAW, 1500)


def found(directory: Directory, device: str = "nas", network: str = "", tenant: str = "t") -> int | None:
    attachment = directory.find(tenant, device, network)
    return attachment.tunnel if attachment is not None else None


def test_the_newest_wins_and_an_older_one_takes_its_place() -> None:
    directory = Directory()
    for number in (7, 3, 9):
        directory.opened(at(number))
    assert found(directory) == 9
    directory.closed(9)
    assert found(directory) == 7
    directory.closed(7)
    directory.closed(3)
    directory.closed(3)
    assert (found(directory), len(directory)) == (None, 0)


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ({}, 2),
        ({"network": "n"}, 1),
        ({"network": "m"}, 2),
        ({"network": "other"}, None),
        ({"tenant": "u"}, None),
        ({"device": "pc"}, 3),
        ({"device": "none"}, None),
    ],
)
def test_only_the_tenant_s_own_and_only_in_the_network_that_is_asked_for(
    asked: dict[str, str], number: int | None
) -> None:
    directory = Directory()
    directory.opened(at(1, network="n"))
    directory.opened(at(2, network="m"))
    directory.opened(at(3, device="pc"))
    assert found(directory, **asked) == number


def test_a_lost_worker_takes_its_tunnels_with_it() -> None:
    directory = Directory()
    directory.opened(at(1, worker=0))
    directory.opened(at(2, worker=1))
    directory.lost(1)
    assert found(directory) == 1
    directory.opened(at(2, worker=1))
    assert found(directory) == 2


def test_the_last_word_on_a_tunnel_is_right() -> None:
    directory = Directory()
    directory.opened(at(1))
    directory.opened(at(1, device="pc"))
    assert (found(directory), found(directory, "pc"), len(directory)) == (None, 1, 1)
