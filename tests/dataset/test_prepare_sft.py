"""The command as a whole: whole exchanges, one row a conversation, nothing dropped in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest

from colossal_llama import command
from colossal_llama.dataset.chat_format import DEFAULT_TEMPLATE, encode_conversation
from colossal_llama.dataset.loader import IGNORE_INDEX, open_parts
from colossal_llama.dataset.manifest import read_manifest
from colossal_llama.dataset.prepare_sft import (
    SftDatasetOptions,
    prepare_sft_dataset,
    tokenize_conversations,
    whole_exchanges,
)
from colossal_llama.dataset.records import SftRecord
from colossal_llama.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def talk(*contents):
    speakers = ("human", "assistant")
    return [{"from": speakers[i % 2], "content": text} for i, text in enumerate(contents)]


def prepare(data, tokenizer_dir, output, **flags) -> int:
    arguments = {
        "data_input_dirs": data,
        "tokenizer_dir": tokenizer_dir,
        "data_arrow_output_dir": output,
        **flags,
    }
    argv = [f"--{name}={value}" for name, value in arguments.items()]
    return command.run(SftDatasetOptions, prepare_sft_dataset, argv)


def test_each_conversation_is_a_row_and_the_template_goes_along(
    tmp_path, tokenizer, tokenizer_dir, write_lines, english
):
    conversations = [talk(text[:50], text[50:90], "</s>?", "As <s>.") for text in english]
    data = write_lines([{"messages": messages} for messages in conversations])
    assert prepare(data, tokenizer_dir, tmp_path / "out", num_spliced_dataset_bins=4) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.kind == "sft"
    assert manifest.chat_template == DEFAULT_TEMPLATE
    assert manifest.rejected == {"lines": 0, "too_long": 0}
    assert manifest.categories["sft"].documents == len(english)
    found = []
    for part in sorted((tmp_path / "out").glob("part-*")):
        for row in datasets.load_from_disk(str(part)):
            assert row["document_lengths"] == [len(row["input_ids"])]
            assert set(row) == {"input_ids", "labels", "document_lengths", "category"}
            found.append((tuple(row["input_ids"]), tuple(row["labels"])))
    expected = []
    for messages in conversations:
        ids, loss = encode_conversation(tokenizer, messages)
        labels = [i if flag else IGNORE_INDEX for i, flag in zip(ids, loss, strict=True)]
        expected.append((tuple(ids), tuple(labels)))
    assert sorted(found) == sorted(expected)
    assert open_parts([tmp_path / "out"], tokenizer_dir, 4096).manifest.kind == "sft"


@pytest.mark.parametrize("max_length", [100, 200, 300, 500, 900, 2000])
def test_long_conversations_keep_the_exchanges_that_fit(tokenizer, english, max_length):
    text = " ".join(english)
    contents = [text[start * 60 : start * 60 + 60] for start in range(13)]
    messages = talk(*contents)  # ends with a question
    messages.insert(4, {"from": "assistant", "content": "And more."})  # two answers in a row
    ends = [2, 5, 7, 9, 11, 13]

    def length(end):
        return len(encode_conversation(tokenizer, messages[:end])[0])

    best = max((end for end in ends if length(end) <= max_length), default=0)
    assert whole_exchanges(tokenizer, messages, max_length) == best
    cuts: Counter[str] = Counter()
    documents = tokenize_conversations(tokenizer, [SftRecord(messages, "c")], max_length, cuts)
    if not best:
        with pytest.raises(DataError, match=f"--max_length {max_length}"):
            list(documents)
        return
    (row,) = documents
    whole = length(len(messages)) <= max_length
    assert cuts == ({} if whole else {"shortened": 1})
    assert len(row.input_ids) == length(len(messages) if whole else best)


def test_what_is_left_out_is_said(tmp_path, tokenizer_dir, write_lines, capsys):
    short, long_ = talk("Hi", "Hello"), talk("Hi", "Hello", "And?", "long " * 500)
    lost = talk("long " * 500, "Hello")
    lines = [{"messages": messages} for messages in (short, long_, lost)]
    flags = {"max_length": 400, "num_spliced_dataset_bins": 1}
    assert prepare(write_lines(lines), tokenizer_dir, tmp_path / "out", **flags) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.rejected["too_long"], manifest.shortened) == (1, 1)
    first, second = datasets.load_from_disk(str(tmp_path / "out" / "part-00000"))
    assert first["input_ids"] == second["input_ids"]
    printed = capsys.readouterr().out
    assert "1 conversation left out" in printed
    assert "1 conversation shortened" in printed


def test_all_too_long_is_an_error(tmp_path, tokenizer_dir, write_lines, capsys):
    data = write_lines([{"messages": talk("Hi", "Hello")}])
    assert prepare(data, tokenizer_dir, tmp_path / "out", max_length=10) == 2
    assert "exchange of any fits into --max_length 10; raise it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_process_names_the_bad_line_and_leaves_nothing(tmp_path, tokenizer_dir, write_lines):
    lines = [{"messages": talk("Hi", "Hello")}, {"messages": talk("Hi")}]
    data = write_lines(lines, "in/talk.jsonl")
    flags = ["--data_input_dirs", data, "--tokenizer_dir", tokenizer_dir]
    flags += ["--data_arrow_output_dir", tmp_path / "arrow"]
    flags += ["--data_jsonl_output_dir", tmp_path / "jsonl"]
    script = [sys.executable, str(ROOT / "prepare_sft_dataset.py")]
    done = subprocess.run([*script, *map(str, flags)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {data}:2: no assistant message")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys, colossal_llama.dataset.prepare_sft, colossal_llama.dataset.prepare_pretrain,"
        "colossal_llama.dataset.loader, colossal_llama.dataset.chat_format, json;"
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    heavy = {"torch", "transformers", "datasets", "tokenizers", "numpy", "pyarrow", "jinja2"}
    assert not heavy & set(json.loads(done.stdout))
