"""The command table: every command explains itself at once, in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossal_llama import __version__, cli, command
from colossal_llama.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "colossal_llama"
RUNNABLE = [
    path
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")]
    if "\nif __name__ ==" in path.read_text(encoding="utf-8")
]
# Each takes longer to import than --help may take; "transformers" alone takes seconds.
HEAVY = {
    *("torch", "transformers", "datasets", "tokenizers", "colossalai", "sentencepiece"),
    *("numpy", "pyarrow", "safetensors", "matplotlib"),
}
SECONDS = 2.0  # an idle machine needs a fifth of one


def help_of(arguments: list[str]) -> str:
    """What ``--help`` prints, after checking how it was answered."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments, "--help"],
        cwd=ROOT, capture_output=True, text=True, env={"COLUMNS": "100000"}, timeout=60,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported, "the list of imports is not what it was taken for"
    assert not imported & HEAVY
    assert seconds < SECONDS
    return done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_explains_every_flag_at_once(name: str) -> None:
    text = help_of(["-m", "colossal_llama.cli", *name.split()])
    assert f"usage: colossal-llama {name}" in text
    module, options_name, _, _ = cli.COMMANDS[name]
    options = getattr(importlib.import_module(f"colossal_llama.{module}"), options_name)
    # From each flag to what is said about it, whether beside it or on the lines below.
    blocks = [" ".join(block.split()) for block in re.split(r"\n  (?=[-A-Z])|\n\n", text)]
    about = {block.split()[0].rstrip(","): block for block in blocks if block}
    for field in dataclasses.fields(options):
        block = about[command._spelling(field)]
        assert str(field.metadata["help"]) in block
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = ",".join(map(str, field.default_factory()))
        if default is command._REQUIRED:
            assert block.endswith("(required)")
        elif default is not None and default != "":
            assert block.endswith(f"(default: {default})")


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_runnable_file_explains_itself_at_once(path: Path) -> None:
    assert "usage:" in help_of([str(path)])


def test_no_module_hides_another() -> None:
    """A runnable file's folder comes first in ``sys.path``; its siblings are imported by name."""
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    for folder in {path.parent for path in RUNNABLE}:
        modules = {path.stem for path in folder.glob("*.py")}
        modules |= {path.parent.name for path in folder.glob("*/__init__.py")}
        assert not (modules & taken) - {"__init__", "colossal_llama"}, folder


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_without_flags_says_what_it_needs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options_name, function, _ = cli.COMMANDS[name]
    options = getattr(importlib.import_module(f"colossal_llama.{module}"), options_name)
    assert callable(getattr(importlib.import_module(f"colossal_llama.{module}"), function))
    if all(field.default is not command._REQUIRED for field in dataclasses.fields(options)):
        command.parse(options, [])
        return
    with pytest.raises(UsageError) as caught:
        command.parse(options, [])
    assert cli.main(name.split()) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (*_, summary) in cli.COMMANDS.items():
        assert f"{name} " in text
        assert summary in text
    assert cli.main([]) == 2


def test_a_group_lists_its_commands_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    groups = {name.split()[0] for name in cli.COMMANDS if " " in name}
    assert "data" in groups
    for group in groups:
        assert cli.main([group]) == 2
        text = capsys.readouterr().out
        assert cli.main([group, "--help"]) == 0
        assert capsys.readouterr().out == text
        assert text.startswith(f"usage: colossal-llama {group} COMMAND")
        for name, (*_, summary) in cli.COMMANDS.items():
            assert (summary in text) == name.startswith(f"{group} ")
        assert cli.main([group, "nonsense"]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: unknown command {group} nonsense; there are: ")
        assert "doctor" not in printed.err
        assert printed.out == ""


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: unknown command trian")
    assert "train" in printed.err
    assert printed.out == ""
