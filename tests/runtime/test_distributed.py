"""The process group: from a launcher's variables, or without any."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama.errors import UsageError
from colossal_llama.runtime import distributed
from colossal_llama.runtime.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "there", "MASTER_PORT": "7",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, without a launcher; what is set in it is undone."""
    values = {name: text for name, text in os.environ.items() if name not in LAUNCHED}
    monkeypatch.setattr(os, "environ", values)
    return values


@pytest.mark.parametrize("missing", LAUNCHED)
def test_incomplete_launcher_is_named(environment: dict[str, str], missing: str) -> None:
    environment.update(LAUNCHED)
    del environment[missing]
    with pytest.raises(UsageError, match=f"did not set {missing};"), distributed.distributed(0):
        pytest.fail("joined a job that does not exist")


def test_launcher_is_believed(environment: dict[str, str]) -> None:
    environment.update(LAUNCHED)
    distributed._check_environment()
    assert {name: environment[name] for name in LAUNCHED} == LAUNCHED
    assert distributed.world_size() == 4


@pytest.mark.parametrize("left_over", [{}, {"MASTER_ADDR": "elsewhere"}])
def test_without_a_launcher_there_is_one_process(
    environment: dict[str, str], left_over: dict[str, str]
) -> None:
    environment.update(left_over)
    assert distributed.world_size() == 1
    distributed._check_environment()
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(environment["MASTER_PORT"]) < 65536


def test_single_process_joins_and_leaves_quietly() -> None:
    """Also inside a group that is there already, which then is left alone."""
    program = """
import torch.distributed as dist
from colossal_llama.runtime.distributed import distributed
with distributed(0):
    with distributed(1):
        pass
    total = __import__("torch").ones(1)
    dist.all_reduce(total)
    print(dist.get_world_size(), float(total))
    from colossalai.logging import get_dist_logger
    get_dist_logger().info("where it puts which shard")
print(dist.is_initialized())
"""
    environment = {name: text for name, text in os.environ.items() if name not in LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "1.0", "False"], done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_freed_memory_is_kept_where_there_is_glibc() -> None:
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
