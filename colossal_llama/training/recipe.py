"""Recipes: several stages of training in one YAML file, run one after the other by ``stages.py``.

    variables:                  # each is a flag: --chinese data/zh
      chinese: null             # without a value: the flag is required
      english: data/en
    pretrained: model           # settings of every stage
    save_dir: runs/chinese      # stages are saved in runs/chinese/01-embeddings ...
    plugin: zero2
    stages:
      - name: embeddings
        config: ../stages/embeddings.yaml     # settings from a file, found from this one's folder
        dataset: [$chinese/part-00000]        # settings of this stage, over those of the file
      - name: knowledge
        ...

A setting comes from the command line, or else from the stage, its file, the recipe, or the
flag's default. Nothing heavy is imported: mistakes are told at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama import command
from colossal_llama.errors import UsageError
from colossal_llama.training.arguments import TrainOptions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OF_THE_RECIPE = "stages are saved under the recipe's; give it beside `stages:` or as a flag"
# What a recipe decides by itself, and what it cannot honour; why not, for the user.
_REFUSED = {
    "load_checkpoint": "a recipe sets it itself: a stage that was begun is resumed, another starts "
    "from the weights of the one before it",
    "config_file": "each stage's settings are written to its own directory",
    "overwrite": "a recipe goes on; remove the directories of the stages to train again",
}
_REFUSED_IN_STAGES = {
    **_REFUSED,
    "save_dir": _OF_THE_RECIPE,
    "tensorboard_dir": _OF_THE_RECIPE,
}


@dataclass(frozen=True)
class Stage:
    """One stage; its ``options`` have every setting but the weights to start from."""

    name: str  # with its number: 01-embeddings
    options: TrainOptions


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file and the command line say together."""

    path: Path
    stages: list[Stage]
    keep_finished: bool

    @property
    def save_dir(self) -> Path:
        """Where the stages' directories are."""
        return self.stages[0].options.save_dir.parent


def recipe_path(argv: Sequence[str]) -> Path | None:
    """The file given as ``--config`` if it holds stages; None for one of flags, or for none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    config = parser.parse_known_args(list(argv))[0].config
    if config is None:
        return None
    try:
        content = command.read_mapping(Path(config), "--config")
    except UsageError:
        return None  # whoever reads the flags will say so
    return Path(config) if "stages" in content else None


def read_recipe(
    path: Path,
    argv: Sequence[str],
    prog: str | None = None,
    options_type: type[TrainOptions] = TrainOptions,
) -> Recipe:
    """The recipe in ``path``, with the flags of ``argv`` over it. Paths are not looked at.

    Args:
        options_type: what the stages' options are: those of training, or of a command that has
            flags beside them.

    Raises:
        UsageError: naming every problem of the file and its stages' files at once.
    """
    content = command.read_mapping(path, f"--config {path}")
    variables, entries = _variables(content, path), _entries(content, path)
    trains = options_type is TrainOptions
    if not trains:
        # Other commands look at no data, which is what variables name: its own name will do.
        variables = {name: value or name for name, value in variables.items()}
    set_here = {*content, *set.intersection(*map(set, entries))}
    given = command.given_flags(_flags_type(path, variables, options_type, set_here), argv, prog)
    lacking = [
        f"--{name} is required (a variable of {path})"
        for name, value in variables.items()
        if value is None and name not in given
    ]
    if lacking:
        raise UsageError(lacking)
    variables.update({name: given.pop(name) for name in variables if name in given})
    keep_finished = given.pop("keep_finished", False)
    del given["config"]

    problems: list[str] = _refused(given, _REFUSED, "--") if trains else []
    common: dict[str, Any] = {}
    with _collecting(problems):
        common = _settings(content, variables, str(path), _REFUSED)
    values = {}
    for entry in entries:
        with _collecting(problems):
            own = _stage_settings(entry, variables, path)
            values[entry["name"]] = {**common, **own, **given}
    if not problems:  # only what could be read can be said to be missing
        problems = by_stage({name: command.missing(options_type, v) for name, v in values.items()})
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))  # two stages may share a file
    stages = [
        Stage(f"{number:02d}-{name}", _options(options_type, settings, f"{number:02d}-{name}"))
        for number, (name, settings) in enumerate(values.items(), 1)
    ]
    return Recipe(path, stages, keep_finished)


def stage_problems(stages: Sequence[Stage]) -> list[str]:
    """The problems of all stages' settings; one that all of them have is said once."""
    return by_stage({stage.name: stage.options.problems() for stage in stages})


def by_stage(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """The problems with the names of the stages that have them; one of all stages without."""
    names: dict[str, list[str]] = {}
    for name, found in problems.items():
        for problem in found:
            names.setdefault(problem, []).append(name)
    return [
        problem if len(those) == len(problems) > 1 else f"{', '.join(those)}: {problem}"
        for problem, those in names.items()
    ]


def _variables(content: dict[str, Any], path: Path) -> dict[str, str | None]:
    """Takes the variables out of the recipe: texts by name, None for one without a value."""
    variables = content.pop("variables", None) or {}
    if not isinstance(variables, dict):
        raise UsageError([f"{path}: variables: expected a mapping from names to values"])
    taken = {"config", "help", "keep_finished"}
    for field in dataclasses.fields(TrainOptions):
        taken |= {field.name, *(spelling.lstrip("-") for spelling in field.metadata["names"])}
    problems = []
    for name, value in variables.items():
        where = f"{path}: variables: {name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            problems.append(f"{where}: a name has letters, digits and _ only")
        elif name in taken:
            problems.append(f"{where}: there is a flag --{name} already; choose another name")
        elif isinstance(value, list | dict):
            problems.append(f"{where}: expected a single value, or null for a required flag")
    if problems:
        raise UsageError(problems)
    return {name: None if value is None else str(value) for name, value in variables.items()}


def _entries(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Takes the stages out of the recipe; each has a name of its own."""
    entries = content.pop("stages")
    if not isinstance(entries, list) or not entries:
        raise UsageError([f"{path}: stages: expected a list of stages"])
    problems, names = [], set()
    for number, entry in enumerate(entries, 1):
        where = f"{path}: stage {number}"
        if not isinstance(entry, dict):
            problems.append(f"{where}: expected a mapping from flag names to values")
            continue
        name = str(entry.get("name", ""))
        if not _NAME.fullmatch(name):
            problems.append(
                f"{where}: needs a name of letters, digits and - _ . (name: embeddings)"
            )
        elif name in names:
            problems.append(f"{where}: there is another stage with the name {name}")
        names.add(name)
        if not isinstance(entry.get("config", ""), str):
            problems.append(f"{where}: config: expected the path of a YAML file")
    if problems:
        raise UsageError(problems)
    return [{**entry, "name": str(entry["name"])} for entry in entries]


def _flags_type(
    path: Path,
    variables: Mapping[str, str | None],
    options_type: type[TrainOptions],
    set_here: set[str],
) -> type:
    """The flags of this recipe: the command's, the recipe's variables, and one for recipes.

    A variable without a value is a flag that has to be given, a setting that every stage has here
    is none.
    """
    keep_finished = command.option(
        False, help="go on from finished stages although the recipe has other settings for them now"
    )
    fields: list[tuple[str, Any, Any]] = []
    for name, value in variables.items():
        about = f"variable of the recipe: ${name} in {path.name}"
        flag = command.option(help=about) if value is None else command.option(value, help=about)
        fields.append((name, str, flag))
    fields += command.as_optional(options_type, set_here)
    about = "Runs the stages of" if options_type is TrainOptions else "For each stage of"
    about = f"{about} {path}. Flags are settings of every stage."
    return dataclasses.make_dataclass(
        "RecipeOptions",
        [*fields, ("keep_finished", bool, keep_finished)],
        bases=(options_type,),
        namespace={"__doc__": about},
    )


def _stage_settings(
    entry: dict[str, Any], variables: Mapping[str, str | None], path: Path
) -> dict[str, Any]:
    """The settings of a stage: those beside its name over those of its file."""
    where = f"{path}: stage {entry['name']}"
    own = {name: value for name, value in entry.items() if name not in ("name", "config")}
    values: dict[str, Any] = {}
    problems: list[str] = []
    if "config" in entry:
        with _collecting(problems):
            file = path.parent / _filled(entry["config"], variables, f"{where}: config")
            content = command.read_mapping(file, f"{where}: config {file}")
            values = _settings(content, variables, str(file), _REFUSED_IN_STAGES)
    with _collecting(problems):
        values = {**values, **_settings(own, variables, where, _REFUSED_IN_STAGES)}
    if problems:
        raise UsageError(problems)
    return values


def _settings(
    content: Mapping[str, Any],
    variables: Mapping[str, str | None],
    where: str,
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """YAML as values by field, with the variables put in; raises UsageError with all problems."""
    problems = _refused(content, refused, f"{where}: ")
    filled = {}
    for name, value in content.items():
        with _collecting(problems):
            filled[name] = _filled(value, variables, f"{where}: {name}")
    values: dict[str, Any] = {}
    with _collecting(problems):
        values = command.convert_settings(TrainOptions, filled, where)
    if problems:
        raise UsageError(problems)
    return values


def _filled(value: Any, variables: Mapping[str, str | None], where: str) -> Any:
    """A YAML value in which ``$name`` and ``${name}`` stand for variables, ``$$`` for a ``$``."""
    if isinstance(value, list):
        return [_filled(item, variables, where) for item in value]
    if not isinstance(value, str):
        return value
    template = string.Template(value)
    if not template.is_valid():
        raise UsageError([f"{where}: {value}: after a $ goes a variable's name ($$ for a $)"])
    problems = []
    for name in template.get_identifiers():
        if name not in variables:
            close = difflib.get_close_matches(name, variables, n=1)
            hint = f"did you mean ${close[0]}?" if close else "name it under `variables:`"
            problems.append(f"{where}: there is no variable {name}; {hint}")
    if problems:
        raise UsageError(problems)
    return template.substitute(variables)


def _options(
    options_type: type[TrainOptions], values: dict[str, Any], directory: str
) -> TrainOptions:
    """A stage's options, saved in a directory of its own."""
    # Which checkpoint is loaded is decided when the stage begins.
    options = options_type(**{**values, "load_checkpoint": None})
    events = options.tensorboard_dir
    return dataclasses.replace(
        options,
        save_dir=options.save_dir / directory,
        tensorboard_dir=None if events is None else events / directory,
    )


def _refused(values: Mapping[str, Any], refused: Mapping[str, str], where: str) -> list[str]:
    """A problem for each of ``values`` that a recipe cannot take."""
    return [
        f"{where}{name}: {refused[name]}"
        for name, value in values.items()
        if name in refused and value not in (None, False) and str(value) != "auto"
    ]


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Goes on after a UsageError, with its problems added to ``problems``."""
    try:
        yield
    except UsageError as error:
        problems += error.problems
