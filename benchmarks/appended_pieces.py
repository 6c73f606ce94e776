"""New pieces appended with score 0, as public scripts do it, against init_tokenizer.py.

    python benchmarks/appended_pieces.py llama2 pieces.jsonl corpus/zh.jsonl

Arguments: a SentencePiece BPE tokenizer, a list of new pieces, text of their language. Prints for
the slow and the fast half how many of the pieces nothing can produce, and the bytes per token.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from colossal_llama import command
from colossal_llama.storage import read_jsonl
from colossal_llama.tokenizer.corpus import documents
from colossal_llama.tokenizer.halves import open_tokenizer
from colossal_llama.tokenizer.init_tokenizer import InitTokenizerOptions, init_tokenizer
from colossal_llama.tokenizer.sentencepiece_model import parse_model
from colossal_llama.tokenizer.settings import copy_settings


def main() -> None:
    source, pieces, text = map(Path, sys.argv[1:])
    texts = list(documents(text))
    size = sum(len(document.encode("utf-8")) for document in texts)
    with tempfile.TemporaryDirectory() as scratch:
        appended, extended = Path(scratch, "appended"), Path(scratch, "extended")
        _append(source, pieces, appended)
        flags = ["--source_tokenizer_dir", source, "--target_tokenizer_dir", extended]
        flags += ["--expand_tokens_file", pieces]
        assert command.run(InitTokenizerOptions, init_tokenizer, list(map(str, flags))) == 0
        print(f"{'':<34}{'slow: dead':>12}{'bytes/token':>13}{'fast: dead':>12}{'bytes/token':>13}")
        rows = {"source": source, "appended with score 0": appended, "init_tokenizer.py": extended}
        for name, directory in rows.items():
            tokenizer = open_tokenizer(directory)
            row = f"{name:<34}"
            for half in (tokenizer.slow, tokenizer.fast):
                assert half is not None
                tokens = sum(map(len, half.encode(texts)))
                row += f"{len(half.unreachable() or []):>12,}{size / tokens:>13.2f}"
            print(row)


def _append(source: Path, pieces: Path, target: Path) -> None:
    """What a script does that adds each piece to the model's list and saves the slow files."""
    model = parse_model(source / "tokenizer.model")
    known = {entry.piece for entry in model.pieces}
    for _, record in read_jsonl(pieces):
        if record["piece"] not in known:
            model.pieces.add(piece=record["piece"], score=0.0)
    target.mkdir()
    (target / "tokenizer.model").write_bytes(model.SerializeToString())
    copy_settings(source, target)


if __name__ == "__main__":
    main()
