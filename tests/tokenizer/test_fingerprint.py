"""The fingerprint sees what changes ids, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.fingerprint import (
    id_to_piece,
    tokenizer_fingerprint,
    vocabulary_size,
)


def _changed(small: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    fast = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    change(fast)
    (target / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    return target


def test_layout_and_resaving_do_not_matter(small: Path, tmp_path: Path) -> None:
    expected = tokenizer_fingerprint(small)
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "resaved")
    assert tokenizer_fingerprint(tmp_path / "resaved") == expected

    def as_pairs(fast: dict[str, Any]) -> None:
        fast["model"]["merges"] = [merge.split(" ") for merge in fast["model"]["merges"]]
        fast["model"]["vocab"] = dict(reversed(fast["model"]["vocab"].items()))

    assert tokenizer_fingerprint(_changed(small, tmp_path / "pairs", as_pairs)) == expected


def test_the_slow_file_alone_gives_the_same(small: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(small / name, tmp_path / name)
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(small)
    assert vocabulary_size(tmp_path) == vocabulary_size(small) == 700


def test_what_changes_ids_changes_it(small: Path, tmp_path: Path) -> None:
    def swap_merges(fast: dict[str, Any]) -> None:
        merges = fast["model"]["merges"]
        merges[0], merges[9] = merges[9], merges[0]

    def swap_ids(fast: dict[str, Any]) -> None:
        vocabulary = fast["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    def add_token(fast: dict[str, Any]) -> None:
        fast["added_tokens"].append({"id": 700, "content": "<pad>"})

    changes = {"merges": swap_merges, "ids": swap_ids, "added": add_token}
    found = {
        tokenizer_fingerprint(_changed(small, tmp_path / name, change))
        for name, change in changes.items()
    }
    assert len(found | {tokenizer_fingerprint(small)}) == 4


def test_added_tokens_count_and_gaps_have_no_piece(small: Path, tmp_path: Path) -> None:
    directory = _changed(
        small,
        tmp_path / "added",
        lambda fast: fast["added_tokens"].append({"id": 702, "content": "<pad>"}),
    )
    assert vocabulary_size(directory) == 703
    assert id_to_piece(directory)[699:] == [id_to_piece(small)[699], None, None, "<pad>"]


def test_pieces_are_those_of_transformers(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert id_to_piece(small) == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_it_needs_no_tokenizer_library(small: Path) -> None:
    """A check at a stage's door must not cost seconds of imports."""
    code = (
        "import sys; from pathlib import Path;"
        "from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint as f;"
        "f(Path(sys.argv[1]));"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'tokenizers', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(small)], check=False).returncode == 0


def test_no_tokenizer_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("[]")
    for name in ("missing", "empty", "other"):
        with pytest.raises(DataError, match=name):
            tokenizer_fingerprint(tmp_path / name)
