"""Puts an estimate together: model, pass, plugin, and the process that holds the most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.model.configuration import empty_model
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.estimation.checkpoint_size import CheckpointSize, checkpoint_size
from colossal_llama.training.estimation.peak import Moment, build_sharing, peaks
from colossal_llama.training.estimation.rank_model import padded, pipeline_stages, rank_fields
from colossal_llama.training.estimation.sharing import numel, trained
from colossal_llama.training.estimation.traced_pass import DTYPES, trace

_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class Estimate:
    """What a run needs, in bytes.

    Args:
        parameters: of the whole model, and of those the trained ones.
        stages: for each stage of the pipeline the moment of the most memory in each phase.
        host: of a process while it trains, and while it loads the model.
    """

    parameters: int
    trained: int
    stages: list[dict[str, Moment]]
    host: int
    host_loading: int
    checkpoint: CheckpointSize

    @property
    def worst_stage(self) -> int:
        """The stage whose processes hold the most."""
        return max(range(len(self.stages)), key=lambda stage: self.most(stage).total)

    @property
    def peak(self) -> int:
        """The most bytes that any process holds on its device."""
        return self.most(self.worst_stage).total

    def most(self, stage: int) -> Moment:
        """The moment at which a stage's processes hold the most."""
        return max(self.stages[stage].values(), key=lambda moment: moment.total)


def make_estimate(
    options: TrainOptions, fields: dict[str, Any], processes: int, *, cuda: bool
) -> Estimate:
    """Estimates a run of ``processes`` with a model of this configuration.

    Args:
        fields: complete (see ``complete_fields``).
    """
    layers = fields["num_hidden_layers"]
    weights, activations = trace(rank_fields(fields, options), layers, options)
    whole = weights
    if options.tp > 1:  # what is saved is the model without its division
        alone = replace(options, tp=1, sp=1, micro_batch_size=1, max_length=8)
        whole, _ = trace(fields, layers, alone)
    stages = pipeline_stages(padded(weights, fields, options), layers, options)
    sharings = [build_sharing(options, stage.weights, processes, cuda=cuda) for stage in stages]
    half = DTYPES[options.mixed_precision].itemsize
    return Estimate(
        parameters=numel(whole),
        trained=numel(trained(whole)),
        stages=[
            peaks(options, stage, activations, sharing)
            for stage, sharing in zip(stages, sharings, strict=True)
        ],
        host=max(sharing.host() for sharing in sharings),
        host_loading=half * numel(whole),
        checkpoint=checkpoint_size(options, whole, sharings, processes=processes, half=half),
    )


def complete_fields(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """A configuration with the sizes that it leaves to transformers' defaults.

    Raises:
        DataError: no model can be built from it; names ``path``, where it is from.
    """
    config, _ = empty_model({**fields, "num_hidden_layers": 1}, path)
    sizes = {name: getattr(config, name) for name in _SIZES}
    layers = fields.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise DataError(f"{path}: num_hidden_layers is {layers}, expected a number of layers")
    return {**fields, **sizes}
