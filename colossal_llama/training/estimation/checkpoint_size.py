"""What a checkpoint takes on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.estimation.rank_model import Weight
from colossal_llama.training.estimation.sharing import Sharing, numel, trained

# torch's, numpy's and Python's generators, as training/random_states.py writes them.
RANDOM_STATES = 16_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint's folders."""

    modeling: int
    optimizer: int
    other: int

    @property
    def total(self) -> int:
        return self.modeling + self.optimizer + self.other


def checkpoint_size(
    options: TrainOptions,
    weights: Sequence[Weight],
    stages: Sequence[Sharing],
    *,
    processes: int,
    half: int,
) -> CheckpointSize:
    """The size of a checkpoint.

    Args:
        weights: of the whole model, as it is saved: without a plugin's padding.
        stages: what the processes of each stage of the pipeline do; there are ``tp`` like it.
        half: bytes of the working dtype, in which the weights are saved.
    """
    adapter = [weight for weight in weights if ".lora_" in weight.name]
    plain = numel(weights) - numel(adapter)
    return CheckpointSize(
        modeling=half * plain,
        optimizer=options.tp * sum(stage.stored() for stage in stages),
        other=half * (numel(trained(weights)) if adapter else 0)
        + RANDOM_STATES * processes
        + _tokenizer_size(options.pretrained),
    )


def _tokenizer_size(directory: Path) -> int:
    files = (directory / name for name in TOKENIZER_FILES)
    return sum(file.stat().st_size for file in files if file.is_file())
