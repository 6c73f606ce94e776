"""The flags of ``train.py``. What does not go together is refused in ``checks.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from colossal_llama.command import option
from colossal_llama.dataset.loader import VERIFICATIONS, VERIFY_SIZE
from colossal_llama.dataset.sampler import BUCKETS, ORDERS
from colossal_llama.training.reporting import REPORTERS
from colossal_llama.training.schedule import SCHEDULES

PLUGINS = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "3d")
AUTO = "auto"


@dataclass
class TrainOptions:
    """Continue pretraining, or fine-tune, on prepared data.

    Start it with a launcher, on one machine or many:

        colossalai run --nproc_per_node 8 [--hostfile hostfile] train.py --pretrained ...
        torchrun --nproc_per_node 8 train.py --pretrained ...

    --config may also be a recipe: a YAML file with several stages.
    """

    SECTIONS: ClassVar[dict[str, str]] = {
        "pretrained": "model and data",
        "plugin": "how the model is spread, and computed",
        "num_epochs": "steps",
        "lr": "the update",
        "freeze_non_embeds_params": "what is trained, and how it sees the data",
        "load_checkpoint": "checkpoints",
        "report_to": "what is told",
        "max_bad_steps": "guards",
    }

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
    max_length: int = option(4096, help="longest row, in tokens, that the data may have")
    trust_remote_code: bool = option(
        False, help="run Python files that come with --pretrained; they can do anything"
    )

    plugin: str = option("gemini", help="how the model is spread over devices", choices=PLUGINS)
    tp: int = option(1, help="tensor parallel size (plugin 3d)")
    pp: int = option(1, help="pipeline parallel size (plugin 3d)")
    sp: int = option(1, help="sequence parallel size, all-to-all (plugin 3d)")
    zero_stage: int = option(
        1, help="ZeRO stage, 0 to 2, over the data parallel ranks (plugin 3d)", names=("--zero",)
    )
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
    torch_compile: bool = option(
        False, help="compile the layers with torch.compile: slow first step, faster others"
    )
    fused_loss: bool = option(
        False, help="output embedding and loss in one, in chunks: the logits are never held whole"
    )

    num_epochs: int = option(1, help="passes over the data")
    max_steps: int | None = option(
        None, help="optimizer steps after which the run ends, in place of --num_epochs"
    )
    micro_batch_size: int = option(1, help="rows per device and forward pass")
    accumulation_steps: int | None = option(
        None,
        help="micro-batches per optimizer step (default: 8 for SFT data, 1 otherwise, and at "
        "least --pp)",
    )
    seed: int = option(42, help="seed of the data order and of all random numbers")

    lr: float = option(3e-4, help="peak learning rate")
    lr_schedule: str = option(
        "cosine", help="what the learning rate does after the warm-up", choices=SCHEDULES
    )
    warmup_steps: int | None = option(
        None,
        help="steps of linear warm-up (default: 2.5% of the steps)",
        names=("-s",),
    )
    min_lr_ratio: float = option(
        0.1, help="floor of the learning rate, as a share of --lr (not for constant)"
    )
    decay_ratio: float = option(
        0.1, help="share of the steps that the last decay takes (wsd, infinite)"
    )
    cooldown_ratio: float = option(
        0.25, help="share of the steps from the peak down to the constant rate (infinite)"
    )
    constant_lr_ratio: float = option(0.5, help="the constant rate, as a share of --lr (infinite)")
    weight_decay: float = option(0.1, help="decoupled weight decay of matrices", names=("-w",))
    decay_all: bool = option(False, help="weight decay on norms and biases, too")
    grad_clip: float = option(
        1.0, help="largest gradient norm; 0 does not clip", names=("--gradient_clipping",)
    )

    freeze_non_embeds_params: bool = option(
        False, help="train the input and output embeddings only"
    )
    freeze: list[str] | None = option(
        None,
        help="patterns of parameter names that are not trained, such as 'model.layers.[0-3].*'",
    )
    train_new_rows_only: bool = option(
        False,
        help="of the embeddings, train the rows of new pieces only (after init_model.py; see "
        "--num_old_rows)",
    )
    num_old_rows: int | None = option(
        None,
        help="embedding rows that are not new (default: as extension_report.json of --pretrained "
        "says)",
    )
    lora_rank: int = option(
        0, help="rank of LoRA adapters that are trained in place of the layers; 0 for none"
    )
    lora_alpha: float = option(16.0, help="scale of LoRA: its update is times alpha / rank")
    lora_dropout: float = option(0.0, help="dropout before LoRA adapters")
    lora_modules: list[str] | None = option(
        None, help="names of the linear modules with LoRA (default: all of attention and MLP)"
    )
    lora_train_embeddings: bool = option(
        False, help="with LoRA, train the input and output embeddings whole"
    )
    attention_across_documents: bool = option(
        True, help="tokens see the documents before theirs in a packed row; positions run on"
    )
    use_neft: bool = option(False, help="add NEFTune noise to the embeddings while training")
    neftune_noise_alpha: float = option(5.0, help="strength of the NEFTune noise")

    load_checkpoint: str | None = option(
        None,
        help="a checkpoint of a run, which is resumed; auto: the newest one in SAVE_DIR, if there "
        "is one; or a model directory (such as a checkpoint's modeling/), whose weights start a "
        "new stage",
    )
    save_interval: int = option(
        1000, help="steps between checkpoints; 0: only at epoch ends, and when it ends"
    )
    save_dir: Path = option(Path("checkpoint_dir"), help="where checkpoints and metrics go")
    keep_last: int = option(0, help="checkpoints that are kept, older ones are removed; 0: all")
    async_save: bool = option(
        False, help="write checkpoints in the background, from a copy in host memory"
    )
    on_save_error: str = option(
        "stop",
        help="a checkpoint that cannot be written (a full disk) ends the run, or is a warning",
        choices=("stop", "continue"),
    )
    max_time: str | None = option(
        None, help="end with a checkpoint before this time is up, such as 23h30m or 45m"
    )
    overwrite: bool = option(False, help="start anew in a SAVE_DIR that holds another run")

    report_to: list[str] = option(
        ["tensorboard"],
        help=f"any of {', '.join(REPORTERS)}; metrics.jsonl is always written",
        comma=True,
    )
    tensorboard_dir: Path | None = option(
        None, help="where TensorBoard events go (default: SAVE_DIR/tensorboard)"
    )
    config_file: Path | None = option(
        None,
        help="where the resolved flags are written, to rerun with --config "
        "(default: SAVE_DIR/config.json)",
    )
    eval_dataset: list[Path] | None = option(
        None, help="validation parts to measure loss and bits per byte on"
    )
    eval_interval: int = option(500, help="steps between evaluations; one more is at the end")

    max_bad_steps: int = option(
        3, help="batches in a row that may have a loss or gradient that is not finite"
    )
    loss_spike_sigma: float = option(
        6.0, help="standard deviations above the last 100 losses that make a spike; 0: none do"
    )
    on_loss_spike: str = option(
        "warn", help="what to do at a spike: warn, or skip the update", choices=("warn", "skip")
    )
    hang_timeout: str = option(
        "8m",
        help="time without progress after which the process that is behind is named and "
        "the run ends; 0 waits for ever",
    )

    def problems(self) -> list[str]:
        """Everything that can be said without loading anything."""
        from colossal_llama.training.checks import problems

        return problems(self)
