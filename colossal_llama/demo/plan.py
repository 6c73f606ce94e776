"""What the demo does: its stages in order, each an ordinary command, in two sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from colossal_llama.demo.runner import Stage
from colossal_llama.runtime.cpu import bf16_is_fast

PROCESSES = 2
MAX_LENGTH = 256
# The models that are measured, by the name of their figures, in the order of their making.
MODELS = {
    "base": "base model",
    "init": "extended, not trained",
    "stage-a": "stage A: embeddings",
    "stage-b": "stage B: all weights",
    "sft": "after fine-tuning",
}
# The stages that train, as the plot names them.
TRAINED = {
    "base": "base: pretraining",
    "stage-a": "stage A: embeddings",
    "stage-b": "stage B: all weights",
    "sft": "supervised fine-tuning",
}


@dataclass(frozen=True)
class Size:
    """How much of everything: bytes of text, pieces, conversations."""

    zh_bytes: int
    en_bytes: int
    code_bytes: int
    replay_bytes: int
    base_vocabulary: int
    zh_pieces: int
    conversations: int
    base_epochs: int
    parts: int
    new_tokens: int


SIZES = {
    "full": Size(
        zh_bytes=1_800_000,
        en_bytes=1_100_000,
        code_bytes=700_000,
        replay_bytes=300_000,
        base_vocabulary=3500,
        zh_pieces=4000,
        conversations=600,
        base_epochs=1,
        parts=5,
        new_tokens=48,
    ),
    "small": Size(
        zh_bytes=120_000,
        en_bytes=100_000,
        code_bytes=60_000,
        replay_bytes=30_000,
        base_vocabulary=1000,
        zh_pieces=2000,
        conversations=40,
        base_epochs=1,
        parts=5,
        new_tokens=8,
    ),
}


def stages(out: str, size: Size) -> list[Stage]:
    """All stages; ``out`` is the output directory as seen from the repository's root."""
    return [
        *_base(out, size),
        *_extension(out, size),
        *_adaptation(out, size),
        *_fine_tuning(out, size),
        *_proof(out, size),
    ]


def model_paths(out: str) -> dict[str, str]:
    """Per measured model its directory; ``{latest}`` as in ``Stage``."""
    paths = {name: f"{out}/{name}/{{latest}}/modeling" for name in MODELS}
    return {**paths, "init": f"{out}/init"}


def _stage(name: str, title: str, command: str, *outputs: str) -> Stage:
    return Stage(name, title, tuple(command.split()), tuple(map(Path, outputs)))


def _base(out: str, size: Size) -> list[Stage]:
    corpus = f"{out}/corpus"
    return [
        _stage(
            "corpus",
            "gather text",
            f"python -m colossal_llama.demo.corpus --out {corpus} --zh_bytes {size.zh_bytes} "
            f"--en_bytes {size.en_bytes} --code_bytes {size.code_bytes} "
            f"--replay_bytes {size.replay_bytes}",
            corpus,
        ),
        _stage(
            "base-tokenizer",
            "learn the base tokenizer",
            "python colossal_llama/tokenizer/train_tokenizer.py "
            f"--data_input_dirs {corpus}/train/en.jsonl,{corpus}/train/code.jsonl "
            f"--target_tokenizer_dir {out}/base-tokenizer --vocab_size {size.base_vocabulary}",
            f"{out}/base-tokenizer",
        ),
        _stage(
            "base-init",
            "make the base model",
            "python colossal_llama/model/init_model.py --preset demo "
            f"--target_tokenizer_path {out}/base-tokenizer --target_model_path {out}/base-init",
            f"{out}/base-init",
        ),
        _stage(
            "base-data",
            "pack English and code",
            "python prepare_pretrain_dataset.py "
            f"--data_input_dirs {corpus}/train/en.jsonl,{corpus}/train/code.jsonl "
            f"--tokenizer_dir {out}/base-tokenizer --data_arrow_output_dir {out}/base-data "
            f"--max_length {MAX_LENGTH} --num_spliced_dataset_bins 1",
            f"{out}/base-data",
        ),
        _train(
            out,
            "base",
            "pretrain the base model",
            f"--pretrained {out}/base-init --dataset {out}/base-data "
            f"--num_epochs {size.base_epochs} --micro_batch_size 4 --lr 3e-3 --plugin zero2",
        ),
        _evaluation(out, "base"),
    ]


def _extension(out: str, size: Size) -> list[Stage]:
    return [
        _stage(
            "tokenizer",
            "learn the next pieces, in Chinese",
            "python colossal_llama/tokenizer/train_tokenizer.py --scripts Han "
            f"--source_tokenizer_dir {out}/base-tokenizer --num_new_pieces {size.zh_pieces} "
            f"--data_input_dirs {out}/corpus/train/zh.jsonl "
            f"--target_tokenizer_dir {out}/tokenizer",
            f"{out}/tokenizer",
        ),
        _stage(
            "analysis",
            "compare the tokenizers",
            "python colossal_llama/tokenizer/analyze_tokenizer.py "
            f"--tokenizer_dirs {out}/base-tokenizer,{out}/tokenizer "
            f"--data_input_dirs {out}/corpus/held_out --output_dir {out}/analysis",
            f"{out}/analysis",
        ),
        _stage(
            "init",
            "initialise new rows",
            "python colossal_llama/model/init_model.py "
            f"--source_model_and_tokenizer_path {model_paths(out)['base']} "
            f"--target_tokenizer_path {out}/tokenizer --target_model_path {out}/init",
            f"{out}/init",
        ),
        _evaluation(out, "init"),
    ]


def _adaptation(out: str, size: Size) -> list[Stage]:
    """Stage A learns from the first part, stage B from the others: every part holds a share of
    every category, so both see Chinese with English and code.
    """
    others = " ".join(f"{out}/data/part-{part:05d}" for part in range(1, size.parts))
    return [
        _stage(
            "data",
            "pack Chinese with replay",
            "python prepare_pretrain_dataset.py "
            f"--data_input_dirs {out}/corpus/train/zh.jsonl,{out}/corpus/replay "
            f"--tokenizer_dir {out}/tokenizer --data_arrow_output_dir {out}/data "
            f"--max_length {MAX_LENGTH} --num_spliced_dataset_bins {size.parts}",
            f"{out}/data",
        ),
        _train(
            out,
            "stage-a",
            "stage A: train embeddings",
            f"--pretrained {out}/init --dataset {out}/data/part-00000 --micro_batch_size 4 "
            "--lr 3e-3 --freeze_non_embeds_params --plugin zero2",
        ),
        _evaluation(out, "stage-a"),
        _train(
            out,
            "stage-b",
            "stage B: train everything",
            f"--pretrained {out}/init --load_checkpoint {model_paths(out)['stage-a']} "
            f"--dataset {others} --micro_batch_size 4 --lr 2e-3 --warmup_steps 20 --plugin zero2",
        ),
        _evaluation(out, "stage-b"),
    ]


def _fine_tuning(out: str, size: Size) -> list[Stage]:
    return [
        _stage(
            "conversations",
            "make conversations",
            "python -m colossal_llama.demo.conversations "
            f"--data_input_dirs {out}/corpus/train --output {out}/conversations/train.jsonl "
            f"--conversations {size.conversations}",
            f"{out}/conversations",
        ),
        _stage(
            "sft-data",
            "format conversations",
            f"python prepare_sft_dataset.py --data_input_dirs {out}/conversations "
            f"--tokenizer_dir {out}/tokenizer --data_arrow_output_dir {out}/sft-data "
            f"--max_length {MAX_LENGTH} --num_spliced_dataset_bins 1",
            f"{out}/sft-data",
        ),
        _train(
            out,
            "sft",
            "fine-tune for chat",
            f"--pretrained {model_paths(out)['stage-b']} --dataset {out}/sft-data "
            "--micro_batch_size 8 --accumulation_steps 1 --lr 5e-4 --use_neft "
            "--plugin 3d --tp 2 --zero_stage 0",
        ),
        _evaluation(out, "sft"),
    ]


def _proof(out: str, size: Size) -> list[Stage]:
    models = model_paths(out)
    return [
        _stage(
            "samples",
            "talk to the models",
            f"python -m colossal_llama.demo.samples --model_paths {','.join(models.values())} "
            f"--max_new_tokens {size.new_tokens} --output {out}/samples.json",
            f"{out}/samples.json",
        ),
        _stage(
            "verification",
            "load every checkpoint",
            f"python -m colossal_llama.demo.verification --save_dir {out}/stage-b "
            f"--processes {PROCESSES} --model_paths {','.join(models.values())} "
            f"--output {out}/verification.json",
            f"{out}/verification.json",
        ),
    ]


def _train(out: str, name: str, title: str, flags: str) -> Stage:
    # A free port instead of 29500, so that two demos can share a machine.
    launcher = f"colossalai run --nproc_per_node {PROCESSES} --extra_launch_args standalone"
    common = f"--save_dir {out}/{name} --save_interval 0 --max_length {MAX_LENGTH}"
    precision = "bf16" if bf16_is_fast() else "fp32"
    command = f"{launcher} train.py {flags} {common} --mixed_precision {precision}"
    return _stage(name, title, command, f"{out}/{name}")


def _evaluation(out: str, model: str) -> Stage:
    figures = f"{out}/evaluation/{model}.json"
    return _stage(
        f"evaluate-{model}",
        f"evaluate {model}",
        f"colossal-llama evaluate --model_path {model_paths(out)[model]} "
        f"--data_input_dirs {out}/corpus/held_out --max_length {MAX_LENGTH} --output {figures}",
        figures,
    )
