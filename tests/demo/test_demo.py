"""The demo's plan and door. The whole journey is a row of the integration table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from colossal_llama import cli, command
from colossal_llama.demo import demo as demo_module
from colossal_llama.demo.demo import ROOT, DemoOptions, as_shown
from colossal_llama.demo.plan import MODELS, PROCESSES, SIZES, TRAINED, model_paths, stages
from colossal_llama.demo.runner import Stage

OPTIONS = {
    "colossal_llama.demo.corpus": ("demo.corpus", "CorpusOptions"),
    "colossal_llama.demo.conversations": ("demo.conversations", "ConversationOptions"),
    "colossal_llama.demo.samples": ("demo.samples", "SampleOptions"),
    "colossal_llama.demo.verification": ("demo.verification", "VerificationOptions"),
    "colossal_llama/tokenizer/train_tokenizer.py": cli.COMMANDS["train-tokenizer"][:2],
    "colossal_llama/tokenizer/analyze_tokenizer.py": cli.COMMANDS["analyze-tokenizer"][:2],
    "colossal_llama/model/init_model.py": cli.COMMANDS["init-model"][:2],
    "prepare_pretrain_dataset.py": cli.COMMANDS["prepare-pretrain-dataset"][:2],
    "prepare_sft_dataset.py": cli.COMMANDS["prepare-sft-dataset"][:2],
    "train.py": cli.COMMANDS["train"][:2],
    "evaluate": cli.COMMANDS["evaluate"][:2],
}


def all_stages() -> list[Stage]:
    return [stage for size in SIZES.values() for stage in stages("demo_out", size)]


@pytest.mark.parametrize("stage", all_stages(), ids=lambda stage: stage.name)
def test_every_command_has_flags_that_its_program_knows(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(PROCESSES))
    (program,) = [word for word in stage.command if word in OPTIONS]
    if program.endswith(".py"):
        assert (ROOT / program).is_file()
    module, name = OPTIONS[program]
    options = getattr(importlib.import_module(f"colossal_llama.{module}"), name)
    arguments = list(stage.command[stage.command.index(program) + 1 :])
    try:
        command.parse(options, arguments)
    except command.UsageError as error:
        # What is said about paths is true: nothing has been made yet.
        assert all("demo_out/" in problem for problem in error.problems)  # noqa: PT017


def test_every_stage_reads_what_an_earlier_one_writes() -> None:
    for size in SIZES.values():
        written = {"demo_out"}
        for stage in stages("demo_out", size):
            outputs = {str(output) for output in stage.outputs}
            words = [part for word in stage.command for part in word.split(",")]
            for path in (word for word in words if word.startswith("demo_out/")):
                known = written | outputs
                assert any(
                    path == root or path.startswith(f"{root}/") for root in known - {"demo_out"}
                )
            assert outputs.isdisjoint(written)
            written |= outputs


def test_names_are_unique_and_every_model_is_evaluated() -> None:
    names = [stage.name for stage in stages("demo_out", SIZES["full"])]
    assert len(set(names)) == len(names)
    assert {f"evaluate-{model}" for model in MODELS} <= set(names)
    assert set(TRAINED) <= set(names)
    assert list(model_paths("demo_out")) == list(MODELS)


def test_both_sizes_have_the_same_stages() -> None:
    full, small = (stages("demo_out", size) for size in SIZES.values())
    assert [stage.name for stage in full] == [stage.name for stage in small]


def test_a_directory_of_somebody_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for flags in ([], ["--overwrite"]):
        assert command.run(DemoOptions, demo_module.demo, ["--out", str(tmp_path), *flags]) == 2
        assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    demo_module.prepare_directory(tmp_path / "out", DemoOptions(out=tmp_path / "out"))
    (tmp_path / "out" / "data").mkdir()
    demo_module.prepare_directory(tmp_path / "out", DemoOptions(out=tmp_path / "out"))
    assert (tmp_path / "out" / "data").exists()
    again = DemoOptions(out=tmp_path / "out", overwrite=True)
    demo_module.prepare_directory(tmp_path / "out", again)
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("name", ["a b", "$HOME", "a;b", "it's", "a,b"])
def test_a_path_that_the_launchers_shell_would_take_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert command.run(DemoOptions, demo_module.demo, ["--out", str(tmp_path / name)]) == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_paths_are_shown_as_seen_from_the_repository(tmp_path: Path) -> None:
    assert as_shown(ROOT / "demo_out") == "demo_out"
    assert as_shown(tmp_path) == str(tmp_path.resolve())


def test_without_the_repository_the_demo_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module, "ROOT", tmp_path)
    assert command.run(DemoOptions, demo_module.demo, ["--out", str(tmp_path / "out")]) == 2
    assert "clone the repository" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missed_mark_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colossal_llama.demo import figures, report

    def collected(met: bool) -> dict[str, Any]:
        mark = {"name": "Chinese bits", "target": "lower", "value": "higher", "met": met}
        return {"marks": [mark], "models": []}

    monkeypatch.setattr(demo_module, "run_stages", lambda *_: [])
    monkeypatch.setattr(demo_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(report, "write_report", lambda _, out: out / "report.html")
    for met, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(figures, "collect", lambda *_, met=met: collected(met))
        arguments = ["--out", str(tmp_path / "out")]
        assert command.run(DemoOptions, demo_module.demo, arguments) == code
        captured = capsys.readouterr()
        assert str(tmp_path / "out" / "report.html") in captured.out
        assert ("Chinese bits" in captured.err) == (not met)


def test_the_demo_process_itself_stays_light() -> None:
    import subprocess

    code = "import colossal_llama.demo.demo, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {"torch", "transformers", "matplotlib"}.isdisjoint(loaded.stdout.split())
