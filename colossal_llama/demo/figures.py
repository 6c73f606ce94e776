"""Collects what the demo's stages measured, and holds it against what they had to reach."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama import __version__
from colossal_llama.demo.plan import MODELS, TRAINED, model_paths
from colossal_llama.demo.runner import resolved_word
from colossal_llama.storage import read_json, read_jsonl

CHINESE_GAIN = 0.20  # least share by which Chinese bits per byte must fall
ENGLISH_LOSS = 0.05  # largest share by which English bits per byte may rise
COMPRESSION_GAIN = 2.5  # least factor by which Chinese bytes per token must grow
FIRST_LOSS_TOLERANCE = 0.01  # training computes in bfloat16, whose step is 0.8 %
_PACKAGES = ("torch", "transformers", "colossalai", "tokenizers", "sentencepiece", "datasets")


def collect(out: Path, shown: str, root: Path, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything the report shows, as plain values.

    Args:
        out: the demo's directory; ``shown``: the same as it stands in the commands.
        root: the repository's root, in which the commands ran.
        stages: what ``runner.run_stages`` returned.

    Raises:
        DataError: a file that a stage left is missing or broken.
    """
    evaluations = {
        model: read_json(out / "evaluation" / f"{model}.json")["categories"] for model in MODELS
    }
    paths = {resolved_word(path, root): name for name, path in model_paths(shown).items()}
    verification = read_json(out / "verification.json")
    samples = [
        {**sample, "model": paths[sample["model_path"]]}
        for sample in read_json(out / "samples.json")
    ]
    return {
        "marks": marks(evaluations, verification),
        "models": [
            {"name": name, "title": title, "categories": evaluations[name]}
            for name, title in MODELS.items()
        ],
        "curves": {
            name: [
                {"tokens": step["tokens"], "loss": step["loss"]}
                for _, step in read_jsonl(out / name / "metrics.jsonl")
            ]
            for name in TRAINED
        },
        "samples": samples,
        "stages": list(stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in stages),
        "parameters": {paths[path]: count for path, count in verification["parameters"].items()},
        "environment": environment(),
    }


def marks(
    evaluations: dict[str, dict[str, Any]], verification: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the demo has to show: name, what was to be reached, what was, and whether it was.

    ``evaluations`` has the figures of ``evaluation.perplexity.Score`` by model and category.
    """

    def bits(model: str, category: str) -> float:
        return float(evaluations[model][category]["bits_per_byte"])

    def compression(model: str) -> float:
        return float(evaluations[model]["zh"]["bytes_per_token"])

    gain = 1 - bits("stage-b", "zh") / bits("base", "zh")
    loss = bits("stage-b", "en") / bits("base", "en") - 1
    factor = compression("stage-b") / compression("base")
    first = verification["first_loss"]
    difference = abs(first["training"] / first["transformers"] - 1)
    return [
        _mark(
            "Chinese bits per byte after stage B, against the base model",
            f"at least {CHINESE_GAIN:.0%} lower",
            f"{gain:.1%} lower" if gain >= 0 else f"{-gain:.1%} higher",
            gain >= CHINESE_GAIN,
        ),
        _mark(
            "English bits per byte after stage B, against the base model",
            f"at most {ENGLISH_LOSS:.0%} higher",
            f"{loss:.1%} higher" if loss > 0 else f"{-loss:.1%} lower",
            loss <= ENGLISH_LOSS,
        ),
        _mark(
            "Chinese bytes per token, against the base tokenizer",
            f"at least {COMPRESSION_GAIN} times as many",
            f"{factor:.2f} times as many",
            factor >= COMPRESSION_GAIN,
        ),
        _mark(
            "first loss of stage B, against the same batch through stage A's checkpoint",
            f"equal within {FIRST_LOSS_TOLERANCE:.0%}",
            f"{first['training']:.4f} and {first['transformers']:.4f}",
            difference <= FIRST_LOSS_TOLERANCE,
        ),
        # The verification stage fails where one does not load.
        _mark(
            "checkpoints that plain transformers loads",
            "every one",
            f"{len(verification['parameters'])} loaded",
            True,
        ),
    ]


def _mark(name: str, target: str, value: str, met: bool) -> dict[str, Any]:
    return {"name": name, "target": target, "value": value, "met": met}


def environment() -> dict[str, str]:
    """Versions and machine, for whoever compares figures."""
    import psutil

    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "colossal-llama": __version__,
        "Python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
