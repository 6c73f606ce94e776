"""Small prepared datasets, and what an inspection of them has to say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from colossal_llama.dataset.manifest import (
    ArrowFile,
    CategoryCount,
    DocumentCount,
    Manifest,
    Part,
    tokenizer_identity,
)
from colossal_llama.dataset.writer import ARROW_FILE, IGNORE_INDEX
from colossal_llama.storage import sha256_file
from tests.dataset.made_parts import RowData, write_rows

BOS, EOS = 1, 2
CATEGORIES = ["[red]en", "zh"]
# None of it is in the English vocabulary: every character is three or four byte tokens.
CHINESE = "你好，世界。春天来了，山上的花都开了😀。"
ENGLISH = "The first line.\n\tThe second, with </s> as text and <b>tags</b>.\n"
CONTROL = "a\x1b[31mred\x07\x9b"
DOCUMENTS = [
    *[("", CHINESE, "zh"), ("A question: ", CHINESE * 3, "zh"), (CHINESE, "an answer", "zh")],
    *[("", ENGLISH, CATEGORIES[0]), ("What?\n", ENGLISH * 2, CATEGORIES[0])],
    ("", CONTROL + ENGLISH, CATEGORIES[0]),
]


def row(ids: Any, labels: Any, lengths: list[int], category: str) -> RowData:
    return RowData(np.asarray(ids, np.int32), np.asarray(labels, np.int32), lengths, category)


def part(directory: Path, rows: list[RowData]) -> Part:
    write_rows(directory, rows, CATEGORIES)
    path = directory / ARROW_FILE
    tokens = {
        name: sum(len(r.input_ids) for r in rows if r.category == name) for name in CATEGORIES
    }
    return Part(
        len(rows),
        sum(tokens.values()),
        max((len(r.input_ids) for r in rows), default=0),
        tokens,
        {ARROW_FILE: ArrowFile(path.stat().st_size, sha256_file(path))},
    )


def manifest(tokenizer_dir: Path, parts: dict[str, Part], **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "schema_version": 2,
        "kind": "pretrain",
        "tokenizer": tokenizer_identity(tokenizer_dir),
        "tokenizer_backend": "hf",
        "max_length": 4096,
        "seed": 17,
        "documents": DocumentCount(9_004_000, 9_000_000, 1_000, 3_000),
        "rejected": {"empty_target": 1_000},
        "filtered": {"quality": 2_100, "exact_duplicate": 900},
        "notes": {"shortened": 77_000},
        "categories": {
            CATEGORIES[0]: CategoryCount(
                8_000_000,
                3_000_000_000,
                500,
                2_000_000,
                0.5,
                1_500_000_000,
                1_234,
                1_499_000_000,
                42,
            ),
            "zh": CategoryCount(
                1_000_000, 260_000_000, 250, 10_000_000, 2.0, 500_000_000, 0, 499_000_000, 4_343
            ),
        },
        "padding_share": 0.0321,
        "chat_template": None,
        "settings": {"mix": "<script>alert(1)</script>"},
        "parts": parts,
        "validation": None,
    }
    return Manifest(**values | changes)


def shown(text: str) -> dict[int, list[str]]:
    """From printed rows: row number -> the text of its documents."""
    blocks = re.split(r"^row (\d+) · .*\n", text, flags=re.MULTILINE)[1:]
    found = {}
    for number, block in zip(blocks[::2], blocks[1::2], strict=True):
        documents = re.split(r"^── document \d+ · [\d,]+ tokens?\n", block[:-1], flags=re.MULTILINE)
        assert documents[0] == ""
        found[int(number)] = [document[:-1] for document in documents[1:]]
    return found


def decode(backend: Any, ids: Any) -> str:
    """The ids as they read after others: decoders drop a space at the very start."""
    text = backend.decode([BOS, *map(int, ids)], skip_special_tokens=False)
    assert text.startswith("<s>")
    return text[3:].translate({0x1B: "␛", 0x07: "␇", 0x9B: "<U+009B>"})


def documents_of(row: RowData) -> list[slice]:
    ends = list(itertools.accumulate(row.document_lengths))
    return [
        slice(end - length, end) for end, length in zip(ends, row.document_lengths, strict=True)
    ]


def loss_texts(backend: Any, row: RowData, where: slice) -> list[str]:
    """The text of every run of tokens with loss in a document."""
    pairs = zip(row.input_ids[where], row.labels[where], strict=True)
    return [
        decode(backend, [token for token, _ in run])
        for learned, run in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX)
        if learned
    ]


def cells(text: str, name: str) -> list[list[str]]:
    """The lines of the tables that begin with ``name``, split into cells."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]
