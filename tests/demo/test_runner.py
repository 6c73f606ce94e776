"""Running stages: what is done is kept, what changed runs again, nothing outlives an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from colossal_llama.demo import runner
from colossal_llama.demo.runner import Stage, StageError, child_environment, resolved, run_stages


def stage(name: str, code: str, *outputs: str) -> Stage:
    return Stage(name, f"do {name}", ("python", "-c", code), tuple(map(Path, outputs)))


def write(name: str, text: str = "x") -> Stage:
    """A stage that appends its name to the file ``calls`` and writes the file ``name``."""
    code = f"open('calls', 'a').write('{name} '); open('{name}', 'w').write('{text}')"
    return stage(name, code, name)


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text(encoding="utf-8").split()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def test_finished_stages_are_kept(tmp_path: Path) -> None:
    stages = [write("a"), write("b")]
    first = run_stages(stages, tmp_path, tmp_path)
    second = run_stages(stages, tmp_path, tmp_path)
    assert calls(tmp_path) == ["a", "b"]
    assert [record["kept"] for record in first + second] == [False, False, True, True]
    assert [record["seconds"] for record in first] == [record["seconds"] for record in second]


def test_a_changed_command_runs_again_with_all_that_follow(tmp_path: Path) -> None:
    run_stages([write("a"), write("b"), write("c")], tmp_path, tmp_path)
    run_stages([write("a"), write("b", "new"), write("c")], tmp_path, tmp_path)
    assert calls(tmp_path) == ["a", "b", "c", "b", "c"]
    assert (tmp_path / "b").read_text(encoding="utf-8") == "new"


def test_a_missing_output_runs_again(tmp_path: Path) -> None:
    run_stages([write("a"), write("b")], tmp_path, tmp_path)
    (tmp_path / "a").unlink()
    run_stages([write("a"), write("b")], tmp_path, tmp_path)
    assert calls(tmp_path) == ["a", "b", "a", "b"]


def test_a_broken_marker_runs_again(tmp_path: Path) -> None:
    run_stages([write("a")], tmp_path, tmp_path)
    (tmp_path / "stages" / "a.json").write_text("{", encoding="utf-8")
    run_stages([write("a")], tmp_path, tmp_path)
    assert calls(tmp_path) == ["a", "a"]


def test_a_failure_is_told_with_its_output_and_continued_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = stage("b", "import sys; print('the reason'); sys.exit('b' * 3)")
    with pytest.raises(StageError, match=r"stage b .*exit code 1.*b\.log"):
        run_stages([write("a"), failing, write("c")], tmp_path, tmp_path)
    shown = capsys.readouterr().err
    assert "the reason" in shown
    assert "bbb" in shown
    run_stages([write("a"), write("b"), write("c")], tmp_path, tmp_path)
    assert calls(tmp_path) == ["a", "b", "c"]


def test_what_a_launcher_adds_does_not_hide_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "print('error: the reason'); "
        "print('E1122 06:17:00.813000 1 torch/elastic/api.py:1] failed (exitcode: 1)'); "
        "[print('export HOME=x') for _ in range(50)]; exit(1)"
    )
    with pytest.raises(StageError):
        run_stages([stage("a", code)], tmp_path, tmp_path)
    shown = capsys.readouterr().err
    assert "error: the reason" in shown
    assert "export HOME=x\nexport" not in shown


def test_half_written_output_is_removed_before_a_stage_runs(tmp_path: Path) -> None:
    (tmp_path / "a" / "old").mkdir(parents=True)
    run_stages([stage("a", "import os; os.mkdir('a')", "a")], tmp_path, tmp_path)
    assert not list((tmp_path / "a").iterdir())


def test_memory_of_descendants_is_counted(tmp_path: Path) -> None:
    child = "x = bytearray(150 << 20); import time; time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (record,) = run_stages([stage("a", code)], tmp_path, tmp_path)
    assert 150 << 20 < record["peak_rss_bytes"] < 400 << 20
    assert record["seconds"] > 1


def test_interrupted_stages_leave_no_process_and_no_marker(tmp_path: Path) -> None:
    grandchild = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    script = (
        "import sys; from pathlib import Path\n"
        "from colossal_llama.demo.runner import Stage, run_stages\n"
        f"command = ('python', '-c', {code!r})\n"
        "here = Path(sys.argv[1])\n"
        "run_stages([Stage('a', 'wait', command, ())], here, here)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 20
    pid_file = tmp_path / "pid"
    while not (pid_file.exists() and pid_file.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(pid_file.read_text(encoding="utf-8"))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "stages" / "a.json").exists()


def test_latest_stands_for_the_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("epoch-1_step-7\n", encoding="utf-8")
    command = ("python", "run/{latest}/modeling,run/{latest}", "other")
    planned = Stage("a", "a", command, ())
    assert resolved(planned, tmp_path).command[1:] == (
        "run/epoch-1_step-7/modeling,run/epoch-1_step-7",
        "other",
    )


def test_what_would_break_the_launchers_shell_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOLLAR", "a$b")
    monkeypatch.setenv("QUOTE", 'say "x"')
    monkeypatch.setenv("PLAIN", "a b (c)")
    environment = child_environment()
    assert "DOLLAR" not in environment
    assert "QUOTE" not in environment
    assert environment["PLAIN"] == "a b (c)"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    export = " ".join(f'{name}="{value}"' for name, value in environment.items())
    shell = subprocess.run(["bash", "-c", f"export {export} && echo fine"], capture_output=True)
    assert shell.stdout == b"fine\n"


def test_the_recorded_command_is_the_one_to_type(tmp_path: Path) -> None:
    (record,) = run_stages([stage("a", "print('a b')")], tmp_path, tmp_path)
    assert record["command"] == """python -c 'print('"'"'a b'"'"')'"""
    saved = json.loads((tmp_path / "stages" / "a.json").read_text(encoding="utf-8"))
    assert saved["command"] == record["command"]
    assert (tmp_path / "logs" / "a.log").read_text(encoding="utf-8") == "a b\n"
