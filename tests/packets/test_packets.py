"""Every packet script through a real mesh, for each framing and address family that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packets.conftest import PacketWorld
from tests.packets.runner import Run
from tests.packets.script import Case, read_all

pytestmark = pytest.mark.netns
CASES = read_all(Path(__file__).parent)
WAYS = [
    pytest.param(case, framing, family, id=f"{case.file}-{case.name}-{framing}-{family}")
    for case in CASES
    for framing, family in case.ways()
]


@pytest.mark.parametrize(("case", "framing", "family"), WAYS)
def test_packets(packet_world: PacketWorld, case: Case, framing: str, family: str) -> None:
    road, peer = packet_world.roads[framing], packet_world.peers[framing]
    Run(case, road, family, packet_world.server, peer=peer).run()
