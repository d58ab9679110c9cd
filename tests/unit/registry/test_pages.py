"""Pages: every resource once, in order."""

from __future__ import annotations

import base64

import pytest

from falkirk.registry import pages
from falkirk.registry.kinds import BY_NAME, parse
from falkirk.registry.pages import Page
from tests.unit.registry.conftest import Ledger, refused


def page(ledger: Ledger, tenant: str = "", size: int = 0, token: str = "") -> Page:
    return ledger.store.read(lambda connection: pages.read(connection, BY_NAME["user"], tenant, size, token)).result()


def names(found: Page) -> list[str]:
    values = [parse(BY_NAME["user"], body) for body in found.bodies]
    return [f"{value.metadata.tenant}/{value.metadata.name}" for value in values]


@pytest.fixture
def peopled(ledger: Ledger) -> Ledger:
    for tenant in ("zeta", "acme"):
        ledger.create("tenant", tenant)
        for name in ("cid", "ann", "bob"):
            ledger.create("user", name, tenant)
    return ledger


def test_pages_go_by_tenant_then_name(peopled: Ledger) -> None:
    first = page(peopled, size=4)
    second = page(peopled, size=4, token=first.next_token)
    assert names(first) + names(second) == [
        f"{tenant}/{name}" for tenant in ("acme", "zeta") for name in ("ann", "bob", "cid")
    ]
    assert (second.next_token, second.revision) == ("", peopled.store.revision)


def test_a_page_of_one_tenant_ends_with_it(peopled: Ledger) -> None:
    first = page(peopled, "acme", 3)
    assert (names(first), first.next_token) == (["acme/ann", "acme/bob", "acme/cid"], "")


def test_a_removal_between_pages_skips_and_repeats_nothing(peopled: Ledger) -> None:
    first = page(peopled, size=2)
    peopled.delete("user", "bob", "acme")
    assert names(page(peopled, size=2, token=first.next_token)) == ["acme/cid", "zeta/ann"]


@pytest.mark.parametrize(
    "token", ["x", "!!", base64.urlsafe_b64encode(b"[1]").decode(), base64.urlsafe_b64encode(b"\xff").decode()]
)
def test_a_bad_token_or_size_is_refused(peopled: Ledger, token: str) -> None:
    assert refused(lambda: page(peopled, token=token)).about["field"] == "page_token"
    of_all = page(peopled, size=1).next_token
    assert refused(lambda: page(peopled, "acme", token=of_all)).about["field"] == "page_token"
    assert refused(lambda: page(peopled, size=1001)).about["field"] == "page_size"
