"""One flow more, or why not, as a table."""

from __future__ import annotations

import msgspec
import pytest

from falkirk.flow.quota import Load, refusal
from falkirk.flow.settings import FlowSettings
from tests.flow_rig import context

SETTINGS = FlowSettings(device_flows=10, device_held=3, tenant_flows=20)
FREE = Load(True, True, 9, 2, 19, False)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (FREE, None),
        (FREE._replace(ready=False), "not_ready"),
        (FREE._replace(recorded=False), "audit_unwritable"),
        (FREE._replace(device_flows=10), "device_limit"),
        (FREE._replace(device_held=3), "device_held_limit"),
        (FREE._replace(tenant_flows=20), "tenant_limit"),
        (FREE._replace(full=True), "table_full"),
        (Load(False, False, 99, 99, 99, True), "not_ready"),
    ],
)
def test_defaults(load: Load, expected: str | None) -> None:
    assert refusal(load, context(), SETTINGS) == expected


def test_what_the_registry_says_goes_before_the_settings() -> None:
    who = msgspec.structs.replace(context(), device_max_flows=9, tenant_max_flows=30)
    assert refusal(FREE, who, SETTINGS) == "device_limit"
    assert refusal(FREE._replace(device_flows=8, tenant_flows=29), who, SETTINGS) is None
    assert refusal(FREE._replace(device_flows=8, tenant_flows=30), who, SETTINGS) == "tenant_limit"
