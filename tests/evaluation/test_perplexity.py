"""Bits per byte: against a slow computation by hand, and what must not change it."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.cli import main
from colossal_llama.errors import DataError
from colossal_llama.evaluation.perplexity import evaluate_model
from colossal_llama.inference.loading import load_model_and_tokenizer

TEXTS = {
    "en": ["A tokenizer splits text into pieces.", "Short.", "x" * 140, "</s> is only text <s>"],
    "zh": ["明月松间照，清泉石上流。", "这是一个测试。🙂", "空山新雨后，天气晚来秋。" * 5],
}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_model_and_tokenizer(tiny_model, "cpu")


def bits_by_hand(model: Any, ids: list[int], bos: int, window: int) -> float:
    """One token at a time: the whole prefix through the model, then -log2 of the softmax."""
    import torch

    bits = 0.0
    for position, token in enumerate(ids):
        start = position - position % (window - 1)
        with torch.no_grad():
            logits = model(torch.tensor([[bos, *ids[start:position]]])).logits[0, -1].double()
        bits -= math.log2(torch.softmax(logits, 0)[token].item())
    return bits


@pytest.mark.parametrize("window", [16, 64])
def test_bits_per_byte_equals_the_computation_by_hand(loaded: Any, window: int) -> None:
    model, tokenizer = loaded
    figures = evaluate_model(model, tokenizer, TEXTS, max_length=window, batch_size=3)
    assert figures["max_length"] == window
    for category, texts in TEXTS.items():
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        rows = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        backend.encode_special_tokens = False
        size = sum(len(text.encode()) for text in texts)
        bits = sum(bits_by_hand(model, ids, tokenizer.bos_token_id, window) for ids in rows)
        row = figures["categories"][category]
        assert row["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
        assert row["tokens"] == sum(map(len, rows))
        assert row["bytes"] == size
        assert row["bytes_per_token"] == size / row["tokens"]
        assert row["windowed"] == sum(len(ids) > window - 1 for ids in rows)
        assert row["loss_per_token"] * row["tokens"] == pytest.approx(row["loss"])


def test_batch_size_and_a_longer_window_change_nothing(loaded: Any) -> None:
    model, tokenizer = loaded
    short = {name: [text[:60] for text in texts] for name, texts in TEXTS.items()}

    def bits(**settings: int) -> list[float]:
        figures = evaluate_model(model, tokenizer, short, **settings)
        return [row["bits_per_byte"] for row in figures["categories"].values()]

    reference = bits(max_length=128, batch_size=1)
    for settings in ({"batch_size": 2}, {"batch_size": 100}, {"max_length": 10_000}):
        assert bits(**{"max_length": 128, **settings}) == pytest.approx(reference, rel=1e-5)


def test_the_order_of_documents_changes_nothing(loaded: Any) -> None:
    model, tokenizer = loaded
    shuffled = {name: random.Random(1).sample(texts, len(texts)) for name, texts in TEXTS.items()}
    first = evaluate_model(model, tokenizer, TEXTS)["categories"]
    second = evaluate_model(model, tokenizer, shuffled)["categories"]
    for category in TEXTS:
        assert second[category]["loss"] == pytest.approx(first[category]["loss"], rel=1e-5)


def test_the_window_is_no_longer_than_the_models_context(loaded: Any) -> None:
    figures = evaluate_model(*loaded, TEXTS, max_length=4096)
    assert figures["max_length"] == 128
    assert figures["categories"]["en"]["windowed"] == 1


def test_nothing_to_evaluate_is_an_error(loaded: Any) -> None:
    with pytest.raises(DataError, match="no text"):
        evaluate_model(*loaded, {})
    with pytest.raises(DataError, match="zh"):
        evaluate_model(*loaded, {"en": ["text"], "zh": [""]})


def write_lines(path: Path, category: str, texts: list[str]) -> None:
    lines = [
        json.dumps({"source": text[:3], "target": text[3:], "category": category}) for text in texts
    ]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_command_prints_and_writes_the_same_figures(
    tiny_model: Path, loaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "en.jsonl", "en", TEXTS["en"])
    write_lines(tmp_path / "zh.jsonl.gz", "zh", TEXTS["zh"])
    output = tmp_path / "out" / "figures.json"
    inputs = f"{tmp_path / 'zh.jsonl.gz'},{tmp_path / 'en.jsonl'}"
    arguments = ["evaluate", "--model_path", str(tiny_model), "--data_input_dirs", inputs]
    assert main([*arguments, "--output", str(output), "--device", "cpu"]) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    expected = evaluate_model(*loaded, TEXTS)
    printed = capsys.readouterr().out
    for category, row in expected["categories"].items():
        assert written["categories"][category] == pytest.approx(row, rel=1e-5)
        assert f"{row['bits_per_byte']:.4f}" in printed
        assert f"{row['bytes_per_token']:.4f}" in printed


def test_a_tokenizer_larger_than_the_model_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["明月"])
    tokenizer.save_pretrained(model)
    write_lines(tmp_path / "en.jsonl", "en", TEXTS["en"])
    arguments = ["evaluate", "--model_path", str(model), "--output", str(tmp_path / "out.json")]
    assert main([*arguments, "--data_input_dirs", str(tmp_path / "en.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "401" in message
    assert "400" in message
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("not json", "bad.jsonl:2"),
        ('{"source": "", "target": "x"}', "category"),
        ('{"source": "", "target": "x", "category": 3}', "bad.jsonl:2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, named: str
) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"source": "", "target": "fine", "category": "en"})
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    code = main(["evaluate", "--model_path", str(tiny_model), "--data_input_dirs", str(path)])
    message = capsys.readouterr().err
    assert code == 2
    assert named in message
    assert message.count("\n") == 1


def test_all_wrong_flags_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_path", "m", "--data_input_dirs", "d", "--max_length", "1"]
    assert main(["evaluate", *flags, "--batch_size", "0"]) == 2
    message = capsys.readouterr().err
    assert "--max_length" in message
    assert "--batch_size" in message
