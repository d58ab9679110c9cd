"""Tables against a model that is rebuilt from scratch at every step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, Tables, TenantRow, UserRow, chunks

T = TenantRow("t", "acme")


def test_lookups() -> None:
    tables = Tables()
    rows: list[Row] = [
        T,
        NetworkRow("n", "t", "default", True),
        NetworkRow("m", "t", "lab"),
        UserRow("u", "t", "ann"),
        DeviceRow("d", "t", "laptop"),
    ]
    tables.apply(rows)
    assert len(tables) == 5
    assert [tables.tenant("acme"), tables.network("t", ""), tables.network("t", "lab")] == rows[:3]
    assert [tables.user("t", "ann"), tables.device("t", "laptop")] == rows[3:]
    assert (tables.tenant_by_id("t"), tables.network_by_id("m"), tables.device_by_id("d")) == (T, rows[2], rows[4])
    assert [tables.tenant_by_id("d"), tables.device_by_id("t"), tables.network_by_id("u")] == [None] * 3
    assert tables.device("other", "laptop") is None


def test_a_key_leads_to_the_device_that_has_it_now() -> None:
    tables = Tables()
    tables.apply([T, DeviceRow("d", "t", "laptop", public_key=b"k" * 32), DeviceRow("e", "t", "phone")])
    assert [tables.device_by_key(key) for key in (b"k" * 32, b"o" * 32, b"")] == [tables.device_by_id("d"), None, None]
    tables.apply(
        [DeviceRow("d", "t", "laptop", public_key=b"o" * 32), DeviceRow("e", "t", "phone", public_key=b"k" * 32)]
    )
    assert [row.id if row else "" for row in map(tables.device_by_key, (b"k" * 32, b"o" * 32))] == ["e", "d"]
    tables.apply([], ["e"])
    assert tables.device_by_key(b"k" * 32) is None


def test_touched_names_who_may_be_concerned() -> None:
    tables = Tables()
    tables.apply([T, UserRow("u", "t", "ann"), DeviceRow("d", "t", "laptop"), DeviceRow("e", "t", "phone")])
    touched = tables.apply([DeviceRow("d", "t", "desk")])
    assert (touched.devices, touched.tenants) == ({"d"}, set())
    touched = tables.apply([UserRow("u", "t", "ann", ("eng",))], ["e"])
    assert (touched.devices, touched.tenants) == ({"e"}, {"t"})
    assert tables.apply([], ["unknown"]).devices == set()


def test_the_default_mark_moves() -> None:
    tables = Tables()
    tables.apply([NetworkRow("n", "t", "a", True), NetworkRow("m", "t", "b")])
    tables.apply([NetworkRow("m", "t", "b", True), NetworkRow("n", "t", "a")])
    found = tables.network("t", "")
    assert found is not None
    assert found.id == "m"


devices = st.builds(
    DeviceRow, id=st.sampled_from("123456"), tenant_id=st.sampled_from("xy"), name=st.sampled_from("abc")
)
steps = st.tuples(st.lists(devices, max_size=4), st.lists(st.sampled_from("123456"), max_size=2))


@given(st.lists(steps, max_size=8))
def test_names_always_lead_to_a_row_that_has_them(history: list[tuple[list[DeviceRow], list[str]]]) -> None:
    tables, model = Tables(), dict[str, DeviceRow]()
    for changed, removed in history:
        unique = {row.id: row for row in changed}
        future = {key: row for key, row in model.items() if key not in removed} | unique
        names = [(row.tenant_id, row.name) for row in future.values()]
        if len(set(names)) != len(names):
            continue  # the registry keeps names unique
        tables.apply(unique.values(), removed)
        model = future
        for row in model.values():
            assert tables.device(row.tenant_id, row.name) is row
            assert tables.device_by_id(row.id) is row
        for tenant in "xy":
            for name in "abc":
                assert (tables.device(tenant, name) is None) == ((tenant, name) not in names)


def test_chunks_hold_every_row_once() -> None:
    rows: list[Row] = [TenantRow(str(number), str(number)) for number in range(250)]
    found = list(chunks(rows))
    assert [len(chunk) for chunk in found] == [100, 100, 50]
    assert [row for chunk in found for row in chunk] == rows
