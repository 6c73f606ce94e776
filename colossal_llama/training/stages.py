"""Runs the stages of a recipe, each from the last one's weights; skips those that are finished."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from colossal_llama.dataset.loader import VERIFY_OFF, VERIFY_SIZE, check_apart, open_parts
from colossal_llama.errors import DataError, UsageError
from colossal_llama.runtime.distributed import distributed, world_size
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.parameters import check_names
from colossal_llama.training.recipe import Recipe, Stage, by_stage, read_recipe, stage_problems
from colossal_llama.training.save_dir import changed_settings
from colossal_llama.training.state import newest_checkpoint, read_running_state
from colossal_llama.training.step_count import check_enough, rows_of_a_step


def run_recipe(
    path: Path,
    train: Callable[..., int],
    argv: Sequence[str],
    prog: str | None = None,
) -> int:
    """Runs what is left of the recipe in ``path``; returns the exit code.

    That is the code of the last stage that ran: 0 if the recipe is finished, another if a stage
    was stopped early. The same call goes on where it was stopped.

    Args:
        train: runs one stage and returns its exit code; takes its options, when the time of
            ``--max_time``, which is that of all stages together, began (``time.monotonic``), and
            as ``more_follows`` whether it is not the last.

    Raises:
        UsageError: naming the problems of all stages, before the first begins.
    """
    started = time.monotonic()
    recipe = read_recipe(path, argv, prog)
    finished = [stage for stage in recipe.stages if is_finished(stage)]
    left = [stage for stage in recipe.stages if stage not in finished]
    problems = _order_problems(recipe, finished) + stage_problems(left)
    if not recipe.keep_finished:
        problems += _finished_problems(recipe, finished)
    if problems := problems or _data_problems(left):
        raise UsageError(problems)
    for stage in finished:
        _say(f"{_title(recipe, stage)}: finished, skipped ({stage.options.save_dir})")
    if not left:
        return 0
    with distributed(left[0].options.seed):
        for stage in left:
            code = train(_ready(recipe, stage), started, more_follows=stage is not left[-1])
            if code:
                _say(f"{_title(recipe, stage)}: stopped; the same command goes on from there")
                return code
    _say(f"{recipe.path}: all {len(recipe.stages)} stages are finished")
    return 0


def is_finished(stage: Stage) -> bool:
    """Whether a stage took all its steps."""
    checkpoint = newest_checkpoint(stage.options.save_dir)
    return checkpoint is not None and read_running_state(checkpoint).finished


def _ready(recipe: Recipe, stage: Stage) -> TrainOptions:
    """The options of a stage with the weights or the checkpoint that it begins from.

    The first process looks and tells the others: on a shared file system they may see late what
    it has just written. Random numbers start anew, so that a stage's do not depend on whether the
    ones before it ran in the same process.
    """
    import torch.distributed as dist
    from colossalai.utils import set_seed

    found: list[Path | None] = [_start(recipe, stage)] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(found, src=0)
    (start,) = found
    title = _title(recipe, stage)
    if start is None:
        _say(f"{title}: starts from {stage.options.pretrained}")
    elif start.parent == stage.options.save_dir:
        changes = changed_settings(stage.options)
        aside = f", with changed settings: {', '.join(changes)}" if changes else ""
        _say(f"{title}: goes on from {start}{aside}")
    else:
        _say(f"{title}: starts from {start}")
    set_seed(stage.options.seed)
    return dataclasses.replace(stage.options, load_checkpoint=None if start is None else str(start))


def _start(recipe: Recipe, stage: Stage) -> Path | None:
    """Its own newest checkpoint, or the last stage's weights, or nothing for the first stage."""
    own = newest_checkpoint(stage.options.save_dir)
    number = recipe.stages.index(stage)
    if own is not None or number == 0:
        return own
    before = newest_checkpoint(recipe.stages[number - 1].options.save_dir)
    assert before is not None, "the stage before has just finished"
    return before / "modeling"


def _order_problems(recipe: Recipe, finished: list[Stage]) -> list[str]:
    """What lies in the directory of the recipe that does not fit its list of stages."""
    found = []
    names = {stage.name for stage in recipe.stages}
    for path in sorted(recipe.save_dir.glob("[0-9][0-9]-*")):
        if path.name not in names and newest_checkpoint(path) is not None:
            found.append(
                f"{path} is no stage of {recipe.path}: were stages renamed or moved? Choose "
                "another --save_dir, or rename or remove the directory"
            )
    unfinished = next((stage for stage in recipe.stages if stage not in finished), None)
    if unfinished is None:
        return found
    for stage in recipe.stages[recipe.stages.index(unfinished) + 1 :]:
        if newest_checkpoint(stage.options.save_dir) is not None:
            found.append(
                f"{stage.options.save_dir} was begun, but {unfinished.name} before it is not "
                "finished: remove it, so that it starts from the new weights"
            )
    return found


def _finished_problems(recipe: Recipe, finished: list[Stage]) -> list[str]:
    changed = [
        f"{stage.options.save_dir} ({', '.join(changes)})"
        for stage in finished
        if (changes := changed_settings(stage.options))
    ]
    if not changed:
        return []
    return [
        f"{recipe.path} has other settings now than finished stages were trained with: "
        f"{', '.join(changed)}; restore them, give --keep_finished to go on from what is "
        "finished, or remove these directories and those of later stages to train them again"
    ]


def _data_problems(stages: list[Stage]) -> list[str]:
    """What does not fit in a later stage should not be found out when the earlier is done."""
    found: dict[str, list[str]] = {stage.name: [] for stage in stages}
    for stage in stages:
        try:
            _check_data(stage.options)
            check_names(stage.options)
        except (DataError, UsageError) as error:
            found[stage.name].append(str(error))
    return by_stage(found)


def _check_data(options: TrainOptions) -> None:
    """Raises DataError, as the stage itself would."""
    verify = VERIFY_OFF if options.verify_data == VERIFY_OFF else VERIFY_SIZE
    rest = options.pretrained, options.max_length, verify
    rows = open_parts(options.dataset, *rest)
    check_enough(options, len(rows), rows_of_a_step(options, rows.manifest, world_size()))
    if options.eval_dataset:
        check_apart(open_parts(options.eval_dataset, *rest), rows)


def _title(recipe: Recipe, stage: Stage) -> str:
    number = recipe.stages.index(stage) + 1
    return f"stage {number} of {len(recipe.stages)}, {stage.name}"


def _say(text: str) -> None:
    """Prints a line, once for all processes, with or without a process group."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
