"""The ``estimate`` command: what a run will need, before anyone pays for running out of it.

    colossal-llama estimate --config configs/stages/knowledge.yaml --world_size 8
    colossal-llama estimate --config configs/recipes/chinese_llama2.yaml --world_size 8
    colossal-llama estimate --pretrained llama2-7b --plugin zero2 --world_size 8 \\
        --mixed_precision bf16 --micro_batch_size 2 --device_memory_gib 80
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama import command, storage
from colossal_llama.command import option
from colossal_llama.errors import UsageError
from colossal_llama.model.configuration import preset_names, preset_path, read_fields
from colossal_llama.training import checks
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.recipe import read_recipe, recipe_path, stage_problems

DEVICES = ("cuda", "cpu")


@dataclass
class EstimateOptions(TrainOptions):
    """Predict the memory of a run and the size of its checkpoints.

    Takes the flags, and the --config, of train; of a recipe each stage is estimated. Neither
    weights nor data nor a GPU are needed: the configuration of the model is enough.
    """

    pretrained: Path = option(
        help="model directory, of which config.json is read, or the name of a preset"
    )
    dataset: list[Path] = option([], help="taken from a --config of train, and not read")
    world_size: int | None = option(
        None, help="processes, one a device (default: --tp x --pp x --sp)"
    )
    vocab_size: int | None = option(
        None, help="ids of the model (default: as its configuration says; 32000 for a preset)"
    )
    device: str = option(
        "cuda", help="where it will train; on a CPU all memory is host memory", choices=DEVICES
    )
    device_memory_gib: float | None = option(
        None, help="memory of one device in GiB: says whether the run fits, and what to change"
    )
    output: Path | None = option(None, help="JSON file for all numbers, in bytes")

    @property
    def processes(self) -> int:
        """The processes of the run."""
        return self.world_size or self.tp * self.pp * self.sp

    def problems(self) -> list[str]:
        """What training would refuse; whether paths exist does not matter here."""
        found = []
        if self.world_size is not None and self.world_size < 1:
            found.append("--world_size must be at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            found.append("--vocab_size must be at least 1")
        if self.device_memory_gib is not None and self.device_memory_gib <= 0:
            found.append("--device_memory_gib must be positive")
        if self.output is not None and self.output.exists() and not self.overwrite:
            found.append(f"--output {self.output} exists; choose another, or give --overwrite")
        return found or checks.conflicts(self, self.processes)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command: for one run, or for every stage of a recipe; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = recipe_path(arguments)
    if path is None:
        return command.run(EstimateOptions, estimate, arguments, prog)
    return command.exit_code(lambda: estimate_recipe(path, arguments, prog))


def estimate(options: EstimateOptions) -> None:
    """Prints what the run needs, and writes ``--output``.

    Raises:
        UsageError: there is no such model, or it cannot be divided so.
        DataError: no model can be built from the configuration.
    """
    text, numbers = _estimate(options)
    print(text)
    if options.output is not None:
        storage.write_json(options.output, numbers)


def estimate_recipe(path: Path, argv: Sequence[str], prog: str | None = None) -> None:
    """Prints what each stage of a recipe needs, and writes ``--output``.

    Raises:
        UsageError: the problems of all stages; or as ``estimate``.
        DataError: no model can be built from the configuration.
    """
    recipe = read_recipe(path, argv, prog, EstimateOptions)
    if problems := stage_problems(recipe.stages):
        raise UsageError(problems)
    numbers, output = {}, None
    for stage in recipe.stages:
        assert isinstance(stage.options, EstimateOptions)
        output = stage.options.output
        text, numbers[stage.name] = _estimate(stage.options)
        print(f"{stage.name}\n{'-' * len(stage.name)}\n{text}\n")
    peaks = {name: found["peak_per_device"] for name, found in numbers.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    print(f"The most on a device: {peaks[worst] / 2**30:,.2f} GiB, in {worst}.")
    if output is not None:
        storage.write_json(output, numbers)


def _estimate(options: EstimateOptions) -> tuple[str, dict[str, Any]]:
    """What is printed, and all numbers in bytes."""
    path = configuration_path(options)
    fields = read_fields(path)
    if options.vocab_size is not None:
        fields["vocab_size"] = options.vocab_size
    from colossal_llama.training.estimation import report
    from colossal_llama.training.estimation.advice import suggest
    from colossal_llama.training.estimation.estimate import complete_fields, make_estimate

    fields = complete_fields(fields, path)
    problems = model_problems(options, fields)
    if problems:
        raise UsageError(problems)
    found = make_estimate(options, fields, options.processes, cuda=options.device == "cuda")
    text, advice = report.as_text(options, fields, found), []
    if options.device_memory_gib is not None:
        if not report.fits(found.peak, options.device_memory_gib):
            advice = suggest(options, fields, found)
        text += "\n" + report.verdict(options.device_memory_gib, found, advice)
    return text, report.as_json(options, fields, found, advice)


def configuration_path(options: EstimateOptions) -> Path:
    """The file with the model's configuration.

    Raises:
        UsageError: there is none.
    """
    given = options.pretrained
    if (given / "config.json").is_file():
        return given / "config.json"
    if str(given) in preset_names():
        return preset_path(str(given))
    if given.suffix == ".json" and given.is_file():
        return given
    raise UsageError(
        [
            f"--pretrained {given}: neither a model directory (no config.json) nor a preset; "
            f"there are {', '.join(preset_names())}"
        ]
    )


def model_problems(options: EstimateOptions, fields: dict[str, Any]) -> list[str]:
    """What of the layout the model's own sizes do not allow."""
    found = []
    heads = {"heads": "num_attention_heads", "key-value heads": "num_key_value_heads"}
    for name, field in heads.items():
        if fields[field] % (options.tp * options.sp):
            found.append(
                f"--tp {options.tp} x --sp {options.sp} does not divide the model's "
                f"{fields[field]} {name}"
            )
    if fields["intermediate_size"] % options.tp:
        found.append(f"--tp {options.tp} does not divide intermediate_size")
    if options.pp > fields["num_hidden_layers"]:
        found.append(f"--pp {options.pp} is more than {fields['num_hidden_layers']} layers")
    return found
