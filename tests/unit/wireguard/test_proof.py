"""Proofs of devices: what is accepted, and everything that isn't."""

from __future__ import annotations

import pytest

from falkirk.wireguard import proof

DEVICE, REGISTRY, OTHER = (bytes([seed]) * 32 for seed in (1, 2, 3))
NOW = 1_700_000_000_000_000_000
FACTS = {"os": "linux", "disk_encryption": "on"}


def checked(mac: bytes, **changed: object) -> bool:
    """Whether the registry takes a proof of DEVICE's posture FACTS, but for what is changed."""
    given: dict[str, object] = {
        "private_key": REGISTRY,
        "other_public_key": proof.public_of(DEVICE),
        "purpose": proof.POSTURE,
        "time_ns": NOW,
        "said": proof.posture(FACTS),
    }
    return proof.check(mac, **{**given, **changed})  # type: ignore[arg-type]


MADE = proof.make(DEVICE, proof.public_of(REGISTRY), proof.POSTURE, NOW, proof.posture(FACTS))


def test_the_registry_takes_what_the_device_made() -> None:
    assert len(MADE) == 16
    assert checked(MADE)


@pytest.mark.parametrize(
    "changed",
    [
        {"private_key": OTHER},
        {"other_public_key": proof.public_of(OTHER)},
        {"purpose": proof.ROTATE},
        {"time_ns": NOW + 1},
        {"time_ns": -1},
        {"time_ns": 1 << 64},
        {"said": proof.posture({**FACTS, "os": "windows"})},
        {"said": proof.posture({})},
        {"other_public_key": bytes(32)},
        {"other_public_key": b"short"},
    ],
    ids=str,
)
def test_a_proof_says_one_thing_once_by_one_key(changed: dict[str, object]) -> None:
    assert not checked(MADE, **changed)


@pytest.mark.parametrize("mac", [b"", MADE[:15], MADE + b"\0", bytes(16), bytes([MADE[0] ^ 1]) + MADE[1:]], ids=repr)
def test_other_bytes_are_no_proof(mac: bytes) -> None:
    assert not checked(mac)


def test_facts_that_run_together_differently_are_said_differently() -> None:
    assert proof.posture({"a": "bc"}) != proof.posture({"ab": "c"})
    assert proof.posture({"a": "", "b": ""}) != proof.posture({"a": "b"})
    assert proof.posture({"a": "1", "b": "2"}) == proof.posture({"b": "2", "a": "1"})


@pytest.mark.parametrize("text", ["", "AAAA", "!" * 44, proof.text_of(bytes(31))])
def test_what_isn_t_a_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        proof.key_of(text)


def test_a_key_reads_back() -> None:
    assert proof.key_of(proof.text_of(DEVICE)) == DEVICE
