"""The demo in its small form, by its real commands: interrupted once, then run to its end.

Takes two minutes and a half: four launches of two processes, and a Python for each of 21 stages.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from tests.integration.conftest import BIN, ROOT, call

STAGE_BEFORE_INTERRUPTION = "base-data"


def test_demo_is_interrupted_and_finishes(tmp_path: Path) -> None:
    command = [str(BIN / "colossal-llama"), "demo", "--size", "small", "--out", str(tmp_path)]
    marker = tmp_path / "stages" / f"{STAGE_BEFORE_INTERRUPTION}.json"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not marker.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
    assert first.returncode == 130, "an interruption has an exit code of its own"

    done = call(command)

    assert f"report: {tmp_path / 'report.html'}" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    kept = {stage["name"] for stage in report["stages"] if stage["kept"]}
    assert STAGE_BEFORE_INTERRUPTION in kept
    assert "base" not in kept, "it was running, or about to, when the demo was interrupted"
    assert all(mark["met"] for mark in report["marks"])
