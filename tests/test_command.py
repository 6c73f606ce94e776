"""Flags: from the command line, from YAML, back to YAML; and how mistakes are reported."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from colossal_llama import command
from colossal_llama.command import option
from colossal_llama.errors import DataError, UsageError


@dataclass
class Options:
    """Options of every kind a command uses."""

    path: Path = option(help="required")
    size: int = option(1, help="a count of 100 %", names=("-s", "--amount"))
    rate: float = option(0.5, help="a number")
    flag: bool = option(False, help="a boolean")
    other_flag: bool = option(True, help="a boolean that is on")
    mode: str = option("soft", help="one of two", choices=("soft", "hard"))
    paths: list[Path] = option([], help="several values")
    letters: list[str] = option(["a", "b"], help="a comma list", comma=True)
    limit: int | None = option(None, help="may be absent")

    def problems(self) -> list[str]:
        found = [] if self.size > 0 else ["--size must be positive"]
        return found + ([] if self.rate > 0 else ["--rate must be positive"])


@dataclass
class SectionedOptions:
    """Options in two sections."""

    SECTIONS: ClassVar[dict[str, str]] = {"first": "numbers", "name": "texts"}

    first: int = option(1, help="a number")
    second: int = option(2, help="another number")
    name: str = option("a", help="a text")


def test_help_has_the_sections_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(SectionedOptions, ["--help"])
    _, numbers, texts = re.split("^numbers:|^texts:", capsys.readouterr().out, flags=re.MULTILINE)
    assert ("--first" in numbers, "--second" in numbers, "--name" in numbers) == (True, True, False)
    assert "--name" in texts
    assert command.parse(SectionedOptions, ["--second", "5"]) == SectionedOptions(second=5)


def parse(*argv: str) -> Options:
    return command.parse(Options, ["--path", "p", *argv])


def parse_yaml(tmp_path: Path, text: str, *argv: str) -> Options:
    config = tmp_path / "run.yaml"
    config.write_text(text, encoding="utf-8")
    return command.parse(Options, ["--config", str(config), *argv])


def problems_of(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse_yaml(tmp_path, text)
    return caught.value.problems


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "1"])
def test_true_means_true(tmp_path: Path, text: str) -> None:
    assert parse("--flag", text).flag is True
    assert parse_yaml(tmp_path, f"{{path: p, flag: {text}}}").flag is True


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "0"])
def test_false_means_false(tmp_path: Path, text: str) -> None:
    assert parse("--other_flag", text).other_flag is False
    assert parse_yaml(tmp_path, f"{{path: p, other_flag: {text}}}").other_flag is False


def test_a_bare_flag_is_true_and_an_absent_one_its_default() -> None:
    assert parse("--flag").flag is True
    assert parse("--flag", "--size", "3") == parse("--size", "3", "--flag", "true")
    assert (parse().flag, parse().other_flag) == (False, True)


@pytest.mark.parametrize(
    "argv",
    [
        ["--flag", "maybe"],
        ["--size", "three"],
        ["--mode", "medium"],
        ["--fla", "true"],
        ["--unknown", "1"],
        ["--paths"],
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert argv[0].lstrip("-") in str(caught.value)
    assert "--help" in str(caught.value)


def test_missing_required_flag_is_named() -> None:
    with pytest.raises(UsageError, match="--path is required"):
        command.parse(Options, [])


def test_all_problems_are_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--path", "p", "--size", "0", "--rate", "-1"]
    assert command.run(Options, lambda options: 0, argv) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: --size must be positive; --rate must be positive\n"
    assert printed.out == ""


def test_lists_take_several_values_and_comma_lists_one() -> None:
    options = parse("--paths", "x", "y", "--letters", "c,d,e")
    assert options.paths == [Path("x"), Path("y")]
    assert options.letters == ["c", "d", "e"]
    assert parse().letters == ["a", "b"]
    assert parse("--letters", "").letters == []


def test_default_lists_are_not_shared() -> None:
    parse().letters.append("z")
    assert parse().letters == ["a", "b"]


def test_every_spelling_works_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    for spelling in ("-s", "--amount", "--size"):
        assert parse(spelling, "7").size == 7
        assert parse_yaml(tmp_path, f"{{path: p, {spelling.lstrip('-')}: 7}}").size == 7


def test_flags_override_the_config_and_the_config_the_defaults(tmp_path: Path) -> None:
    options = parse_yaml(tmp_path, "{path: q, size: 5, rate: 2}", "--size", "6")
    assert (options.path, options.size, options.rate) == (Path("q"), 6, 2.0)
    assert options.mode == "soft"


def test_unknown_setting_comes_with_a_suggestion(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "{path: p, lettres: [a]}")
    assert problem.endswith("unknown setting lettres, did you mean letters?")
    assert "run.yaml" in problem


def test_all_problems_of_a_config_are_reported_together(tmp_path: Path) -> None:
    text = "{pth: p, size: many, mode: medium, flag: perhaps, paths: x, rate: null, path: [p]}"
    found = problems_of(tmp_path, text)
    assert len(found) == 7
    for name in ("pth", "size", "mode", "flag", "paths", "rate", "path"):
        assert any(f": {name}: " in line or f"setting {name}," in line for line in found), name


@pytest.mark.parametrize("text", ["- a list", "just text", "a: [1", ""])
def test_config_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert "run.yaml" in problem
    assert "\n" not in problem


def test_config_that_is_no_text(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_bytes(b"path: \xff")
    with pytest.raises(UsageError, match=r"--config .*run.yaml: not UTF-8 text"):
        command.parse(Options, ["--config", str(config)])


def test_a_config_may_be_read_and_built_in_two_steps() -> None:
    values = command.convert_settings(Options, {"size": "3", "s": 4, "paths": ["a"]}, "here")
    assert values == {"size": 4, "paths": [Path("a")]}
    assert command.missing(Options, values) == ["--path is required"]
    flags = command.given_flags(Options, ["--path", "p", "--config", "run.yaml"])
    assert flags == {"path": Path("p"), "config": "run.yaml"}, "no defaults among them"
    del flags["config"]
    assert command.build(Options, {**values, **flags}) == parse("--size", "4", "--paths", "a")


def test_config_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml: No such file"):
        command.parse(Options, ["--config", "absent.yaml"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--flag", "--other_flag", "false", "--limit", "3", "--rate", "1e-07"],
        ["--paths", "a b", "ü, c", "--letters", "x,y", "--mode", "hard", "--size", "12"],
    ],
)
def test_written_options_read_back_as_the_same(tmp_path: Path, argv: list[str]) -> None:
    options = parse(*argv)
    command.check_config(options)
    assert parse_yaml(tmp_path, json.dumps(command.as_dict(options))) == options


def test_help_says_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(Options, lambda options: 0, ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--path PATH required (required)",
        "a count of 100 % (default: 1)",
        "(default: 0.5)",
        "(default: False)",
        "{soft,hard} one of two (default: soft)",
        "a comma list (default: a,b)",
        "may be absent",
        "--config",
    ):
        assert part in text, part


@dataclass
class LookOptions:
    """Options with an argument that needs no flag."""

    place: Path = option(help="where to look", positional=True)
    deep: bool = option(False, help="a boolean", names=("-d",))
    size: int = option(1, help="a count")


@pytest.mark.parametrize(
    "argv",
    [
        ["here", "--deep", "--size", "3"],
        ["--deep", "here", "--size", "3"],
        ["-d", "here", "--size=3"],
        ["--size", "3", "--deep", "here"],
        ["--size", "3", "here", "--deep", "true"],
        ["--deep=true", "--size", "3", "here"],
    ],
)
def test_a_positional_argument_stands_anywhere(argv: list[str]) -> None:
    assert command.parse(LookOptions, argv) == LookOptions(Path("here"), deep=True, size=3)


def test_a_flag_may_still_be_told_its_value_before_a_positional_argument() -> None:
    assert command.parse(LookOptions, ["--deep", "no", "here"]) == LookOptions(Path("here"))


def test_a_positional_argument_is_a_setting_like_any_other(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{place: there, deep: true}", encoding="utf-8")
    argv = ["--config", str(config)]
    assert command.parse(LookOptions, argv) == LookOptions(Path("there"), deep=True)
    assert command.parse(LookOptions, ["here", *argv]) == LookOptions(Path("here"), deep=True)
    options = LookOptions(Path("here"), size=2)
    config.write_text(json.dumps(command.as_dict(options)), encoding="utf-8")
    assert command.parse(LookOptions, argv) == options


def test_a_missing_or_second_positional_argument_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match=r"^PLACE is required$"):
        command.parse(LookOptions, ["--deep"])
    with pytest.raises(UsageError, match="there"):
        command.parse(LookOptions, ["here", "there"])
    with pytest.raises(SystemExit):
        command.parse(LookOptions, ["--help"])
    assert "PLACE where to look (required)" in " ".join(capsys.readouterr().out.split())


@dataclass
class CompareOptions:
    """Options with any number of arguments that need no flag."""

    places: list[Path] = option(help="where to look", positional=True)
    deep: bool = option(False, help="a boolean")
    size: int = option(1, help="a count")


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "b c", "--deep", "--size", "3"],
        ["--deep", "a", "b c", "--size", "3"],
        ["--size", "3", "--deep", "a", "b c"],
        ["--size=3", "--deep=true", "a", "b c"],
        ["--size", "3", "--deep", "--", "a", "b c"],
    ],
)
def test_positional_arguments_stand_together_anywhere(argv: list[str]) -> None:
    expected = CompareOptions([Path("a"), Path("b c")], deep=True, size=3)
    assert command.parse(CompareOptions, argv) == expected


def test_positional_arguments_are_a_setting_like_any_other(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{places: [x, y], deep: true}", encoding="utf-8")
    argv = ["--config", str(config)]
    expected = CompareOptions([Path("x"), Path("y")], deep=True)
    assert command.parse(CompareOptions, argv) == expected
    assert command.parse(CompareOptions, ["z", *argv]).places == [Path("z")]
    options = CompareOptions([Path("a")], size=2)
    config.write_text(json.dumps(command.as_dict(options)), encoding="utf-8")
    assert command.parse(CompareOptions, argv) == options
    config.write_text("{places: x}", encoding="utf-8")
    with pytest.raises(UsageError, match="places: expected a list"):
        command.parse(CompareOptions, argv)


def test_missing_positional_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"^PLACES is required$"):
        command.parse(CompareOptions, ["--deep"])
    with pytest.raises(SystemExit):
        command.parse(CompareOptions, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "PLACES where to look (required)" in text
    assert "[PLACES ...]" in text


@dataclass
class ReadOptions:
    """Options that do without their arguments."""

    places: list[Path] = option([Path("here")], help="where to look", positional=True)


def test_positional_arguments_may_have_a_default() -> None:
    assert command.parse(ReadOptions, []).places == [Path("here")]
    assert command.parse(ReadOptions, ["a", "b"]).places == [Path("a"), Path("b")]


def run_raising(error: BaseException) -> int:
    def function(options: Any) -> None:
        raise error

    return command.run(Options, function, ["--path", "p"])


@pytest.mark.parametrize(
    "number",
    [
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    ],
)
def test_file_errors_are_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(OSError(number, os.strerror(number), "some/file")) == 2
    assert capsys.readouterr().err == f"error: some/file: {os.strerror(number)}\n"


def test_a_full_disk_is_one_line_though_it_names_no_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fill(options: Any) -> None:
        with open("/dev/full", "w", encoding="utf-8") as stream:
            stream.write("x" * 100_000)

    assert command.run(Options, fill, ["--path", "p"]) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "Bad file descriptor", "some/file"),
        OSError(errno.ENOENT, "No such file or directory"),
        OSError("a library's own"),
        ValueError("a bug"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_raising(error)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(Options, lambda options: None, ["--path", "p"]) == 0
    assert command.run(Options, lambda options: 7, ["--path", "p"]) == 7
    assert run_raising(KeyboardInterrupt()) == 130
    assert run_raising(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 141
    assert capsys.readouterr().err == "interrupted\n"


def test_one_process_a_machine_reports_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for local_rank, printed in (("0", "error: bad line\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert run_raising(DataError("bad line")) == 2
        assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size: 1\nsize: 2\n", "size is there twice"),
        ("paths: [{a: 1, a: 2}]\n", "a is there twice"),
        ("? [a, b]\n: 1\n", "not YAML: .* unhashable key"),
        ("letters: no\n", "letters: YAML takes this word for true or false: put it in quotes"),
    ],
)
def test_what_yaml_would_take_in_silence(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(UsageError, match=words) as found:
        parse("--config", str(config))
    assert str(config) in str(found.value)
