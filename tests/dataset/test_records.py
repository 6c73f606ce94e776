"""Input lines: what is read, and where a bad one is said to be."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from colossal_llama.dataset.records import input_files, pretrain_records, sft_records
from colossal_llama.errors import DataError

GOOD = {"source": "", "target": "text", "category": "en"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({"source": "", "category": "en"}, "missing key target"),
        ({"target": "t", "category": "en"}, "missing key source"),
        ({"source": "", "target": "t"}, "missing key category"),
        ({**GOOD, "target": 3}, "target must be a string, found int"),
        ({**GOOD, "category": ["en"]}, "category must be a string, found list"),
        ({**GOOD, "category": ""}, "category is empty"),
        ({**GOOD, "target": " \n"}, "target is empty"),
        ('{"source": "", "target": "\\ud800", "category": "en"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
        ('{"n": ' + "9" * 10_000 + "}", "not JSON"),
    ],
)
def test_bad_line_is_named(write_lines, line, reason):
    path = write_lines([GOOD, "", line, GOOD])
    with pytest.raises(DataError) as caught:
        list(pretrain_records([path]))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def turn(speaker, content="hi"):
    return {"from": speaker, "content": content}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "must be a list"),
        ([], "no assistant message"),
        ([turn("human")], "no assistant message"),
        ([turn("human"), "hello"], "message 2: expected an object"),
        ([turn("human"), turn("gpt")], "message 2: from must be human or assistant, found 'gpt'"),
        ([turn("human"), turn("assistant", " ")], "message 2: content is empty"),
        ([turn("human"), {"from": "assistant"}], "message 2: missing key content"),
    ],
)
def test_bad_conversation_is_named(write_lines, messages, reason):
    path = write_lines([{"messages": messages}])
    with pytest.raises(DataError) as caught:
        list(sft_records([path]))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert reason in str(caught.value)


def test_unusual_conversations_are_accepted(write_lines):
    speakers = ["assistant", "human", "human", "assistant", "assistant", "human"]
    path = write_lines([{"messages": [turn(s) for s in speakers], "category": "x"}])
    (record,) = sft_records([path])
    assert [message["from"] for message in record.messages] == speakers
    assert record.category == "x"


def test_directories_are_read_in_sorted_order(write_lines, tmp_path):
    for name in ("d/b.jsonl", "d/a.jsonl", "d/notes.txt", "d/below/c.jsonl", "e.jsonl"):
        write_lines([{**GOOD, "target": name}], name)
    with gzip.open(tmp_path / "d" / "aa.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"source": "", "target": "zipped 中文", "category": "en"}\n')
    files = input_files([tmp_path / "e.jsonl", tmp_path / "d"])
    targets = [record.target for record in pretrain_records(files)]
    assert targets == ["e.jsonl", "d/a.jsonl", "zipped 中文", "d/b.jsonl"]


def test_missing_empty_and_double_inputs(write_lines, tmp_path):
    path = write_lines([GOOD], "d/a.jsonl")
    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, reason in [
        ([Path("/nowhere")], "no such file"),
        ([empty], "no .jsonl"),
        ([tmp_path / "d", path], "given twice"),
    ]:
        with pytest.raises(DataError, match=reason):
            input_files(paths)


def test_broken_gzip_and_encoding(tmp_path):
    whole = gzip.compress(b'{"source": "", "target": "t", "category": "en"}\n' * 1000)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: .*gzip"):
        list(pretrain_records([cut]))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"source": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        list(pretrain_records([latin]))
