"""Evaluation counts every row once, however rows are spread, and the bytes of its text exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from colossal_llama.dataset.loader import TrainingRows, open_parts
from colossal_llama.dataset.tokenization import text_tokenizer
from colossal_llama.errors import DataError
from colossal_llama.tokenizer.piece_bytes import EVERY, FIRST, NONE, PieceBytes, piece_bytes
from colossal_llama.training import evaluation
from colossal_llama.training.batches import Batch, BatchMaker
from colossal_llama.training.evaluation import Evaluator, figures, micro_batches
from colossal_llama.training.loss import TokenLoss, next_tokens
from colossal_llama.training.plugins import Layout
from colossal_llama.training.validation import Validation, check_held_out, count, text_bytes
from tests.dataset.made_parts import CATEGORIES, RowData, some_rows, write_dataset, write_tokenizer
from tests.dataset.preparing import prepare

TEXTS = [
    "One text.",
    " with a space first",
    "中文，没有空格",
    "two\n\nlines ",
    "🙂 naïve",
    "x" * 90,
]
BOS, EOS, SPACE_A, A = range(4)


def _layout(size: int, rank: int, multiple: int) -> Layout:
    return Layout(
        size, rank, True, True, rank, pipeline=False, sequence_multiple=multiple, gradient_ranks=1
    )


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Validation:
    """23 rows of three categories, of 1 to 40 tokens; every third id is no text."""
    root = tmp_path_factory.mktemp("validation")
    tokenizer = write_tokenizer(root / "tokenizer")
    data = write_dataset(root / "data", tokenizer, [[]], some_rows(23, seed=3))
    rows = open_parts([data / "validation"], tokenizer, 64)
    rows.categories = CATEGORIES
    ids = np.arange(32_000)
    nothing = np.zeros(len(ids), dtype=np.bool_)
    return count(rows, PieceBytes(ids % 5, ids % 3 > 0, nothing, nothing, NONE))


def _sums(validation: Validation, size: int, micro: int, at_once: int, multiple: int) -> np.ndarray:
    """Sums of losses that depend on a token and the one before it, over ``size`` processes."""
    sums = torch.zeros(2 * len(validation.tokens), dtype=torch.float64)

    def forward(batches: Sequence[Batch], receive: Callable[[torch.Tensor, Batch], None]) -> None:
        for batch in batches:
            wanted = next_tokens(batch["labels"])
            losses = torch.where(wanted >= 0, (batch["input_ids"] * 7 + wanted) % 1000, 0)
            receive(losses.float(), batch)

    passes: Any = SimpleNamespace(token_loss=TokenLoss(32_000), forward=forward)
    numbers = []
    for rank in range(size):
        maker = BatchMaker(validation.rows, _layout(size, rank, multiple), micro, pad_id=0)
        for batches in micro_batches(validation, maker, at_once):
            assert {len(batch["labels"]) for batch in batches} == {micro}
            assert len({batch["labels"].shape for batch in batches}) == 1, "one width in a pipeline"
            assert batches[0]["labels"].shape[1] % multiple == 0
            evaluation.add_losses(sums, passes, batches)
            numbers.append((rank, len(batches)))
    by_rank = [[n for r, n in numbers if r == rank] for rank in range(size)]
    assert all(each == by_rank[0] for each in by_rank), "processes would wait for each other"
    return sums.view(-1, 2).numpy()


def test_result_is_the_same_however_rows_are_spread(validation: Validation) -> None:
    wanted = np.zeros((3, 2))
    for row in validation.rows.take(range(len(validation.rows))):
        category = CATEGORIES.index(row["category"])
        for before, label in zip(row["input_ids"][:-1], row["labels"][1:], strict=True):
            if label != -100:
                wanted[category, int(label % 3 > 0)] += (int(before) * 7 + int(label)) % 1000
    assert wanted.all()
    for size in (1, 2, 3):
        for micro in (1, 2, 4, 23, 64):
            for at_once in (1, 3):
                found = _sums(validation, size, micro, at_once, multiple=size)
                assert np.array_equal(found, wanted), (size, micro, at_once)


def test_figures(validation: Validation) -> None:
    sums = np.array([[1.0, 2.0], [0.5, 4.0], [0.0, 8.0]])
    found = figures(validation, sums)
    tokens, size = validation.tokens, validation.bytes
    assert found["tokens"] == tokens.sum() == sum(
        int((row["labels"][1:] != -100).sum()) for row in validation.rows.take(range(23))
    )  # fmt: skip
    assert found["loss"] == pytest.approx(15.5 / tokens.sum())
    assert found["bits_per_byte"] == pytest.approx(14 / math.log(2) / size.sum())
    assert found["loss_by_category"]["en"] == pytest.approx(4.5 / tokens[1])
    assert found["bits_per_byte_by_category"]["zh"] == pytest.approx(8 / math.log(2) / size[2])
    line = evaluation.describe({"step": 7, "seconds": 1.0, **found})
    losses, bits = found["loss_by_category"], found["bits_per_byte_by_category"]
    assert line.startswith(f"step 7: evaluation loss {found['loss']:.4f} (")
    before, after = line.split(" bits per byte ")
    assert all(f"{name} {value:.4f}" in before for name, value in losses.items())
    assert all(f"{name} {value:.4f}" in after for name, value in bits.items())


def test_categories_without_loss_or_text_are_left_out(validation: Validation) -> None:
    bare = dataclasses.replace(
        validation, tokens=np.array([0, 3, 4]), bytes=np.array([0, 0, 0])
    )  # fmt: skip
    found = figures(bare, np.ones((3, 2)))
    assert set(found["loss_by_category"]) == {"en", "zh"}
    assert found["bits_per_byte"] is None
    assert found["bits_per_byte_by_category"] == {}
    assert "bits" not in evaluation.describe({"step": 7, "seconds": 1.0, **found})


def test_is_due_at_intervals_and_at_the_end_and_put_off_when_stopped(
    validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        Evaluator, "evaluate", lambda self, trainer: seen.append(trainer.state.step)
    )
    monkeypatch.setattr(evaluation, "describe", str)
    log = SimpleNamespace(log_evaluation=lambda result: None)

    def trainer(step: int, reason: str | None) -> Any:
        state = SimpleNamespace(step=step, finished=step == 8)
        return SimpleNamespace(state=state, stop_reason=reason, log=log, say=lambda text: None)

    def run(steps: range, stop: int, saved: dict[str, Any]) -> dict[str, Any]:
        """Stops with step ``stop``; returns what is saved then."""
        evaluator = Evaluator(validation, 3)
        if saved:
            evaluator.load_state(saved)
        evaluator.run_begins(trainer(steps.start - 1, None))
        for step in steps:
            last = trainer(step, "stopped by SIGTERM" if step == stop else None)
            evaluator.step_ended(last, None)  # type: ignore[arg-type]
        saved = evaluator.state()
        evaluator.run_ends(last)
        return saved

    assert not run(range(1, 9), 0, {})
    assert seen == [3, 6, 8]
    seen.clear()
    assert not run(range(1, 6), 5, {})
    saved = run(range(6, 7), 6, {})
    assert seen == [3], "there may be no time for the sixth"
    assert not run(range(7, 9), 8, saved)
    assert seen == [3, 6, 8], "the last is measured after it was saved"


def _row(ids: list[int], labels: list[int], lengths: list[int]) -> dict[str, Any]:
    arrays = {"input_ids": ids, "labels": labels, "document_lengths": lengths}
    return {name: np.array(values, dtype=np.int32) for name, values in arrays.items()}


def _pieces(prefix: str) -> PieceBytes:
    """bos and eos, "▁a" of two bytes and "a" of one."""
    text = np.array([False, False, True, True])
    spaced = np.array([False, False, True, False])
    return PieceBytes(np.array([0, 0, 2, 1]), text, ~text, spaced, prefix)


@pytest.mark.parametrize(
    ("ids", "lengths", "size"),
    [
        ([BOS, SPACE_A, SPACE_A, EOS], [4], 3),
        ([BOS, SPACE_A, EOS, BOS, SPACE_A, EOS], [3, 3], 2),
        # The rest of a document that began in another row: its space is one of the text.
        ([BOS, SPACE_A, EOS, SPACE_A, EOS], [3, 2], 3),
        # Nothing predicts the first token of a row.
        ([SPACE_A, SPACE_A, EOS], [3], 2),
    ],
)
def test_space_before_a_text_is_not_counted(ids: list[int], lengths: list[int], size: int) -> None:
    row = _row(ids, ids, lengths)
    for prefix in (EVERY, FIRST):
        assert text_bytes(row, _pieces(prefix), "pretrain") == size


def test_space_before_a_target_or_an_answer_is_not_counted() -> None:
    ids = [BOS, SPACE_A, SPACE_A, SPACE_A, EOS]
    behind_a_source = _row(ids, [-100, -100, SPACE_A, SPACE_A, EOS], [5])
    assert text_bytes(behind_a_source, _pieces(EVERY), "pretrain") == 3
    # In a conversation text is cut at special tokens only, not where the loss begins.
    assert text_bytes(behind_a_source, _pieces(EVERY), "sft") == 4
    assert text_bytes(behind_a_source, _pieces(NONE), "pretrain") == 4
    # The source's end in one document, the middle of a target in the next.
    cut = _row([SPACE_A, SPACE_A, SPACE_A, EOS], [-100, -100, SPACE_A, EOS], [2, 2])
    assert text_bytes(cut, _pieces(EVERY), "pretrain") == 2


def _count_prepared(
    tmp_path: Path, tokenizer: Path, records: list[dict[str, Any]], **flags: Any
) -> Validation:
    source = tmp_path / "records.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    source.write_text(lines, encoding="utf-8")
    out = tmp_path / "data"
    flags = {"max_length": 512, "num_spliced_dataset_bins": 1, "num_workers": 1, **flags}
    assert prepare(source, tokenizer, out, **flags) == 0
    fast = json.loads(text_tokenizer(tokenizer).json)
    return count(open_parts([out], tokenizer, 512), piece_bytes(fast))


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_bytes_of_prepared_documents(tmp_path: Path, tiny_model: Path, packing: str) -> None:
    records = [
        {"source": source, "target": text, "category": category}
        for text in TEXTS
        for category, source in (("plain", ""), ("with source", "A question? "))
    ]
    found = _count_prepared(tmp_path, tiny_model, records, packing=packing)
    sizes = dict(zip(found.rows.categories, found.bytes.tolist(), strict=True))
    size = sum(len(text.encode("utf-8")) for text in TEXTS)
    # Rows of several documents begin with bos as well.
    assert sizes == {"plain": size, "with source": size}


def test_bytes_of_prepared_conversations(tmp_path: Path, tiny_model: Path) -> None:
    turns = [
        [{"from": "human", "content": f"Question {n}?"}, {"from": "assistant", "content": text}]
        for n, text in enumerate(TEXTS)
    ]
    records = [{"messages": turn + turns[0]} for turn in turns]
    found = _count_prepared(tmp_path, tiny_model, records, kind="sft")
    sizes = [len(text.encode("utf-8")) for text in TEXTS]
    assert found.bytes.tolist() == [sum(sizes) + len(sizes) * sizes[0]]


def _opened(tmp_path: Path, *paths: str) -> TrainingRows:
    return open_parts([tmp_path / path for path in paths], tmp_path / "tokenizer", 64)


def test_rows_that_are_trained_on_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("colossal_llama.training.validation.say", said.append)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows: list[list[RowData]] = [some_rows(5, seed) for seed in range(4)]
    write_dataset(tmp_path / "data", tokenizer, rows[:3], rows[3])
    write_dataset(tmp_path / "copy", tokenizer, rows[1:2])
    training = _opened(tmp_path, "data/part-00000", "data/part-00001")
    check_held_out(_opened(tmp_path, "data/validation"), training)
    assert not said
    for path in ("data", "data/part-00000", "copy"):
        with pytest.raises(DataError, match="would be trained on"):
            check_held_out(_opened(tmp_path, path), training)
    check_held_out(_opened(tmp_path, "data/part-00002"), training)
    assert len(said) == 1
    assert "may share documents" in said[0]
