"""The live table: what the worker writes is what a reader sees, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from falkirk.flow.keys import Signature, signature
from falkirk.flow.live import HEADER_SIZE, MAGIC, RECORD_SIZE, RULE_BYTES, LiveReader, LiveTable, kind_of
from falkirk.wire.slots import LOWERED
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6

KEY4 = DEVICE4 + SERVER4 + bytes.fromhex("9c4001bb")
KEY6 = DEVICE6 + SERVER6 + bytes.fromhex("9c410050")


def fill(table: LiveTable, key: bytes = KEY4, number: int = 1, rule: bytes = b"main/all") -> int:
    index = table.claim()
    assert index is not None
    table.begin(index, 1, 0, 7, 16 + number, key, bytes([number]) * 16, number, 1000 + number, b"r" * 16, rule)
    return index


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker-0"


def test_a_flow_reads_back(path: Path) -> None:
    table = LiveTable(path, 4, epoch=99)
    fill(table)
    fill(table, KEY6, 2, "öäü".encode() * 50)
    reader = LiveReader(path)
    assert (reader.epoch, reader.capacity) == (99, 4)
    four, six = reader
    assert (four.family, four.source, four.destination, four.source_port, four.destination_port) == (
        4,
        DEVICE4,
        SERVER4,
        40000,
        443,
    )
    assert (four.flow_id, four.sequence, four.start, four.last, four.slot, four.tunnel) == (
        b"\1" * 16,
        1,
        1001,
        1001,
        17,
        7,
    )
    assert (four.route_id, four.rule, four.protocol, four.kind) == (b"r" * 16, "main/all", 6, 0)
    assert (six.family, six.source, six.destination, six.source_port) == (6, DEVICE6, SERVER6, 40001)
    assert (four.lower_slot, four.lower_tunnel) == (0, 0)
    # A rule that is cut in the middle of a letter is still text.
    assert six.rule.startswith("öäüöäü")
    table.lowered(six.index, LOWERED | 16, 8)
    assert [(record.lower_slot, record.lower_tunnel) for record in reader] == [(0, 0), (LOWERED | 16, 8)]
    assert next(reader.records(1)).rule == six.rule
    reader.close()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("forwarded", [False, True])
def test_the_kind_says_how_the_tunnel_is_framed_and_whether_it_leads_to_a_device(
    path: Path, raw: bool, forwarded: bool
) -> None:
    table = LiveTable(path, 1, epoch=1)
    index = table.claim()
    assert index is not None
    table.begin(index, 3, kind_of(raw, forwarded), 7, 0, KEY4 + b"\x06", b"\1" * 16, 1, 1, b"", b"")
    (record,) = LiveReader(path)
    assert (record.raw, record.forwarded, record.key) == (raw, forwarded, KEY4 + b"\x06")


@pytest.mark.parametrize("key", [KEY4, KEY6])
def test_a_flow_of_any_protocol_reads_back_with_its_key(path: Path, key: bytes) -> None:
    table = LiveTable(path, 3, epoch=1)
    fill(table, key)
    for protocol in (17, 6):
        index = table.claim()
        assert index is not None
        other = key + bytes([protocol])
        table.begin(index, 3, 0, 7, 0, other, bytes([protocol]) * 16, 2, 1002, b"r" * 16, b"main/all")
    assert table.full
    reader = LiveReader(path)
    assert [(record.protocol, record.slot, record.key) for record in reader] == [
        (6, 17, key),
        (17, 0, key + b"\x11"),
        (6, 0, key + b"\x06"),
    ]
    reader.close()


def test_counts_states_and_cursors(path: Path) -> None:
    table = LiveTable(path, 4, 1)
    index = fill(table)
    table.state(index, 3)
    table.counts(index, 5000, 10, 20, 1, 2)
    table.cursors((11, 12, 13, 14))
    reader = LiveReader(path)
    (record,) = reader
    assert (record.state, record.last) == (3, 5000)
    assert (record.bytes_up, record.bytes_down, record.packets_up, record.packets_down) == (10, 20, 1, 2)
    assert reader.cursors == (11, 12, 13, 14)
    reader.close()


def test_places_run_out_and_come_back(path: Path) -> None:
    table = LiveTable(path, 2, 1)
    first, second = fill(table), fill(table, number=2)
    assert table.claim() is None
    table.release(first)
    reader = LiveReader(path)
    assert [record.index for record in reader] == [second]
    assert reader.find(b"\1" * 16) is None
    assert table.claim() == first
    # Claimed isn't live: a reader sees nothing before the state is there.
    assert [record.index for record in reader] == [second]
    reader.close()


def test_a_flow_is_found_by_its_id_and_by_nothing_that_looks_like_it(path: Path) -> None:
    table = LiveTable(path, 4, 1)
    flow_id = b"\1" * 16
    index = table.claim()
    assert index is not None
    # The id stands in another flow's rule and route too.
    table.begin(index, 1, 0, 7, 99, KEY4, b"x" * 16, 1, 1, flow_id, flow_id * 3)
    reader = LiveReader(path)
    assert reader.find(flow_id) is None
    fill(table)
    found = reader.find(flow_id)
    assert found is not None
    assert found.slot == 17
    reader.close()


def test_reading_goes_on_from_a_place(path: Path) -> None:
    table = LiveTable(path, 8, 1)
    for number in range(1, 6):
        fill(table, number=number)
    reader = LiveReader(path)
    assert [record.index for record in reader.records(3)] == [3, 4]
    assert list(reader.records(8)) == []
    reader.close()


def test_a_successor_takes_the_place_and_an_old_reader_keeps_its_own(path: Path) -> None:
    fill(LiveTable(path, 2, 1))
    old = LiveReader(path)
    LiveTable(path, 2, 2)
    assert len(list(old)) == 1
    new = LiveReader(path)
    assert (new.epoch, list(new)) == (2, [])
    old.close()
    new.close()


@pytest.mark.parametrize(
    "data",
    [
        b"X" * HEADER_SIZE,
        (MAGIC + b"\xff\0\0\0").ljust(HEADER_SIZE, b"\0"),
        MAGIC,
        b"",
        (MAGIC + b"\1\0\0\0\xff\0\0\0").ljust(HEADER_SIZE + RECORD_SIZE, b"\0"),
    ],
)
def test_what_is_no_live_table_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError):
        LiveReader(path)


def test_a_flow_is_found_by_its_signature(path: Path) -> None:
    table = LiveTable(path, 8, 1)
    for number, key in enumerate((KEY4, KEY6, KEY4 + b"\x11", KEY4)):
        fill(table, key, number)
    table.release(3)
    reader = LiveReader(path)

    def found(said: Signature) -> list[int]:
        return [record.index for record in reader.between(said)]

    four = signature(KEY4)
    assert found(four) == [0]
    assert found(signature(KEY6)) == [1]
    assert found(four._replace(protocol=17)) == [2]
    assert found(four._replace(source_port=1)) == []
    assert found(four._replace(source=SERVER4, destination=DEVICE4)) == []
    # Four bytes and twelve zeros are another address in IPv6.
    assert found(four._replace(source=DEVICE4 + bytes(12), destination=SERVER4 + bytes(12))) == []


def test_flows_of_tunnels_are_counted(path: Path) -> None:
    table = LiveTable(path, 8, 1)
    places = [fill(table, number=number) for number in range(4)]
    table.state(places[1], 3)
    table.release(places[3])
    reader = LiveReader(path)
    assert reader.count({7}) == (3, 2)
    assert reader.count({8}) == (0, 0)
    assert reader.count(()) == (0, 0)


def test_another_rule_takes_the_first_ones_place(path: Path) -> None:
    """Nothing of a longer one is left, and nothing beside it is touched."""
    table = LiveTable(path, 2, 1)
    index = fill(table, rule=b"x" * 200)
    table.lowered(index, 5, 9)
    table.decided(index, b"q" * 16, b"main/short")
    (record,) = LiveReader(path)
    assert (record.rule, record.route_id, record.flow_id) == ("main/short", b"q" * 16, b"\1" * 16)
    assert (record.lower_slot, record.lower_tunnel) == (5, 9)
    table.decided(index, b"s" * 16, b"y" * 200)
    (record,) = LiveReader(path)
    assert (record.rule, record.lower_slot, record.lower_tunnel) == ("y" * RULE_BYTES, 5, 9)
