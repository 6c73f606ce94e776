"""Text for a vocabulary is the same text plain or compressed, as JSON lines or as lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.corpus import documents, text_files

TEXTS = ["你好，世界", " leading and trailing ", "naïve 🙂", 'a "quoted" word']


def test_four_spellings_of_one_corpus_agree(tmp_path: Path) -> None:
    """A source joins its target; blank lines and the kind of line end do not count."""
    records = [{"source": text[:1], "target": text[1:], "category": "x"} for text in TEXTS]
    lines = {
        "jsonl": "\n\n".join(json.dumps(record) for record in records),
        "txt": "\r\n\n".join(TEXTS),
    }
    for kind, content in lines.items():
        data = content.encode("utf-8")
        (tmp_path / f"plain.{kind}").write_bytes(data)
        (tmp_path / f"packed.{kind}.gz").write_bytes(gzip.compress(data))
    files = text_files([tmp_path])
    assert [file.name for file in files] == [
        *("packed.jsonl.gz", "packed.txt.gz"),
        *("plain.jsonl", "plain.txt"),
    ]
    for file in files:
        assert list(documents(file)) == TEXTS, file


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match="given twice"):
        text_files([tmp_path, tmp_path / "a.txt"])
