"""Text for a vocabulary is the same text plain or compressed, as JSON lines or as lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.corpus import EvenSample, documents, read_sample, text_files

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


def test_a_text_record_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "whole", "id": 3}\n', encoding="utf-8")
    assert list(documents(tmp_path / "a.jsonl")) == ["whole"]
    (tmp_path / "b.jsonl").write_text('{"text": "x", "source": "y"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b.jsonl:1: missing key target"):
        list(documents(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_an_even_sample_is_bounded_and_spread(count: int) -> None:
    sample = EvenSample(limit=200)
    texts = [f"{number:04}" for number in range(count)]
    for text in texts:
        sample.add(text)
    assert sample.texts == texts[:: sample.step]
    assert sample.bytes == sum(map(len, sample.texts)) <= 200
    assert sample.bytes_seen == 4 * count
    assert sample.bytes >= min(100, 4 * count)


def test_lines_are_filtered_cut_and_counted(tmp_path: Path) -> None:
    """Nothing is lost but the lines said to be short and the documents said to be kept aside."""
    long = "0123456789abc"
    records = [f"number {number}\n\nab\n{long}" for number in range(120)]
    lines = (json.dumps({"text": text}) + "\n" for text in records)
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    options = {"min_line_length": 3, "max_line_length": 10, "max_bytes": 10**6}
    sample = read_sample([tmp_path / "a.jsonl"], **options, hold_out=True)
    assert sample.held_out.texts == [records[49]]
    assert sample.documents == 120
    assert (sample.short_lines, sample.long_lines) == (119, 119)
    rest = [text for text in records if text != records[49]]
    assert "".join(sample.lines.texts) == "".join(rest).replace("\n\nab\n", "")
    assert max(map(len, sample.lines.texts)) == 10
    whole = read_sample([tmp_path / "a.jsonl"], **options, hold_out=False)
    assert whole.held_out.texts == []
    assert whole.lines.seen == 120 * 3
