"""The flags of ``train.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.command import option
from colossal_llama.dataset.loader import VERIFICATIONS, VERIFY_SIZE
from colossal_llama.dataset.sampler import BUCKETS, ORDERS
from colossal_llama.runtime.distributed import world_size
from colossal_llama.storage import read_json

PLUGINS = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "3d")


@dataclass
class TrainOptions:
    """Continue pretraining, or fine-tune, on prepared data.

    Start it with a launcher, on one machine or many:

        colossalai run --nproc_per_node 8 [--hostfile hostfile] train.py --pretrained ...
        torchrun --nproc_per_node 8 train.py --pretrained ...
    """

    pretrained: Path = option(help="model directory: configuration, tokenizer and weights")
    dataset: list[Path] = option(
        help="dataset parts (part-00000 ...) or whole prepared directories, trained in this order"
    )
    data_order: str = option(
        BUCKETS,
        help="buckets: part after part, rows shuffled inside each; shuffled: all rows together",
        choices=ORDERS,
    )
    dataset_weights: list[float] | None = option(
        None,
        help="share of the samples for each --dataset, such as 0.7,0.3; each then runs through "
        "epochs of its own (default: every row once an epoch)",
        comma=True,
    )
    verify_data: str = option(
        VERIFY_SIZE,
        help="what is compared with the manifest before the model is loaded: the files' sizes, "
        "SHA-256 too (full), or nothing (off)",
        choices=VERIFICATIONS,
    )
    plugin: str = option("gemini", help="how the model is spread over devices", choices=PLUGINS)
    load_checkpoint: Path | None = option(
        None,
        help="a checkpoint of a run, which is resumed, or a model directory (such as a "
        "checkpoint's modeling/), whose weights start a new stage",
    )
    save_interval: int = option(1000, help="steps between checkpoints; 0 saves at epoch ends only")
    save_dir: Path = option(Path("checkpoint_dir"), help="where checkpoints and metrics go")
    tensorboard_dir: Path | None = option(
        None, help="where TensorBoard events go (default: SAVE_DIR/tensorboard)"
    )
    config_file: Path | None = option(
        None,
        help="where the resolved flags are written, to rerun with --config "
        "(default: SAVE_DIR/config.json)",
    )
    num_epochs: int = option(1, help="passes over the data")
    micro_batch_size: int = option(1, help="rows per device and forward pass")
    accumulation_steps: int | None = option(
        None,
        help="micro-batches per optimizer step (default: 8 for SFT data, 1 otherwise, and at "
        "least --pp)",
    )
    lr: float = option(3e-4, help="peak learning rate")
    warmup_steps: int | None = option(
        None,
        help="steps of linear warm-up (default: 2.5% of the steps)",
        names=("-s",),
    )
    weight_decay: float = option(0.1, help="decoupled weight decay", names=("-w",))
    grad_clip: float = option(
        1.0, help="largest gradient norm; 0 does not clip", names=("--gradient_clipping",)
    )
    max_length: int = option(4096, help="longest row, in tokens, that the data may have")
    mixed_precision: str = option(
        "fp16",
        help="working dtype; fp32 is for CPUs without bf16 arithmetic, where the others crawl",
        choices=("fp16", "bf16", "fp32"),
    )
    use_grad_checkpoint: bool = option(
        False, help="recompute activations in the backward pass: less memory, about a third slower"
    )
    use_flash_attn: bool = option(
        False, help="use flash-attn where it is installed (CUDA), torch's SDPA otherwise"
    )
    freeze_non_embeds_params: bool = option(
        False, help="train the input and output embeddings only"
    )
    tp: int = option(1, help="tensor parallel size (plugin 3d)")
    pp: int = option(1, help="pipeline parallel size (plugin 3d)")
    sp: int = option(1, help="sequence parallel size, all-to-all (plugin 3d)")
    zero_stage: int = option(
        1, help="ZeRO stage, 0 to 2, over the data parallel ranks (plugin 3d)", names=("--zero",)
    )
    use_neft: bool = option(False, help="add NEFTune noise to the embeddings while training")
    neftune_noise_alpha: float = option(5.0, help="strength of the NEFTune noise")
    seed: int = option(42, help="seed of the data order and of all random numbers")
    overwrite: bool = option(False, help="start anew in a SAVE_DIR that holds another run")

    def problems(self) -> list[str]:
        """Everything that can be said without loading anything."""
        found = []
        for name in ("num_epochs", "micro_batch_size", "max_length", "tp", "pp", "sp"):
            if getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1")
        for name in ("save_interval", "weight_decay", "grad_clip", "neftune_noise_alpha", "lr"):
            if getattr(self, name) < 0:
                found.append(f"--{name} must not be negative")
        if self.accumulation_steps is not None and self.accumulation_steps < 1:
            found.append("--accumulation_steps must be at least 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            found.append("--warmup_steps must not be negative")
        found += self._weight_problems() + self._layout_problems() + self._path_problems()
        return found or self._model_problems()

    def _weight_problems(self) -> list[str]:
        weights = self.dataset_weights
        if weights is None:
            return []
        found = []
        if len(weights) != len(self.dataset):
            found.append(
                f"--dataset_weights has {len(weights)} weights for {len(self.dataset)} datasets: "
                "give one for each path of --dataset"
            )
        if not all(weight > 0 for weight in weights):
            found.append("--dataset_weights must be positive; leave out a dataset without weight")
        elif not math.isclose(sum(weights), 1, abs_tol=1e-3):
            found.append(f"--dataset_weights must add up to 1, not {sum(weights):g}")
        return found

    def _layout_problems(self) -> list[str]:
        found = []
        if self.plugin != "3d":
            for name in ("tp", "pp", "sp"):
                if getattr(self, name) > 1:
                    found.append(f"--{name} needs --plugin 3d, not {self.plugin}")
        processes, model_parallel = world_size(), self.tp * self.pp * self.sp
        if model_parallel > 0 and processes % model_parallel:
            found.append(
                f"--tp {self.tp} x --pp {self.pp} x --sp {self.sp} = {model_parallel} does not "
                f"divide the {processes} processes"
            )
        if self.zero_stage not in (0, 1, 2):
            found.append("--zero must be 0, 1 or 2")
        if self.pp > 1 and self.zero_stage == 2:
            found.append("--pp works with --zero 0 or 1: stage 2 would reduce every micro-batch")
        if self.mixed_precision == "fp32" and self.plugin.startswith("gemini"):
            found.append(f"--plugin {self.plugin} needs --mixed_precision fp16 or bf16")
        if self.mixed_precision == "fp32" and self.plugin == "3d" and self._shares_optimizer():
            found.append("--plugin 3d shards fp16 and bf16 only: with fp32 give --zero 0")
        if self.pp > 1 and self.sp > 1:
            found.append("--pp and --sp cannot be combined")
        if self.accumulation_steps is not None and self.accumulation_steps < self.pp:
            found.append(
                f"--accumulation_steps must be at least --pp ({self.pp}): every stage of the "
                "pipeline works on its own micro-batch"
            )
        return found

    def _model_problems(self) -> list[str]:
        """What of the layout the model's own sizes do not allow."""
        config = read_json(self.pretrained / "config.json")
        heads = config.get("num_attention_heads", 1)
        sizes = {"heads": heads, "key-value heads": config.get("num_key_value_heads") or heads}
        split = self.tp * self.sp
        found = [
            f"--tp {self.tp} x --sp {self.sp} does not divide the model's {size} {name}"
            for name, size in sizes.items()
            if size % split
        ]
        layers = config.get("num_hidden_layers", 1)
        if self.pp > layers:
            found.append(f"--pp {self.pp} is more than the model's {layers} layers")
        return found

    def _shares_optimizer(self) -> bool:
        """Whether there are ranks among which ZeRO would divide the optimizer."""
        return self.zero_stage > 0 and world_size() > self.tp * self.pp

    def _path_problems(self) -> list[str]:
        found = []
        if not (self.pretrained / "config.json").is_file():
            found.append(f"--pretrained {self.pretrained}: not a model directory (no config.json)")
        found += [f"--dataset {path}: not found" for path in self.dataset if not path.is_dir()]
        load = self.load_checkpoint
        if load is not None and not load.is_dir():
            found.append(f"--load_checkpoint {load}: not found")
        elif load is not None and not is_checkpoint(load) and not (load / "config.json").is_file():
            found.append(
                f"--load_checkpoint {load}: neither a checkpoint (no running_states.json) nor a "
                "model directory (no config.json)"
            )
        return found


def is_checkpoint(directory: Path) -> bool:
    """Whether ``directory`` is a full checkpoint; its content decides, not its name."""
    return (directory / "running_states.json").is_file()
