"""A command is a typed dataclass plus a function.

The dataclass is the only place where a flag, its default, its help and its check live:

    @dataclass
    class CountOptions:
        path: Path = option(help="text file to read")
        top: int = option(10, help="how many words to print")

        def problems(self) -> list[str]:
            return [] if self.top > 0 else ["--top must be positive"]

    if __name__ == "__main__":
        sys.exit(run(CountOptions, count))

Every field becomes ``--name``, or an argument without a flag if it is ``positional``. Where there
are many, ``SECTIONS: ClassVar[dict[str, str]]`` names the fields with which a section of ``--help``
begins, and its title. Every command also takes ``--config run.yaml``, a mapping from field names to
values, which flags override. This module imports nothing heavy: ``--help`` has to answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import functools
import inspect
import itertools
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from colossal_llama.errors import ColossalLlamaError, ProcessError, UsageError

Options = TypeVar("Options")

_REQUIRED: Any = object()
_TIME_TO_SPEAK = 3.0  # seconds
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}

# What a user can mend: a path, a right, a disk. A full disk often has no path to name.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MENDABLE = FULL | {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG),
}


def option(
    default: Any = _REQUIRED,
    *,
    help: str,
    names: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    comma: bool = False,
    positional: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: value when the flag is absent; without one the flag is required.
        help: what the flag does, in one sentence; the default is added by ``--help``.
        names: further spellings, e.g. ``("-w", "--weight_decay")``.
        choices: the allowed values.
        comma: for list fields: one comma-separated value instead of several values.
        positional: given without a flag, one value or, for a list field, all of them. ``--config``
            knows it by its name.
    """
    metadata = {"help": help, "names": tuple(names), "choices": choices, "comma": comma}
    metadata["positional"] = positional
    if default is _REQUIRED:
        return dataclasses.field(default=_REQUIRED, metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def run(
    options_type: type[Options],
    function: Callable[[Options], int | None],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Parses ``argv`` into ``options_type`` and calls ``function`` with it; see ``exit_code``."""
    return exit_code(lambda: function(parse(options_type, argv, prog)))


def exit_code(function: Callable[[], int | None]) -> int:
    """Calls ``function`` and turns what it raises into what a command prints.

    Returns the exit code: what ``function`` returned (None counts as 0), 2 for a user's
    mistake or for files and disks that a user can mend (printed as one line), 1 where another
    process is gone (also one line), 130 after Ctrl-C.
    """
    try:
        return function() or 0
    except ColossalLlamaError as error:
        # Under a launcher every process meets the same mistake; one per machine says so.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, ProcessError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun ends all processes when the first has failed: not before one has said why.
            time.sleep(_TIME_TO_SPEAK)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        if not _is_mendable(error):
            raise
        # A disk or a right is a matter of one machine: every process speaks for itself.
        path = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {path}{error.strerror}", file=sys.stderr, flush=True)
        return 2


def _is_mendable(error: OSError) -> bool:
    return error.errno in FULL or (error.errno in _MENDABLE and error.filename is not None)


def parse(
    options_type: type[Options], argv: Sequence[str] | None = None, prog: str | None = None
) -> Options:
    """Builds the options from the command line and, under it, from ``--config``.

    Raises:
        UsageError: naming every problem at once.
    """
    given = given_flags(options_type, argv, prog)
    config = given.pop("config", None)
    return build(options_type, {**(_read_config(options_type, config) if config else {}), **given})


def given_flags(
    options_type: type, argv: Sequence[str] | None = None, prog: str | None = None
) -> dict[str, Any]:
    """The values that stand on the command line, by field; under ``config`` the path of that.

    Raises:
        UsageError: a flag is unknown, or its value is not of its kind.
    """
    parser = _parser(options_type, prog)
    arguments = _with_bare_booleans(options_type, sys.argv[1:] if argv is None else argv)
    found = vars(parser.parse_args(arguments))
    for field in _fields(options_type):
        # argparse makes an empty list of positional arguments that are absent.
        if field.metadata["positional"] and found[field.name] == []:
            del found[field.name]
    return {name: value for name, value in found.items() if value is not None}


def build(options_type: type[Options], values: dict[str, Any]) -> Options:
    """The options with ``values`` (by field, already of the fields' types), and checked.

    Raises:
        UsageError: naming every problem at once.
    """
    lacking = missing(options_type, values)
    if lacking:
        raise UsageError(lacking)
    options = options_type(**values)
    problems = options.problems() if hasattr(options, "problems") else []
    if problems:
        raise UsageError(problems)
    return options


def missing(options_type: type, values: dict[str, Any]) -> list[str]:
    """A problem for each required flag that has no value."""
    return [
        f"{_spelling(field)} is required"
        for field in _fields(options_type)
        if field.default is _REQUIRED and field.name not in values
    ]


def as_optional(options_type: type, names: Collection[str]) -> list[tuple[str, Any, Any]]:
    """Those of the required flags that are among ``names``, as flags that may be left out.

    For ``dataclasses.make_dataclass``, with ``options_type`` as the base.
    """
    return [
        (field.name, _types(options_type)[field.name], option(None, help=field.metadata["help"]))
        for field in _fields(options_type)
        if field.default is _REQUIRED and field.name in names
    ]


def as_dict(options: Any) -> dict[str, Any]:
    """The options as plain values: written as YAML, they are a ``--config`` that reruns them."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {
        field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options)
    }


def check_config(options: Any) -> None:
    """Asserts that the options can be written and read again (an invariant of ours)."""
    assert type(options)(**convert_settings(type(options), as_dict(options), "options")) == options


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as an exception, so that all commands print it in the same way."""

    def error(self, message: str) -> NoReturn:
        raise UsageError([f"{message} (see {self.prog} --help)"])


def _parser(options_type: type, prog: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=inspect.cleandoc(options_type.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of flags; flags given here override it")
    sections: dict[str, str] = getattr(options_type, "SECTIONS", {})
    if sections:  # too many to be listed twice
        parser.usage = " ".join([parser.prog, *_required(options_type), "[--flags]"])
    section: argparse._ActionsContainer = parser
    for field in _fields(options_type):
        if field.name in sections:
            section = parser.add_argument_group(sections[field.name])
        convert, is_list, is_bool = _converter(options_type, field)
        settings: dict[str, Any] = {"help": _help(field), "type": convert, "dest": field.name}
        if field.metadata["choices"]:
            settings["choices"] = list(field.metadata["choices"])
        else:
            settings["metavar"] = "true|false" if is_bool else field.name.upper()
        if is_list and not field.metadata["comma"]:
            settings["nargs"] = "+"
        if is_bool:
            settings.update(nargs="?", const=True)
        if field.metadata["positional"]:
            assert not field.metadata["comma"]
            assert not is_bool
            del settings["dest"]
            # It may stand in --config alone; the default SUPPRESS would come back as its value.
            settings.update(nargs="*" if is_list else "?", default=None)
            section.add_argument(field.name, **settings)
        else:
            section.add_argument(f"--{field.name}", *field.metadata["names"], **settings)
    return parser


def _required(options_type: type) -> list[str]:
    """The flags that have to be given, as a usage line shows them."""
    required = [field for field in _fields(options_type) if field.default is _REQUIRED]
    return [f"{_spelling(field)} {field.name.upper()}" for field in required]


def _with_bare_booleans(options_type: type, argv: Sequence[str]) -> list[str]:
    """``argv`` in which a bare boolean flag does not take a positional argument for its value."""
    fields = _fields(options_type)
    if not any(field.metadata["positional"] for field in fields):
        return list(argv)
    flags = {
        spelling
        for field in fields
        if _converter(options_type, field)[2]
        for spelling in (f"--{field.name}", *field.metadata["names"])
    }
    return [
        f"{word}=true" if word in flags and following.lower() not in _TRUE | _FALSE else word
        for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="")
    ]


def _spelling(field: dataclasses.Field[Any]) -> str:
    return field.name.upper() if field.metadata["positional"] else f"--{field.name}"


def _fields(options_type: type) -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(options_type))


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    if field.default is _REQUIRED:
        return f"{text} (required)"
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = ",".join(map(str, field.default_factory()))
    return text if default is None or default == "" else f"{text} (default: {default})"


@functools.cache
def _types(options_type: type) -> dict[str, Any]:
    return typing.get_type_hints(options_type)


def _converter(
    options_type: type, field: dataclasses.Field[Any]
) -> tuple[Callable[[str], Any], bool, bool]:
    """From a field's type: (text to value, is it a list, is it a boolean)."""
    kind = _types(options_type)[field.name]
    if isinstance(kind, types.UnionType):
        (kind,) = [member for member in typing.get_args(kind) if member is not type(None)]
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        if field.metadata["comma"]:
            return _comma_separated(item), True, False
        return item, True, False
    return (_boolean, False, True) if kind is bool else (kind, False, False)


def _comma_separated(item: type) -> Callable[[str], list[Any]]:
    def convert(text: str) -> list[Any]:
        return [item(part) for part in text.split(",") if part]

    convert.__name__ = f"comma-separated {item.__name__}"  # argparse names it in errors
    return convert


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def read_mapping(path: Path, where: str) -> dict[str, Any]:
    """The mapping that a YAML file holds, as it stands there.

    Raises:
        UsageError: the file cannot be read, or holds no mapping; says ``where`` it was named.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _refuse_doubles(yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError([f"{where}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise UsageError([f"{where}: not UTF-8 text"]) from None
    except yaml.YAMLError as error:
        raise UsageError([f"{where}: not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, dict):
        raise UsageError([f"{where}: expected a mapping from flag names to values"])
    return content


def _refuse_doubles(node: Any) -> None:
    """Of two settings with one name the last would win in silence."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item)
    if not isinstance(node, yaml.MappingNode):
        return
    names = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        _refuse_doubles(value)


def convert_settings(options_type: type, content: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings from YAML as values by field, converted in the same way as flags.

    Raises:
        UsageError: naming every unknown setting and every value that does not fit, and ``where``.
    """
    fields = {
        spelling.lstrip("-"): field
        for field in _fields(options_type)
        for spelling in (field.name, *field.metadata["names"])
    }
    values, problems = {}, []
    for name, value in content.items():
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            problems.append(f"{where}: unknown setting {name}{hint}")
            continue
        try:
            values[fields[name].name] = _convert(options_type, fields[name], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            problems.append(f"{where}: {name}: {error}")
    if problems:
        raise UsageError(problems)
    return values


def _read_config(options_type: type, path: str) -> dict[str, Any]:
    where = f"--config {path}"
    return convert_settings(options_type, read_mapping(Path(path), where), where)


def _convert(options_type: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """A YAML value as the field's type, by the same conversion as on the command line."""
    if value is None:
        if field.default is None:
            return None
        raise ValueError("needs a value")
    convert, is_list, is_boolean = _converter(options_type, field)
    if isinstance(value, bool) and not is_boolean:
        raise ValueError("YAML takes this word for true or false: put it in quotes")
    choices = field.metadata["choices"]
    if choices and str(value) not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
    if is_list:
        if field.metadata["comma"]:
            parts = value if isinstance(value, list) else [value]
            return convert(",".join(map(str, parts)))
        if not isinstance(value, list):
            raise ValueError("expected a list")
        return [convert(str(item)) for item in value]
    if isinstance(value, list | dict):
        raise ValueError("expected a single value")
    return convert(str(value))
