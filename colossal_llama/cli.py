"""The ``colossal-llama`` command: one table from command name to options and function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from colossal_llama import __version__, command

# name: (module, options, function, summary). Modules are imported only when called. A name may
# be two words: commands with the same first word are a group.
COMMANDS = {
    "demo": (
        "demo.demo",
        "DemoOptions",
        "demo",
        "the whole pipeline on real text, with a report at the end",
    ),
    "doctor": ("doctor", "DoctorOptions", "doctor", "check this installation"),
    "train-tokenizer": (
        "tokenizer.train_tokenizer",
        "TrainTokenizerOptions",
        "train_tokenizer",
        "learn a Llama tokenizer, or the pieces of a new language, from text",
    ),
    "init-tokenizer": (
        "tokenizer.init_tokenizer",
        "InitTokenizerOptions",
        "init_tokenizer",
        "extend a tokenizer with new pieces",
    ),
    "analyze-tokenizer": (
        "tokenizer.analyze_tokenizer",
        "AnalyzeTokenizerOptions",
        "analyze_tokenizer",
        "compare tokenizers: compression, coverage, pieces that cannot be used",
    ),
    "init-model": (
        "model.init_model",
        "InitModelOptions",
        "init_model",
        "give a model the embedding rows of an extended tokenizer",
    ),
    "convert-checkpoint": (
        "model.convert_checkpoint",
        "ConvertCheckpointOptions",
        "convert_checkpoint",
        "turn a checkpoint of another program into a Hugging Face directory",
    ),
    "prepare-pretrain-dataset": (
        "dataset.prepare_pretrain",
        "PretrainDatasetOptions",
        "prepare_pretrain_dataset",
        "turn raw text into packed, bucketed Arrow data",
    ),
    "prepare-sft-dataset": (
        "dataset.prepare_sft",
        "SftDatasetOptions",
        "prepare_sft_dataset",
        "turn conversations into Arrow data",
    ),
    "data inspect": (
        "dataset.inspection.inspect_dataset",
        "InspectOptions",
        "inspect_dataset",
        "show what a prepared dataset holds: counts, balance, rows as text",
    ),
    "train": (
        "training.train",
        "TrainOptions",
        "train",
        "continue pretraining, or fine-tune (start it with a launcher)",
    ),
    "plot": (
        "training.plot",
        "PlotOptions",
        "plot",
        "draw the curves of one or several runs",
    ),
    "estimate": (
        "training.estimate",
        "EstimateOptions",
        "estimate",
        "predict memory and checkpoint size of a run, without weights or GPU",
    ),
    "inference": (
        "inference.generate",
        "GenerateOptions",
        "generate",
        "talk to a model",
    ),
    "evaluate": (
        "evaluation.perplexity",
        "EvaluateOptions",
        "evaluate",
        "bits per byte of a model on held-out text",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``colossal-llama COMMAND --flags`` and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"colossal-llama {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        return _answer_unknown(arguments)
    module_name, options_name, function_name, _ = COMMANDS[name]
    module = importlib.import_module(f"colossal_llama.{module_name}")
    prog = f"colossal-llama {name}"
    # train and estimate have one: a recipe is more than one set of options.
    if hasattr(module, "main"):
        return module.main(arguments[words:], prog)
    options_type, function = getattr(module, options_name), getattr(module, function_name)
    return command.run(options_type, function, arguments[words:], prog)


def usage(group: str = "") -> str:
    """The text of ``colossal-llama --help``, or of ``colossal-llama GROUP --help``."""
    commands = _group(group) if group else COMMANDS
    width = max(map(len, commands))
    rows = [f"  {name:<{width}}  {summary}" for name, (*_, summary) in commands.items()]
    prefix = f"{group} " if group else ""
    return "\n".join(
        [
            f"usage: colossal-llama {prefix}COMMAND [--flags]",
            "",
            *rows,
            "",
            f"colossal-llama {prefix}COMMAND --help explains a command's flags.",
        ]
    )


def _group(name: str) -> dict[str, tuple[str, str, str, str]]:
    return {key: row for key, row in COMMANDS.items() if key.startswith(f"{name} ")}


def _answer_unknown(arguments: list[str]) -> int:
    """Lists the commands of a group, or says that there is no such command."""
    group, *rest = arguments
    known = _group(group)
    if known and (not rest or rest[0] in ("-h", "--help")):
        print(usage(group))
        return 0 if rest else 2
    name = f"{group} {rest[0]}" if known else group
    print(
        f"error: unknown command {name}; there are: {', '.join(known or COMMANDS)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
