"""Conversations for supervised fine-tuning, made from plain text: complete this sentence.

    python -m colossal_llama.demo.conversations --data_input_dirs demo_out/corpus/train \\
        --output demo_out/conversations/train.jsonl
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.storage import atomic_file, read_jsonl

PROMPTS = {
    "zh": ("请把这句话补充完整：{}", "请接着写下去：{}", "下面这句话的后半句是什么？{}"),
    "en": ("Complete this sentence: {}", "Continue: {}", "How does this sentence go on? {}"),
}
# Sentences within these lengths, in characters, are long enough to halve and short enough to learn.
_LENGTHS = {"zh": (16, 90), "en": (40, 240)}
_SENTENCE_ENDS = {"zh": re.compile("(?<=[。！？])"), "en": re.compile(r"(?<=[.!?])\s+(?=[A-Z])")}
_PROSE = {
    "zh": re.compile("[\u4e00-\u9fff].*[。！？]"),
    "en": re.compile(r"[A-Z][\w ,;:'()-]+[.!?]"),
}


@dataclass
class ConversationOptions:
    """Makes conversations out of Chinese and English text: the assistant completes a sentence."""

    data_input_dirs: list[Path] = option(
        help="directories that hold zh.jsonl and en.jsonl, comma-separated", comma=True
    )
    output: Path = option(help="the .jsonl file of conversations to write")
    conversations: int = option(600, help="how many to make")
    english_share: float = option(0.2, help="share of them that are English")
    overwrite: bool = option(False, help="replace the output file")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if self.conversations < 1:
            found.append("--conversations must be positive")
        if not 0 <= self.english_share <= 1:
            found.append("--english_share must be between 0 and 1")
        return found


def write_conversations(options: ConversationOptions) -> None:
    """Writes ``{"messages": [{"from": "human", ...}, {"from": "assistant", ...}]}`` lines.

    Raises:
        DataError: the output exists, or the text has no sentence to halve.
    """
    if options.output.exists() and not options.overwrite:
        raise DataError(f"{options.output} exists; choose another or give --overwrite")
    english = round(options.conversations * options.english_share)
    wanted = {"zh": options.conversations - english, "en": english}
    lines: list[str] = []
    for category, count in wanted.items():
        sentences = {
            sentence
            for directory in options.data_input_dirs
            for sentence in _sentences(directory / f"{category}.jsonl", category)
        }
        if count and not sentences:
            raise DataError(
                f"no sentence to complete in {category}.jsonl of "
                + ", ".join(map(str, options.data_input_dirs))
            )
        chosen = sorted(sentences, key=_hash)[:count]
        lines += [conversation(sentence, category) for sentence in chosen]
    with atomic_file(options.output) as temporary:
        temporary.write_text("".join(sorted(lines, key=_hash)), encoding="utf-8")
    print(f"{len(lines)} conversations in {options.output}")


def conversation(sentence: str, category: str) -> str:
    """One JSON line: the human gives the first half of ``sentence``, the assistant the rest."""
    place = halfway(sentence, category)
    # The hash picks the wording, so that it does not depend on what else is in the file.
    prompt = PROMPTS[category][_hash(sentence)[0] % len(PROMPTS[category])]
    messages = [
        {"from": "human", "content": prompt.format(sentence[:place].strip())},
        {"from": "assistant", "content": sentence[place:].strip()},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def halfway(sentence: str, category: str) -> int:
    """Where to cut: after the comma nearest the middle of the middle half, else the middle."""
    middle = len(sentence) // 2
    marks = "，；：、" if category == "zh" else ",;: "
    places = [
        place + 1
        for place, character in enumerate(sentence)
        if character in marks and abs(place + 1 - middle) <= len(sentence) // 4
    ]
    return min(places, key=lambda place: abs(place - middle), default=middle)


def _sentences(path: Path, category: str) -> Iterator[str]:
    shortest, longest = _LENGTHS[category]
    for _, record in read_jsonl(path):
        for part in _SENTENCE_ENDS[category].split(str(record.get("target", ""))):
            sentence = " ".join(part.split())
            if shortest <= len(sentence) <= longest and _PROSE[category].fullmatch(sentence):
                yield sentence


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    sys.exit(
        run(
            ConversationOptions,
            write_conversations,
            prog="python -m colossal_llama.demo.conversations",
        )
    )
