"""Conversations made from text: whole sentences, halved, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colossal_llama.command import run
from colossal_llama.dataset.chat.conversations import conversation_record
from colossal_llama.dataset.records import read_strictly
from colossal_llama.dataset.sources import input_files
from colossal_llama.demo.conversations import (
    PROMPTS,
    ConversationOptions,
    conversation,
    halfway,
    write_conversations,
)

ZH = [f"第{number}天早上他很早就起床了，然后去了学校读书{number}年。" for number in range(40)]
EN = [
    f"The function number {number} returns a list, and the caller keeps it." for number in range(20)
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    for category, sentences in {"zh": ZH, "en": EN}.items():
        joined = ("" if category == "zh" else " ").join(sentences)
        record = {"source": "", "target": joined, "category": category}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        (directory / f"{category}.jsonl").write_text(line, encoding="utf-8")
    return directory


def make(text: Path, output: Path, *flags: str) -> int:
    arguments = ["--data_input_dirs", str(text), "--output", str(output), *flags]
    return run(ConversationOptions, write_conversations, arguments)


def test_every_conversation_is_a_sentence_of_the_text_in_two(text: Path, tmp_path: Path) -> None:
    assert make(text, tmp_path / "out.jsonl", "--conversations", "30") == 0
    found = list(read_strictly(input_files([tmp_path / "out.jsonl"]), conversation_record))
    assert len(found) == 30
    english = 0
    for record in found:
        asked, answered = (message["content"] for message in record.messages)
        prompts = [prompt.format("") for category in PROMPTS for prompt in PROMPTS[category]]
        (start,) = [prompt for prompt in prompts if asked.startswith(prompt)]
        first = asked.removeprefix(start)
        assert first + answered in ZH or f"{first} {answered}" in EN
        english += f"{first} {answered}" in EN
    assert english == 6
    assert len({json.dumps(record.messages) for record in found}) == 30


def test_the_same_text_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    assert make(text, tmp_path / "1.jsonl") == make(text, tmp_path / "2.jsonl") == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


@pytest.mark.parametrize("category", ["zh", "en"])
def test_both_halves_have_something_in_them(category: str) -> None:
    for sentence in {"zh": [*ZH, "甲乙" * 10 + "。"], "en": [*EN, "A" + "b" * 50 + "."]}[category]:
        assert len(sentence) // 4 <= halfway(sentence, category) <= len(sentence) * 3 // 4 + 1
        messages = json.loads(conversation(sentence, category))["messages"]
        assert all(message["content"].strip() for message in messages)


def test_text_without_sentences_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for category in ("zh", "en"):
        line = json.dumps({"source": "", "target": "x = 1", "category": category}) + "\n"
        (tmp_path / f"{category}.jsonl").write_text(line, encoding="utf-8")
    assert make(tmp_path, tmp_path / "out.jsonl") == 2
    assert "zh.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_is_not_overwritten_unasked(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine", encoding="utf-8")
    assert make(text, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "mine"
    assert make(text, output, "--overwrite") == 0
    assert output.read_text(encoding="utf-8") != "mine"
