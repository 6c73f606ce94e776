"""When a process holds the most, and what that is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.estimation.gemini import Gemini
from colossal_llama.training.estimation.rank_model import EMBEDDING, Stage, Weight
from colossal_llama.training.estimation.sharing import Held, Replicated, Sharing, Zero
from colossal_llama.training.estimation.traced_pass import DTYPES, Activations

FORWARD, BACKWARD, UPDATE = "forward and loss", "backward", "update"


@dataclass(frozen=True)
class Moment:
    """What a process holds at a moment, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient


def build_sharing(
    options: TrainOptions, weights: list[Weight], processes: int, *, cuda: bool
) -> Sharing:
    """What ``training/plugins.py`` makes the plugin do."""
    half = DTYPES[options.mixed_precision].itemsize
    if options.plugin.startswith("gemini"):
        return Gemini(
            weights,
            processes,
            accumulates=micro_batches(options) > 1,
            offload=options.plugin == "gemini_auto" and cuda,
            cuda=cuda,
        )
    if options.plugin != "3d":
        # On a CPU there is one memory, which holds everything.
        offload = options.plugin == "zero2_cpu" and cuda
        return Zero(weights, half, processes, 2, offload, hooked=True, late=False, gloo=not cuda)
    ranks = processes // (options.tp * options.pp)
    if options.zero_stage == 0 or ranks == 1:
        return Replicated(weights, half, ddp=options.pp == 1)
    late = options.pp > 1
    hooked = not late and (options.zero_stage == 2 or cuda)
    return Zero(weights, half, ranks, options.zero_stage, False, hooked, late, gloo=not cuda)


def micro_batches(options: TrainOptions) -> int:
    """Per step; as training's default, for data that are not conversations."""
    return options.accumulation_steps or options.pp


def peaks(
    options: TrainOptions, stage: Stage, activations: Activations, sharing: Sharing
) -> dict[str, Moment]:
    """The moment of the most memory in each phase of a step."""
    every = list(_moments(options, stage, activations, sharing))
    return {
        phase: max((m for name, m in every if name == phase), key=lambda m: m.total)
        for phase in (FORWARD, BACKWARD, UPDATE)
    }


def _moments(
    options: TrainOptions, stage: Stage, activations: Activations, sharing: Sharing
) -> Iterator[tuple[str, Moment]]:
    (_, before), *events = sharing.backward(micro_batches(options) > 1)
    saved = [activations.saved[layer] for layer in stage.layers]
    # 1F1B (Narayanan et al. 2019, "PipeDream", section 3.2): the first stage has gone forward with
    # as many micro-batches as there are stages before it goes back with the first.
    in_flight = min(options.pp - stage.index, micro_batches(options))
    others = (in_flight - 1) * (activations.entry + sum(saved))

    def moment(held: Held, kept: int, passing: int) -> Moment:
        passing += held.passing + sharing.gathered()
        return Moment(sharing.working(), held.kept, sharing.optimizer(), kept, passing)

    kept = others + activations.entry + sum(saved)
    forward = max(activations.forward[layer] - activations.saved[layer] for layer in stage.layers)
    yield FORWARD, moment(before, kept, max(forward, activations.head if stage.last else 0))
    by_place = {
        place: [held for _, held in group]
        for place, group in itertools.groupby(events, key=lambda event: _place(event[0]))
    }
    last, below = before, kept
    for layer in reversed(stage.layers):
        below -= activations.saved[layer]
        passing = max(0, activations.backward[layer] - activations.saved[layer])
        gradients = [last, *by_place.get(layer, [])]
        for held in gradients:
            yield BACKWARD, moment(held, below + activations.saved[layer], passing)
        last = gradients[-1]
    if stage.first:
        yield BACKWARD, moment(last, others, activations.embedding)
    for held in by_place.get("end", []):
        yield BACKWARD, moment(held, 0, 0)
    for held in sharing.update():
        yield UPDATE, Moment(sharing.working(), held.kept, sharing.optimizer(), 0, held.passing)


def _place(weight: Weight | None) -> int | str:
    """Where in the backward pass a weight gets its gradient."""
    if weight is None:
        return "end"
    if weight.layer is not None:
        return weight.layer
    return "embedding" if weight.name == EMBEDDING else "head"
