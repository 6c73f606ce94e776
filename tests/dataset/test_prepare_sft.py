"""The command as a whole: whole exchanges, the format asked for, nothing dropped in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import datasets
import pytest

from colossal_llama.dataset.chat.chat_format import DEFAULT_TEMPLATE, encode_conversation
from colossal_llama.dataset.loader import open_parts
from colossal_llama.dataset.manifest import read_manifest
from colossal_llama.dataset.tokenization import load_tokenizer
from colossal_llama.dataset.writer import IGNORE_INDEX
from tests.dataset.preparing import leftovers, run_script, stretches_of, training_parts, tree
from tests.dataset.preparing import prepare as prepare_dataset


def talk(*contents):
    speakers = ("human", "assistant")
    return [{"from": speakers[i % 2], "content": text} for i, text in enumerate(contents)]


def prepare(data, tokenizer_dir, output, **flags) -> int:
    return prepare_dataset(data, tokenizer_dir, output, kind="sft", **{"max_length": 4096} | flags)


@pytest.fixture
def conversations(english):
    return [talk(text[:50], text[50:90], "</s>?", "As <s>.") for text in english]


def rows_of(output):
    """(ids, labels) of every row."""
    found = []
    for part in training_parts(output):
        for row in datasets.load_from_disk(str(part)):
            found.append((tuple(row["input_ids"]), tuple(row["labels"])))
    return found


def expected_rows(tokenizer, conversations):
    for messages in conversations:
        ids, loss = encode_conversation(tokenizer, messages)
        labels = [i if flag else IGNORE_INDEX for i, flag in zip(ids, loss, strict=True)]
        yield tuple(ids), tuple(labels)


def test_each_conversation_is_a_row_and_the_template_goes_along(
    tmp_path, tokenizer, tokenizer_dir, write_lines, conversations
):
    data = write_lines([{"messages": messages} for messages in conversations])
    assert prepare(data, tokenizer_dir, tmp_path / "out", num_spliced_dataset_bins=4) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.kind, manifest.chat_template) == ("sft", DEFAULT_TEMPLATE)
    assert manifest.documents.accepted == manifest.categories["sft"].documents
    assert manifest.documents.accepted == len(conversations)
    assert sorted(rows_of(tmp_path / "out")) == sorted(expected_rows(tokenizer, conversations))
    assert open_parts([tmp_path / "out"], tokenizer_dir, 4096).manifest.kind == "sft"


def test_packed_conversations_stay_whole(
    tmp_path, tokenizer, tokenizer_dir, write_lines, conversations
):
    data = write_lines([{"messages": messages} for messages in conversations])
    flags = {"packing": "best_fit", "max_length": 1000, "num_spliced_dataset_bins": 1}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    found = stretches_of(training_parts(tmp_path / "out"))
    expected = [("sft", ids) for ids, _ in expected_rows(tokenizer, conversations)]
    assert sorted(found.elements()) == sorted(expected)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.categories["sft"].rows < len(conversations) / 3
    rows = open_parts([tmp_path / "out"], tokenizer_dir, 1000)
    learned = sum(int((row["labels"] >= 0).sum()) for row in rows.take(range(len(rows))))
    assert learned == sum(
        label >= 0 for _, labels in expected_rows(tokenizer, conversations) for label in labels
    )


def test_no_conversation_is_cut_even_where_packing_wastes_room(
    tmp_path, tokenizer_dir, write_lines
):
    """Each fills a bit over half a row: cut up, they would fill rows, and lose their beginnings."""
    data = write_lines([{"messages": talk("Hi", "word " * 150 + str(n))} for n in range(30)])
    flags = {"packing": "best_fit", "num_spliced_dataset_bins": 1, "max_length": 700}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    assert max(len(ids) for ids, _ in rows_of(tmp_path / "out")) < 700
    assert len(rows_of(tmp_path / "out")) == 30


def test_what_was_left_out_is_said(tmp_path, tokenizer_dir, write_lines, capsys):
    lost = talk("long " * 500, "Hello")
    lines = [
        talk("Hi", "Hello"),
        talk("Hi", "Hello", "And?", "long " * 500),
        talk("Hi", "Hello", "And?"),
        talk("Hi", "Hello", " ", "Nothing?"),
        lost,
    ]
    data = write_lines([{"messages": messages} for messages in lines])
    flags = {"max_length": 400, "num_spliced_dataset_bins": 1}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.filtered == {"too_long": 1}
    assert manifest.notes["shortened"] == manifest.notes["unanswered"] == 1
    assert manifest.notes["empty_turns"] >= 1
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 4
    assert len({rows[0]} & set(rows)) == 1
    (entry,) = map(json.loads, (tmp_path / "out" / "excluded" / "too_long.jsonl").open())
    assert (entry["line"], entry["record"]["messages"]) == (5, lost)
    printed = capsys.readouterr().out
    assert "1 document excluded, see excluded/too_long.jsonl" in printed
    assert "1 conversations shortened to --max_length" in printed


def test_a_tokenizer_that_was_saved_to_cut_and_pad_does_not(
    tmp_path, tokenizer, tokenizer_dir, write_lines, conversations
):
    """transformers writes the settings of its last call into tokenizer.json."""
    cutting = shutil.copytree(tokenizer_dir, tmp_path / "cutting")
    saved = load_tokenizer(cutting)
    saved.backend_tokenizer.enable_truncation(max_length=16)
    saved.backend_tokenizer.enable_padding(length=64)
    saved.save_pretrained(cutting)
    assert json.loads((cutting / "tokenizer.json").read_text(encoding="utf-8"))["truncation"]
    data = write_lines([{"messages": messages} for messages in conversations])
    assert prepare(data, cutting, tmp_path / "out") == 0
    assert sorted(rows_of(tmp_path / "out")) == sorted(expected_rows(tokenizer, conversations))


def test_validation_is_by_what_is_taught(tmp_path, tokenizer_dir, write_lines, english):
    """Branches of one conversation may have the same beginning, which is all that fits."""
    lines = []
    for text in english[:20]:
        start = talk(text[:30], text[30:60])
        lines += [start, [*start, *talk("And?")], [*start, *talk("word " * 300, "word " * 300)]]
    data = write_lines([{"messages": messages} for messages in lines])
    flags = {"max_length": 300, "validation_fraction": 0.3}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    held_out = stretches_of([tmp_path / "out" / "validation"])
    assert held_out.total() >= 15
    assert not set(held_out) & set(stretches_of(training_parts(tmp_path / "out")))


def test_a_conversation_without_an_answer_is_rejected(tmp_path, tokenizer_dir, write_lines, capsys):
    data = write_lines(
        [{"messages": talk("Hi", "Hello")}, {"messages": talk("Hi")}], "in/talk.jsonl"
    )
    assert prepare(data, tokenizer_dir, tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert f"no assistant message, nothing to learn ({data}:2)" in errors[0]
    assert prepare(data, tokenizer_dir, tmp_path / "out", max_rejected=0.5, resume=True) == 0
    assert leftovers(tmp_path) == []


def test_all_too_long_is_an_error(tmp_path, tokenizer_dir, write_lines, capsys):
    data = write_lines([{"messages": talk("Hi", "Hello")}])
    assert prepare(data, tokenizer_dir, tmp_path / "out", max_length=10) == 2
    printed = capsys.readouterr().err
    assert "no document that could be kept" in printed
    assert "1 too_long" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path, tokenizer_dir, write_lines, conversations
):
    lines = [{"messages": messages} for messages in conversations * 300]
    data = write_lines(lines)
    assert data.stat().st_size > 2 << 20
    for workers in (1, 2):
        flags = ["--data_input_dirs", data, "--tokenizer_dir", tokenizer_dir]
        flags += ["--data_arrow_output_dir", tmp_path / str(workers), "--num_workers", workers]
        done = run_script(*flags, kind="sft")
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_an_unknown_template_is_refused(tmp_path, tokenizer_dir, write_lines, capsys):
    data = write_lines([{"messages": talk("Hi", "Hello")}])
    for template, reason in (("chatml", "<|im_start|>"), ("nothing", "nothing")):
        assert prepare(data, tokenizer_dir, tmp_path / "out", chat_template=template) == 2
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys, colossal_llama.dataset.prepare_sft, colossal_llama.dataset.prepare_pretrain,"
        "colossal_llama.dataset.loader, colossal_llama.dataset.chat.chat_format, json;"
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    heavy = {"torch", "transformers", "datasets", "tokenizers", "numpy", "pyarrow", "jinja2"}
    assert not heavy & set(json.loads(done.stdout))
