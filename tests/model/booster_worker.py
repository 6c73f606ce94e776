"""Saves one model through ColossalAI's Booster in several layouts.

    torchrun --nproc_per_node 2 tests/model/booster_worker.py MODEL OUT

MODEL is a Hugging Face directory; OUT gets a directory for every row of LAYOUTS.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from colossal_llama.runtime.distributed import distributed

# Name: (tensor parallel, pipeline stages, sharded, safetensors).
LAYOUTS = {
    "stages-bin": (1, 2, True, False),
    "stages-safetensors": (1, 2, True, True),
    "stages-one-file": (1, 2, False, False),
    "tensor-bin": (2, 1, True, False),
}


def main() -> None:
    source, out = sys.argv[1], Path(sys.argv[2])
    with distributed(seed=0):
        boosted = {split: boost(source, *split) for split in ((1, 2), (2, 1))}
        for name, (tensor, stages, sharded, safe) in LAYOUTS.items():
            booster, model = boosted[tensor, stages]
            target = out / name
            target.mkdir(parents=True, exist_ok=True)
            path = target if sharded else target / "checkpoint.pt"
            booster.save_model(
                model, str(path), shard=sharded, size_per_shard=0.05, use_safetensors=safe
            )
            torch.distributed.barrier()


def boost(source: str, tensor: int, stages: int) -> tuple[Any, Any]:
    """Booster and model, divided over tensor parallel ranks or pipeline stages."""
    from colossalai.booster import Booster
    from colossalai.booster.plugin import HybridParallelPlugin

    plugin = HybridParallelPlugin(
        tp_size=tensor,
        pp_size=stages,
        zero_stage=0,
        precision="fp32",
        microbatch_size=1,
        enable_flash_attention=False,
        make_vocab_size_divisible_by=64,  # 700 rows become 704 in memory
    )
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    booster = Booster(plugin=plugin)
    model, *_ = booster.boost(model)
    return booster, model


if __name__ == "__main__":
    main()
