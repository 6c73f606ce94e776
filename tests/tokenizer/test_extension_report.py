"""What the comparison on a sample counts as text that an extension may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.tokenizer import extension, extension_report
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.fast_tokenizer import load
from tests.tokenizer.byte_level_styles import make_all


@pytest.fixture(scope="module")
def sources(
    small: Path, english: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = make_all(tmp_path_factory.mktemp("byte-level"), english)
    return {"sentencepiece": small, "byte-level": made["smollm"]}


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_symbols_and_runs_of_spaces_change_only_texts_that_hold_them(
    kind: str, sources: dict[str, Path]
) -> None:
    """Their characters are old ones; a space counts where a piece is nothing but spaces."""
    source = read_tokenizer(sources[kind])
    run, symbol = source.spell("▁" * 40), source.spell("<h1>")
    texts = ["0" + " " * 40 + "0", "a <h1>title</h1>", "title", "\n"]
    extended = extension.extend(source, [run], symbols=[symbol])
    old, new = (
        [entry.ids for entry in load(tokenizer.fast).encode_batch(texts, add_special_tokens=False)]
        for tokenizer in (source, extended.tokenizer)
    )
    assert [one != other for one, other in zip(old, new, strict=True)] == [True, True, False, False]
    report = extension_report.compare(source, extended, texts)
    assert report["documents_without_new_characters"] == 2


def test_a_space_beside_other_characters_is_no_new_character(sources: dict[str, Path]) -> None:
    for path in sources.values():
        source = read_tokenizer(path)
        extended = extension.extend(source, [source.spell("▁龘")])
        report = extension_report.compare(source, extended, ["plain English text", "a 龘"])
        assert report["documents_without_new_characters"] == 1


def test_an_old_id_that_moves_is_noticed(small: Path) -> None:
    source = read_tokenizer(small)
    extended = extension.extend(source, ["龘"])
    vocabulary = extended.tokenizer.fast["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(AssertionError, match="moved"):
        extension_report.describe(source, extended)
