"""Bits per byte before and after: equal where they must be, and an error where they are not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama.errors import DataError
from colossal_llama.model import verification
from colossal_llama.model.verification import problem_of, read_texts, report

OLD, NEW = "The with statement wraps a block. <s> is text.", "def f(): 你好世界"
Extend = Callable[..., Path]


@pytest.fixture
def extended(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with two rows more, the second of them for 你好; rows that are often right."""
    target = tmp_path / "extended"
    shutil.copytree(tiny_model, target)
    weights = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][5:7]])
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    _change(target / "config.json", lambda config: config.update(vocab_size=402))

    def add(fast: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        fast["added_tokens"] += [
            {"id": 400, "content": "<|unused_0|>", **flags},
            {"id": 401, "content": "你好", **flags},
        ]

    _change(target / "tokenizer.json", add)
    return target


def _change(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def rows(table: str) -> dict[str, float]:
    """The figures of a report by the first words of their line."""
    found = {}
    for line in table.splitlines()[1:]:
        name, value = line[2:24].strip(), line[24:].split()[0]
        found[name] = float(value)
    return found


def test_old_text_is_read_as_before(tiny_model: Path, extended: Path) -> None:
    table = report(tiny_model, extended, [OLD, "x"], same_weights=True)
    found = rows(table)
    assert list(found) == ["source", "result, old ids only", "result"]
    assert found["source"] == found["result, old ids only"] < found["result"]
    assert f"bits per byte on {len(OLD) + 1} bytes" in table
    assert "identical" in table
    assert "0 of them new pieces" in table


@pytest.mark.parametrize("width", [1024, 9])
def test_the_figure_is_bits_per_byte(
    width: int, tiny_model: Path, extended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a sum over single tokens, each predicted alone, after a bos in every window."""
    monkeypatch.setattr(verification, "_WINDOW", width)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, torch_dtype="auto")
    text = OLD.replace("<s>", "s")
    ids = AutoTokenizer.from_pretrained(tiny_model)(text, add_special_tokens=False).input_ids
    bits = 0.0
    for start in range(0, len(ids), width - 1):
        for end in range(start, min(start + width - 1, len(ids))):
            seen = torch.tensor([[1, *ids[start:end]]])
            with torch.no_grad():
                scores = model(seen).logits[0, -1].float().log_softmax(-1)
            bits -= scores[ids[end]].item() / math.log(2)
    found = rows(report(tiny_model, extended, [text], same_weights=True))
    assert found["source"] == pytest.approx(bits / len(text), rel=1e-2)


def test_special_tokens_in_a_text_are_text(tiny_model: Path, extended: Path) -> None:
    table = report(tiny_model, extended, ["a</s>a"], same_weights=True)
    count = int(table.splitlines()[1].split()[-2])
    assert count > 3  # the prefix, two letters and eos would be as many as three


def test_new_pieces_are_said(tiny_model: Path, extended: Path) -> None:
    table = report(tiny_model, extended, [NEW], same_weights=True)
    assert list(rows(table)) == ["source", "result"]
    assert "1 of them new pieces" in table


def _spoil(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        weights[name] = weights[name] * 1.01
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    return spoil


def _nan(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _other_ids(directory: Path) -> None:
    def edit(fast: dict[str, Any]) -> None:
        fast["normalizer"] = {"type": "Lowercase"}

    _change(directory / "tokenizer.json", edit)


BREAKAGES = {
    "an old row": (_spoil("lm_head.weight"), "does not predict what"),
    "another tensor": (_spoil("model.norm.weight"), "does not predict what"),
    "not a number": (_nan, "not finite"),
    "segmentation": (_other_ids, "reads the text to verify on differently"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "does not load"),
}


@pytest.mark.parametrize(("breakage", "complaint"), BREAKAGES.values(), ids=BREAKAGES)
def test_what_went_wrong_is_an_error(
    breakage: Callable[[Path], None], complaint: str, tiny_model: Path, extended: Path
) -> None:
    breakage(extended)
    with pytest.raises(DataError, match=complaint) as caught:
        report(tiny_model, extended, [OLD], same_weights=True)
    assert "\n" not in str(caught.value)


def test_converted_weights_may_differ(tiny_model: Path, extended: Path) -> None:
    _spoil("model.norm.weight")(extended)
    table = report(tiny_model, extended, [OLD], same_weights=False)
    assert "changed by" in table


def test_texts_and_files(tmp_path: Path) -> None:
    assert read_texts("some text") == ["some text"]
    assert read_texts("a" * 5000) == ["a" * 5000]
    path = tmp_path / "text.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n{"source": "", "target": "c"}\n')
    assert read_texts(str(path)) == ["ab", "c"]
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        read_texts(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (" ", "is empty"),
        ("missing.txt", "missing.txt: no such file"),
        ("\udcff", "is not UTF-8 text"),  # how Python shows a byte of the command line
        ("Text.", None),
    ],
)
def test_problems(value: str, problem: str | None) -> None:
    assert problem_of(value) == problem
