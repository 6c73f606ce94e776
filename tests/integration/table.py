"""The table of trainings: plugins times features, and the plain loop's settings for each."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tests.integration.conftest import World
from tests.integration.plain_loop import Order, Setting

STEPS = 10
# Inside the first epoch; the second begins within step 8 (with conversations within step 3).
MIDDLE = 6
SEED = 42
# Of pretraining rows; conversations are shorter of loss-carrying tokens.
ROWS_A_STEP, CONVERSATIONS_A_STEP = 4, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A limit that no norm reaches: norms are measured, and nothing is clipped.
HIGH = 1000.0


class Plugin(NamedTuple):
    flags: str
    data_ranks: int = 2
    order: Order = Order.REDUCED  # see plain_loop.Setting
    processes: int = 2


class Feature(NamedTuple):
    description: str
    flags: str = ""
    accumulates: bool = False
    # Where it bites, it bites at some steps only: Adam would not notice that all are scaled.
    grad_clip: float = HIGH


PLUGINS = {
    "gemini": Plugin("--plugin gemini", order=Order.RUNNING),
    "gemini_auto": Plugin("--plugin gemini_auto", order=Order.RUNNING),
    "zero2": Plugin("--plugin zero2"),
    "zero2_cpu": Plugin("--plugin zero2_cpu"),
    "3d-zero0": Plugin("--plugin 3d --zero 0", order=Order.RUNNING),
    "3d-zero1": Plugin("--plugin 3d --zero 1"),
    "3d-zero2": Plugin("--plugin 3d --zero 2"),
    "3d-pp": Plugin("--plugin 3d --pp 2", data_ranks=1),
    "3d-tp": Plugin("--plugin 3d --tp 2", data_ranks=1),
    "3d-sp": Plugin("--plugin 3d --sp 2 --zero 0", data_ranks=1),
    "3d-sp-zero1": Plugin("--plugin 3d --sp 2 --zero 1", data_ranks=1),
    "3d-tp-pp": Plugin("--plugin 3d --tp 2 --pp 2", data_ranks=1, processes=4),
    "3d-tp-zero0": Plugin("--plugin 3d --tp 2 --zero 0", processes=4),
    "3d-tp-zero1": Plugin("--plugin 3d --tp 2 --zero 1", processes=4),
    "3d-pp-zero1": Plugin("--plugin 3d --pp 2 --zero 1", processes=4),
    "3d-tp-sp": Plugin("--plugin 3d --tp 2 --sp 2 --zero 0", data_ranks=1, processes=4),
    "3d-sp-zero2": Plugin("--plugin 3d --sp 2 --zero 2", processes=4),
}
FEATURES = {
    "plain": Feature("nothing but training"),
    "clipped": Feature("a gradient norm that is too large", grad_clip=2.0),
    "twice": Feature("accumulated gradients", accumulates=True),
    "frozen": Feature("embeddings only", "--freeze_non_embeds_params"),
    "tied": Feature("one matrix as both embeddings"),
    "recompute": Feature("gradient checkpointing", "--use_grad_checkpoint"),
    "sft": Feature("padded rows, noise, all at once", "--use_neft", True, 1.2),
    "apart": Feature("documents do not see each other", "--attention_across_documents false"),
    "fused": Feature("head and loss in one", "--fused_loss"),
    "compiled": Feature("torch.compile, without its C++", "--torch_compile"),
}


class Row(NamedTuple):
    """A training: a plugin with a feature, in a working dtype."""

    plugin_name: str
    feature_name: str
    precision: str

    @property
    def name(self) -> str:
        return "-".join(self)

    @property
    def plugin(self) -> Plugin:
        return PLUGINS[self.plugin_name]

    @property
    def feature(self) -> Feature:
        return FEATURES[self.feature_name]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def is_sft(self) -> bool:
        return self.feature_name == "sft"

    @property
    def frozen(self) -> bool:
        return self.feature_name == "frozen"

    @property
    def clips(self) -> bool:
        return self.feature.grad_clip < HIGH

    @property
    def has_pipeline(self) -> bool:
        return "--pp" in self.plugin.flags

    @property
    def batch_size(self) -> int:
        return CONVERSATIONS_A_STEP if self.is_sft else ROWS_A_STEP

    @property
    def passes(self) -> int:
        """Micro-batches a step and rank; a pipeline has two at least."""
        if not self.has_pipeline:
            return 2 if self.feature.accumulates else 1
        return self.batch_size // self.plugin.data_ranks if self.feature_name == "twice" else 2

    @property
    def is_exact(self) -> bool:
        """Whether the plain loop does the same arithmetic, so that not a bit may differ.

        Gemini's Adam takes the same formula in another order. Two stages that share a matrix
        add up its gradients over micro-batches first, and over the stages then. Documents apart
        are masked here and fed one by one there. A clipping factor may differ in its last bit.
        """
        shared = self.has_pipeline and self.feature_name == "tied"
        others = self.clips or self.feature_name in ("apart", "fused")
        alike = not (self.is_divided or shared or others or "gemini" in self.plugin_name)
        return alike and self.precision != "fp32"

    @property
    def is_divided(self) -> bool:
        """Whether matrix products are sums of parts, each of them rounded."""
        return "--tp" in self.plugin.flags or "--sp" in self.plugin.flags

    def model(self, world: World) -> Path:
        return world.tied if self.feature_name == "tied" else world.model

    def part(self, world: World) -> Path:
        return (world.sft if self.is_sft else world.pretrain) / "part-00000"

    def flags(self, world: World, save_dir: Path) -> list[str]:
        """Of ``train.py``."""
        micro_batch = self.batch_size // self.plugin.data_ranks // self.passes
        return [
            *["--pretrained", str(self.model(world)), "--dataset", str(self.part(world))],
            *["--save_dir", str(save_dir), "--save_interval", str(MIDDLE), "--max_length", "512"],
            *["--max_steps", str(STEPS), "--lr", "0.003", "--warmup_steps", "1"],
            *["--grad_clip", str(self.feature.grad_clip), "--seed", str(SEED)],
            *["--micro_batch_size", str(micro_batch), "--accumulation_steps", str(self.passes)],
            *["--mixed_precision", self.precision],
            *self.plugin.flags.split(),
            *self.feature.flags.split(),
        ]

    def setting(self, world: World) -> Setting:
        """The same for the plain loop."""
        return Setting(
            model=self.model(world),
            part=self.part(world),
            seed=SEED,
            batch_size=self.batch_size,
            ranks=self.plugin.data_ranks,
            passes=self.passes,
            dtype=self.dtype,
            grad_clip=self.feature.grad_clip,
            frozen=self.frozen,
            noise_alpha=5.0 if self.is_sft else None,
            apart=self.feature_name == "apart",
            order=self.plugin.order,
            one_width=self.has_pipeline,
        )


def _rows(plugins: Iterable[str], precision: str, features: Iterable[str]) -> Iterator[Row]:
    for plugin in plugins:
        for feature in features:
            yield Row(plugin, feature, precision)


# These keep every matrix whole, and can be compared bit for bit in half precision.
_WHOLE = ("gemini", "zero2", "zero2_cpu", "3d-zero0", "3d-zero1", "3d-pp")
# These divide matrices or rows, and are best compared in full precision.
_DIVIDED = ("3d-tp", "3d-sp")
# The flag is refused where there is no compiler, although the worker makes torch do without.
_COMPILING = ("zero2",) if shutil.which("g++") or shutil.which("clang++") else ()
_ALL = ("clipped", "twice", "frozen", "tied", "recompute", "sft")
TABLE = [
    *_rows(_WHOLE, "bf16", _ALL),
    *_rows(_WHOLE, "fp16", ["twice"]),
    *_rows(["gemini_auto", "3d-zero2"], "bf16", ["twice", "sft"]),
    *_rows(["zero2", "zero2_cpu", "3d-zero0", "3d-pp"], "fp32", ["clipped"]),
    *_rows(["3d-pp"], "fp32", ["tied"]),
    *_rows(_DIVIDED, "fp32", _ALL),
    *_rows(_DIVIDED, "bf16", ["frozen", "sft"]),
    *_rows(_DIVIDED, "fp16", ["twice"]),
    *_rows(["3d-sp-zero1"], "bf16", ["twice", "sft"]),
    *_rows(["gemini", "3d-zero1"], "bf16", ["apart"]),
    *_rows(["zero2", "3d-zero0", "3d-tp"], "fp32", ["apart"]),
    *_rows(["zero2", "3d-zero0", "3d-pp", "3d-sp"], "fp32", ["fused"]),
    *_rows(_COMPILING, "fp32", ["compiled"]),
    # What one training hands to another, in another layout.
    *_rows(["zero2"], "bf16", ["plain"]),
    # Four processes.
    *_rows(["3d-tp-pp", "3d-tp-zero0"], "fp32", ["sft"]),
    *_rows(["3d-tp-zero1", "3d-pp-zero1", "3d-sp-zero2"], "bf16", ["sft"]),
    *_rows(["3d-tp-sp"], "fp32", ["tied"]),
]
