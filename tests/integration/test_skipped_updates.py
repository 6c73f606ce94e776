"""Gradients that are not finite are found in every kind of optimizer, and can be dropped.

The checks are in ``skip_worker.py``; one group of two processes runs all of them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.nursery import run_group

KINDS = [
    *("gemini gathered", "gemini sharded", "gemini fp16", "zero1", "zero2", "zero2 fp16"),
    *("zero2 fp32", "3d", "3d fp16", "3d fp32", "3d zero1", "3d tp"),
]


@pytest.fixture(scope="module")
def records() -> dict[str, Any]:
    lines = run_group("tests/integration/skip_worker.py").stdout.splitlines()
    return {record["name"]: record for record in map(json.loads, filter(_is_json, lines))}


def _is_json(line: str) -> bool:
    return line.startswith("{")


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_update_leaves_no_trace(records: dict[str, Any], kind: str) -> None:
    """Weights and moments are those of a run without the bad batches, bit for bit."""
    record = records[kind]
    assert record["found"] == [True, False, True, False, False, True]
    assert record["moved"]
    assert not record["moved_by_bad"]
    assert record["equal"]


def test_every_kind_is_there(records: dict[str, Any]) -> None:
    assert sorted(records) == sorted(KINDS)
