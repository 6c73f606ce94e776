"""New embedding rows for a model of Llama 2's width: time and memory.

    python benchmarks/init_model.py [FOLDER]

A source with 32,000 ids, hidden size 4096, random bfloat16 weights, is given 37,104 new ones (and
1,000 to 20,000, and with 8 layers instead of 1, and by every strategy), each by the real command
in a process of its own. Needs 12 GB in FOLDER (default: the system's folder for temporary files).

The pieces are made up: the base has Latin pieces and every second of 2,000 Han characters, the
rest is bytes to it; new pieces are words of two to four of these characters.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, OLD, NEW = 4096, 32_000, 37_104
MATRIX = (OLD + NEW) * HIDDEN * 2  # bytes of one extended embedding in bfloat16
HAN = [chr(0x4E00 + at) for at in range(2000)]

# Runs the command and prints its peak; VmHWM, unlike getrusage, starts anew with the process.
CHILD = """
import sys, time
from pathlib import Path
from colossal_llama import command
from colossal_llama.model.init_model import InitModelOptions, init_model
import torch, numpy, safetensors, tokenizers, tqdm

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

start, imports = time.perf_counter(), memory("VmRSS")
code = command.run(InitModelOptions, init_model)
print(time.perf_counter() - start, imports, memory("VmHWM"))
sys.exit(code)
"""


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        targets = {count: scratch / f"tokenizer-{count}" for count in _counts()}
        for count, directory in targets.items():
            write_tokenizer(directory, count)
        print(f"{os.cpu_count()} processors; two extended matrices: {2 * MATRIX / 1e6:,.0f} MB")
        names = ("strategy", "s", "peak MB", "imports MB")
        print("{:>9}{:>8}  {:<13}{:>7}{:>9}{:>12}".format("new rows", "layers", *names))
        for layers in (1, 8):
            source = scratch / f"source-{layers}"
            write_source(source, layers)
            counts = _counts() if layers == 1 else [NEW]
            for count in counts:
                measure(source, targets[count], layers, count, "mean")
            if layers == 1:
                for strategy in ("mean_norm", "multivariate", "random"):
                    measure(source, targets[NEW], layers, NEW, strategy)
            shutil.rmtree(source)


def _counts() -> list[int]:
    return [1_000, 5_000, 10_000, 20_000, NEW]


def measure(source: Path, tokenizer: Path, layers: int, count: int, strategy: str) -> None:
    """Runs the command once and prints a row of the table."""
    target = source.parent / "target"
    flags = ["--source_model_and_tokenizer_path", source, "--target_tokenizer_path", tokenizer]
    flags += ["--target_model_path", target, "--init_strategy", strategy]
    os.sync()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, flags)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds, imports, peak = map(float, done.stdout.splitlines()[-1].split())
    print(
        f"{count:>9,}{layers:>8}  {strategy:<13}{seconds:>7.1f}{peak / 1e6:>9.0f}"
        f"{imports / 1e6:>12.0f}",
        flush=True,
    )
    shutil.rmtree(target)


def write_tokenizer(directory: Path, new: int) -> None:
    """A Llama-like tokenizer.json of 32,000 pieces and ``new`` more."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary += HAN[::2]
    merges = []
    for piece in itertools.islice(_latin(), OLD - len(vocabulary)):
        vocabulary.append(piece)
        if len(piece) > 1:
            merges.append(f"{piece[:-1]} {piece[-1]}")
    vocabulary += itertools.islice(_words(), new)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": key, "content": vocabulary[key], "special": True, **flags} for key in range(3)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    fast: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: key for key, piece in enumerate(vocabulary)},
            "merges": merges,
        },
    }
    assert len(fast["model"]["vocab"]) == OLD + new
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")


def _latin() -> Iterator[str]:
    """a ... z, aa ... zz, aaa ..."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def _words() -> Iterator[str]:
    for at in itertools.count():
        first, rest = at % len(HAN), at // len(HAN)
        word = [HAN[first], *(HAN[(first * 7 + rest * 31 + step) % 2000] for step in (1, 2, 3))]
        yield "".join(word[: 2 + rest % 3])


def write_source(directory: Path, layers: int) -> None:
    """Embedding and output of a Llama and ``layers`` of its layers, in two files."""
    import torch
    from safetensors.torch import save_file

    write_tokenizer(directory, 0)
    torch.manual_seed(0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": OLD,
        "hidden_size": HIDDEN,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text("{}")
    weight_map = {}
    for half, embedding in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        tensors = {embedding: torch.randn(OLD, HIDDEN, dtype=torch.bfloat16)}
        for layer in range(half, layers, 2):
            for name in ("gate", "up", "down"):
                key = f"model.layers.{layer}.mlp.{name}_proj.weight"
                shape = (HIDDEN, 11008) if name == "down" else (11008, HIDDEN)
                tensors[key] = torch.zeros(shape, dtype=torch.bfloat16)
            for name in "qkvo":
                key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
                tensors[key] = torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16)
        file = f"model-{half + 1:05d}-of-00002.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s in all")
