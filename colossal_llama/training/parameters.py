"""Which parameters train, and which of them decay."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError, UsageError
from colossal_llama.storage import read_json

if TYPE_CHECKING:
    from torch.nn import Parameter

    from colossal_llama.training.arguments import TrainOptions

# What init_model.py notes beside a model whose vocabulary it extended.
EXTENSION_REPORT = "extension_report.json"


def embedding_weights(model: Any) -> list[Parameter]:
    """The weights of the input and the output embedding, those of a tied pair once.

    A stage of a pipeline has one of them, or none.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in modules]
    return list({id(weight): weight for weight in weights if weight is not None}.values())


def check_names(options: TrainOptions) -> None:
    """Looks for the names that flags give in a model without weights, which takes a second.

    Raises:
        UsageError: the model has no such parameters or modules, or nothing is left to train.
    """
    if not options.freeze and not options.lora_modules:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(
            options.pretrained, local_files_only=True, trust_remote_code=trusted
        )
    except (OSError, ValueError):
        return  # whoever loads the model says so
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    if options.lora_rank:  # whose own parameters can be frozen, and are not there yet
        from colossal_llama.training.lora import layers

        layers(options, model)
    else:
        freeze(options, model)


def freeze(options: TrainOptions, model: Any) -> None:
    """Freezes what the flags say.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to train.
    """
    if options.freeze_non_embeds_params:
        freeze_non_embeddings(model)
    if options.freeze:
        freeze_matching(model, options.freeze)


def freeze_non_embeddings(model: Any) -> None:
    """Leaves only the input and output embeddings of a Hugging Face model trainable."""
    embeddings = {id(weight) for weight in embedding_weights(model)}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in embeddings


def freeze_matching(model: Any, patterns: Sequence[str]) -> None:
    """Freezes the parameters whose names match one of ``patterns`` (as file names are matched).

    A tied output embedding has no name of its own: it is frozen with the input embedding.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    useless = [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]
    if useless:
        raise UsageError(
            [
                f"--freeze {pattern}: no parameter has such a name; there are {names[0]}, "
                f"{names[1]}, ... {names[-1]}"
                for pattern in useless
            ]
        )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError([f"--freeze {' '.join(patterns)} leaves nothing to train"])


def old_rows(options: TrainOptions) -> int:
    """The number of embedding rows that are not new: as given, or as init_model.py noted it.

    Raises:
        DataError: neither says so.
    """
    if options.num_old_rows is not None:
        return options.num_old_rows
    path = options.pretrained / EXTENSION_REPORT
    report = read_json(path) if path.is_file() else {}
    rows = report.get("size_before") if isinstance(report, dict) else None
    if not isinstance(rows, int) or rows < 1:
        raise DataError(
            f"--train_new_rows_only: {path} does not say how many rows are old (size_before); "
            "give --num_old_rows"
        )
    return rows


def describe(options: TrainOptions) -> str:
    """What trains, in words: an optimizer's state fits only the same parameters and groups."""
    if options.lora_rank:
        modules = " ".join(sorted(options.lora_modules)) if options.lora_modules else "all layers"
        what = f"LoRA of rank {options.lora_rank} and alpha {options.lora_alpha:g} on {modules}"
        if options.lora_train_embeddings:
            what += " and embeddings"
    else:
        what = "embeddings" if options.freeze_non_embeds_params else "all weights"
    if options.train_new_rows_only:
        what += f" with rows from {old_rows(options)} on"
    if options.freeze:
        what += f" but {' '.join(options.freeze)}"
    return f"{what}{', decay of all' if options.decay_all else ''}"


def optimizer_groups(
    model: Any,
    weight_decay: float,
    *,
    decay_all: bool,
    undecayed: Iterable[Parameter] = (),
) -> list[dict[str, Any]]:
    """The trained parameters as groups for an optimizer, with and without weight decay.

    Norms and biases, which are vectors, do not decay: as in GPT-3's and Llama's descendants, decay
    is there to keep matrices small.

    Args:
        undecayed: parameters whose decay is not the optimizer's business.
    """
    not_here = {id(parameter) for parameter in undecayed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = {id(p): id(p) not in not_here and (decay_all or p.dim() > 1) for p in trained}
    groups = [
        {"params": [p for p in trained if decays[id(p)]], "weight_decay": weight_decay},
        {"params": [p for p in trained if not decays[id(p)]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
