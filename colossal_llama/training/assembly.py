"""Puts a trainer together: data, model, plugin, optimizer, and the state of a resumed run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator

from colossal_llama import command, storage
from colossal_llama.dataset.loader import TrainingRows
from colossal_llama.durations import seconds_of
from colossal_llama.errors import DataError, UsageError, agreed
from colossal_llama.runtime.distributed import patient_group
from colossal_llama.runtime.watchdog import Watchdog, open_store
from colossal_llama.training import parameters
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.boosting import Boosted, boost, build_passes
from colossal_llama.training.callbacks import Callback
from colossal_llama.training.checkpoint import CheckpointFiles, raise_on_all
from colossal_llama.training.checkpointing import Checkpointer, Stopper
from colossal_llama.training.data import build_sampler, describe_mixture, open_rows
from colossal_llama.training.evaluation import Evaluator
from colossal_llama.training.export import Exporter
from colossal_llama.training.guards import NonFiniteGuard, SpikeGuard
from colossal_llama.training.loading import (
    load_model,
    load_tokenizer,
    warn_of_slow_precision,
)
from colossal_llama.training.lora import add_adapter
from colossal_llama.training.optimizer_shares import named_shares
from colossal_llama.training.reporting import RunLog
from colossal_llama.training.resuming import (
    find_beginning,
    initial_state,
    resume,
    weights_directory,
)
from colossal_llama.training.save_dir import config_file
from colossal_llama.training.schedule import Schedule, build_schedule, schedule_problems
from colossal_llama.training.state import RunningState, goes_on_in
from colossal_llama.training.step_count import (
    accumulation_steps,
    check_enough,
    last_step,
    rows_of_a_step,
)
from colossal_llama.training.throughput import Throughput
from colossal_llama.training.trainer import LogSteps, Trainer
from colossal_llama.training.validation import Validation, open_validation


def build_trainer(options: TrainOptions, started: float) -> Trainer:
    """Loads and checks everything ``options`` name. Needs a process group.

    Args:
        started: when the run began, as ``time.monotonic`` counts; ``--max_time`` runs from then.

    Raises:
        DataError: data, tokenizer, model or checkpoint do not fit each other.
        UsageError: flags do not fit the model or the length of the run.
    """
    warn_of_slow_precision(options.mixed_precision)
    parameters.check_names(options)
    rows = open_rows(options)
    validation = open_validation(options, rows)
    tokenizer = load_tokenizer(options, rows.manifest)
    options, resumed, start = find_beginning(options)
    state = initial_state(options, rows.fingerprints, resumed)
    batch_size, total_steps = _count(options, rows, state)
    weights = weights_directory(options, resumed)
    model = load_model(options, weights, len(tokenizer))
    adapter = add_adapter(options, model, weights, resumed) if options.lora_rank else None
    parameters.freeze(options, model)
    throughput = Throughput(model, rows.longest_row, options.mixed_precision)
    boosted = boost(options, model, accumulation_steps(options, rows.manifest))
    if resumed is not None:
        resume(resumed, state, boosted)
    passes = build_passes(options, boosted, rows, tokenizer)
    log = open_log(options, state, total_steps, start)
    schedule = build_schedule(options, total_steps)
    exporter = Exporter(boosted.booster, boosted.model, tokenizer, adapter)
    files = _checkpoint_files(options, boosted, schedule, exporter)
    trainer = Trainer(
        model=boosted.model,
        optimizer=boosted.optimizer,
        passes=passes,
        batches=passes.batches,
        sampler=build_sampler(options, rows, batch_size),
        schedule=schedule,
        layout=boosted.layout,
        state=state,
        callbacks=build_callbacks(options, files, started, validation),
        log=log,
        throughput=throughput,
        watchdog=build_watchdog(options),
        num_epochs=None if options.max_steps is not None else options.num_epochs,
        device=torch.device(get_accelerator().get_current_device()),
    )
    introduce(options, rows, trainer, batch_size)
    return trainer


def _count(options: TrainOptions, rows: TrainingRows, state: RunningState) -> tuple[int, int]:
    """Rows of a step, and the last step of the run.

    Raises:
        DataError: the data is not enough for one step.
        UsageError: the schedule is longer than the run.
    """
    batch_size = rows_of_a_step(options, rows.manifest, dist.get_world_size())
    check_enough(options, len(rows), batch_size)
    total_steps = last_step(options, state.step, state.samples, len(rows), batch_size)
    if problems := schedule_problems(options, total_steps):
        raise agreed(UsageError(problems))
    return batch_size, total_steps


def _checkpoint_files(
    options: TrainOptions, boosted: Boosted, schedule: Schedule, exporter: Exporter
) -> CheckpointFiles:
    return CheckpointFiles(
        save_dir=options.save_dir,
        export=exporter,
        optimizer=boosted.optimizer,
        shares=named_shares(boosted.model, boosted.optimizer, boosted.layout.tensor_group),
        schedule=schedule,
        layout=boosted.layout,
        group=patient_group(),
    )


def build_callbacks(
    options: TrainOptions, files: CheckpointFiles, started: float, validation: Validation | None
) -> Sequence[Callback]:
    """The callbacks of a run, in the order in which they are called."""
    checkpointer = Checkpointer(
        files,
        interval=options.save_interval,
        keep_last=options.keep_last,
        in_background=options.async_save,
        go_on=options.on_save_error == "continue",
        resumes_own=goes_on_in(options.save_dir, options.load_checkpoint),
    )
    limit = None if options.max_time is None else seconds_of(options.max_time)
    guards: list[Callback] = [NonFiniteGuard(options.save_dir, options.max_bad_steps)]
    if options.loss_spike_sigma > 0:
        skip = options.on_loss_spike == "skip"
        guards.append(SpikeGuard(options.save_dir, options.loss_spike_sigma, skip=skip))
    stopper = Stopper(checkpointer, started, limit)
    evaluators = []
    if validation is not None:
        evaluators.append(Evaluator(validation, options.eval_interval, options.pp))
    return [*guards, LogSteps(), stopper, *evaluators, checkpointer]


def open_log(
    options: TrainOptions, state: RunningState, total_steps: int, start: str | None
) -> RunLog:
    """Opens the run's logs, and writes the resolved flags beside them.

    Args:
        start: what the run began from, in place of ``--load_checkpoint`` in the flags: with them
            it can be run again.

    Raises:
        DataError: on all processes, if the first cannot write them.
    """
    problem = None
    try:
        log = _open_log(options, state, total_steps, start)
    except OSError as error:
        problem = f"{error.filename or options.save_dir}: {error.strerror}"
    raise_on_all(problem, DataError)
    return log


def _open_log(
    options: TrainOptions, state: RunningState, total_steps: int, start: str | None
) -> RunLog:
    main = dist.get_rank() == 0
    if main:
        options.save_dir.mkdir(parents=True, exist_ok=True)
        target = config_file(options)
        if state.step < total_steps or not target.exists():  # otherwise nothing will be trained
            flags = dataclasses.replace(options, load_checkpoint=start, overwrite=False)
            storage.write_json(target, command.as_dict(flags))
    return RunLog(
        options.save_dir,
        options.tensorboard_dir or options.save_dir / "tensorboard",
        options.report_to,
        first_step=state.step + 1,
        total_steps=total_steps,
        active=main,
        run_name=options.save_dir.resolve().name,
        config=command.as_dict(options),
    )


def build_watchdog(options: TrainOptions) -> Watchdog:
    """Watches for a process that does not go on."""
    timeout = seconds_of(options.hang_timeout) or 0.0
    store = open_store() if timeout > 0 and dist.get_world_size() > 1 else None
    return Watchdog(timeout, dist.get_rank(), dist.get_world_size(), store)


def introduce(options: TrainOptions, rows: TrainingRows, trainer: Trainer, batch_size: int) -> None:
    """Says what is about to be trained."""
    trainer.say(
        f"{options.plugin} on {dist.get_world_size()} processes: {len(rows):,} rows, "
        f"{batch_size} rows a step, {trainer.schedule.total_steps:,} steps"
    )
    for line in describe_mixture(options, rows, trainer.schedule.total_steps * batch_size):
        trainer.say(line)
    state = trainer.state
    if state.step:
        trainer.say(f"goes on after step {state.step:,}, at sample {state.samples:,}")
    if trainer.is_over:
        trainer.say(
            "that was the last step: nothing is left to do (more: --max_steps, --num_epochs)"
        )
