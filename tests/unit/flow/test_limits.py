"""A tenant's flows, counted over the workers of a node."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from falkirk.flow import limits
from falkirk.flow.limits import TenantCounts


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("tenants")
    os.ftruncate(fd, limits.SIZE)
    yield fd
    os.close(fd)


def ids(count: int) -> list[bytes]:
    return [uuid.UUID(int=number + 1).bytes for number in range(count)]


def test_workers_see_each_others_flows(fd: int) -> None:
    first, second = TenantCounts(fd, 3, 0), TenantCounts(fd, 3, 2)
    (tenant,) = ids(1)
    row = first.row(tenant)
    assert row is not None
    assert second.row(tenant) == row
    first.add(row, 1)
    first.add(row, 1)
    second.add(row, 1)
    assert (first.total(row), second.total(row)) == (3, 3)
    first.add(row, -1)
    assert second.total(row) == 2


def test_tenants_are_apart(fd: int) -> None:
    counts = TenantCounts(fd, 1, 0)
    rows = [counts.row(tenant) for tenant in ids(200)]
    assert len(set(rows)) == 200
    for number, row in enumerate(rows):
        assert row is not None
        counts.add(row, number)
    assert [counts.total(row) for row in rows if row is not None] == list(range(200))


def test_a_restarted_worker_starts_from_nothing_and_leaves_the_others_alone(fd: int) -> None:
    first, second = TenantCounts(fd, 2, 0), TenantCounts(fd, 2, 1)
    row = first.row(ids(1)[0])
    assert row is not None
    first.add(row, 5)
    second.add(row, 7)
    again = TenantCounts(fd, 2, 0)
    assert again.total(row) == 7
    assert again.row(ids(1)[0]) == row


def test_one_tenant_too_many_is_told(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROWS", 8)
    counts = TenantCounts(fd, 1, 0)
    tenants = ids(9)
    assert all(counts.row(tenant) is not None for tenant in tenants[:8])
    assert counts.row(tenants[8]) is None
    assert counts.row(tenants[3]) is not None


def test_anybody_may_read_a_tenants_flows(fd: int) -> None:
    """Without a worker's column, and without making a row for a tenant that has none."""
    first, second = TenantCounts(fd, 2, 0), TenantCounts(fd, 2, 1)
    some, other, unknown = ids(3)
    for tenant, count in ((some, 3), (other, 1)):
        row = first.row(tenant)
        assert row is not None
        first.add(row, count)
        second.add(row, 1)
    before = os.pread(fd, limits.SIZE, 0)
    assert [limits.flows_of(fd, tenant) for tenant in (some, other, unknown)] == [4, 2, 0]
    assert os.pread(fd, limits.SIZE, 0) == before
