"""Each change to ColossalAI: what fails without it, and that it works with it.

The checks are in ``patch_worker.py``; one group of two processes runs all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.runtime import patches
from tests.nursery import run_group

ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests/runtime/patch_worker.py"
LAST = "--- all that is meant to fail has failed"
# Largest distance to torch's own AdamW, whose weights are about 1: fp32 rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Report:
    without: dict[str, Any]
    with_it: dict[str, Any]
    last_words: str


@pytest.fixture(scope="session")
def report() -> Report:
    done = run_group(WORKER)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Report(
        {record["name"]: record["without"] for record in records},
        {record["name"]: record["with"] for record in records},
        done.stderr.rpartition(LAST)[2],
    )


def test_every_patch_is_checked(report: Report) -> None:
    names = {patch.__name__ for patch in (*patches.ALWAYS, *patches.ON_CPU)}
    assert names <= report.without.keys()


def test_accelerator_answers_what_the_upstream_one_does_not(report: Report) -> None:
    assert {"current_device", "manual_seed", "memory_allocated", "Stream"} <= {
        *report.without["accelerator"]
    }
    assert report.with_it["accelerator"] == []


def test_adam_on_the_cpu_is_torchs_adamw(report: Report) -> None:
    assert "No usable kernel" in report.without["adam_kernels"]
    assert len(report.with_it["adam_kernels"]) == 4
    assert max(report.with_it["adam_kernels"].values()) < ROUNDING


def test_adam_of_many_tensors_is_torchs_adamw(report: Report) -> None:
    assert report.with_it["multi_tensor_kernel"] < ROUNDING


def test_scale_of_bf16_gradients_is_applied(report: Report) -> None:
    without, with_it = (side["scaled_bf16_gradients"] for side in (report.without, report.with_it))
    assert without["bf16 -1.0"] < ROUNDING, "not even without a scale"
    assert without["bf16 3.0"] > 0.1
    assert max(with_it.values()) < ROUNDING


def test_pipeline_sends_over_gloo(report: Report) -> None:
    assert "is_hccl_available" in report.without["pipeline_backend_check"]
    assert report.with_it["pipeline_backend_check"] == [1.0, 2.0]


def test_zero_runs_without_a_gpu(report: Report) -> None:
    assert "device is required" in report.without["zero_device_check"]
    first, *_, last = report.with_it["zero_device_check"]
    assert last < first / 2
    assert report.with_it["zero_dtype_check"].startswith("AssertionError: expected parameters of")


def test_gemini_finds_its_shards(report: Report) -> None:
    assert report.without["gemini_chunk_placement"].startswith("AssertionError")
    for losses in report.with_it["gemini_chunk_placement"]:
        assert losses == pytest.approx(report.with_it["zero_device_check"], rel=1e-3)


def test_gemini_adds_up_micro_batches(report: Report) -> None:
    """Two equal micro-batches make twice the gradient of one."""
    assert report.without["gemini_accumulation"]["gathered"] == pytest.approx(3, rel=1e-2)
    for ratio in report.with_it["gemini_accumulation"].values():
        assert ratio == pytest.approx(2, rel=1e-2)


def test_gemini_recovers_from_an_overflow(report: Report) -> None:
    """Infinite gradients of a step that was left out are not added to those of the next."""
    assert report.without["gemini_skipped_step"] == [True, True, True]
    assert report.with_it["gemini_skipped_step"] == [True, False, False]


def test_gemini_saves_the_working_dtype(report: Report) -> None:
    half = ["torch.bfloat16"]
    without, with_it = (side["gemini_saved_dtype"] for side in (report.without, report.with_it))
    assert without == {"gathered": ["torch.float32"], "sharded": half}
    assert with_it == {"gathered": half, "sharded": half}


def test_gemini_saves_what_was_updated_in_host_memory(report: Report) -> None:
    assert report.without["gemini_offloaded_weights"] is False
    assert report.with_it["gemini_offloaded_weights"] is True


def test_padding_is_removed_from_a_detached_embedding(report: Report) -> None:
    assert "_unpad_detach" in report.without["detached_padding"]
    assert report.with_it["detached_padding"] == [5, 2]


def test_stage_without_gradients_learns_the_norm(report: Report) -> None:
    kinds = ("Naive", "AMP", "Zero")
    assert report.without["norm_of_a_frozen_stage"] == dict.fromkeys(kinds, 0)
    assert report.with_it["norm_of_a_frozen_stage"] == dict.fromkeys(kinds, 5)


def test_zero_has_an_empty_parameter_group(report: Report) -> None:
    assert report.without["zero_on_a_frozen_stage"].startswith("IndexError")
    assert report.with_it["zero_on_a_frozen_stage"] is True


def test_gradients_of_frozen_shared_weights_are_not_added_up(report: Report) -> None:
    assert report.without["frozen_shared_weights"].startswith("TypeError")
    assert report.with_it["frozen_shared_weights"] == [1, 0]


def test_rotary_frequencies_are_exact(report: Report) -> None:
    # Half a unit in the last of bf16's 8 bits.
    assert report.without["rope"] == pytest.approx(2**-9, rel=1)
    assert report.with_it["rope"] == 0


def test_applying_again_changes_nothing(report: Report) -> None:
    again = report.with_it["again"]
    assert again == {name: report.with_it[name] for name in again}


def test_processes_end_without_complaint(report: Report) -> None:
    assert report.with_it["tensor_parallel"] > 0
    for word in ("Traceback", "Exception ignored", "Error", "WARNING", "Warning"):
        assert word not in report.last_words, report.last_words
