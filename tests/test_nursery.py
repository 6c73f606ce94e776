"""Processes that are forked are what processes would be that a launcher starts."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from tests import nursery
from tests.nursery import run_group

REPORT = """
import json, os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
sums = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(sums)
found = [dist.get_rank(), float(sums), sys.argv[1:], hash("text"), os.getcwd(), sys.stdin.read()]
print(json.dumps(found) + "\\n", end="", flush=True)
print("complaint", file=sys.stderr)
dist.destroy_process_group()
"""
FAILURE = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("what went wrong")
time.sleep(600)
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_a_group(tmp_path: Path, processes: int) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT, encoding="utf-8")
    said = run_group(str(script), "one", "two", processes=processes)
    lines = sorted(map(json.loads, said.stdout.splitlines()))
    assert [line[0] for line in lines] == list(range(processes))
    hashes = [line.pop(3) for line in lines]
    assert all(a != b for a, b in itertools.pairwise(hashes))
    total = processes * (processes + 1) / 2
    for line in lines:
        assert line[1:] == [total, ["one", "two"], str(nursery.ROOT), ""]
    assert said.stderr.count("complaint") == processes


def test_one_that_fails_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "failure.py"
    script.write_text(FAILURE, encoding="utf-8")
    monkeypatch.setattr(nursery, "PATIENCE", 0.1)
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"\[-9, 1\](.|\n)*what went wrong"):
        run_group(str(script))
    assert time.monotonic() - started < 300


def test_one_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"\[-9\]"):
        run_group(str(script), processes=1, timeout=0.5)
