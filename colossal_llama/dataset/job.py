"""What a run of one of the commands is, and all on which its output depends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama.command import as_dict
from colossal_llama.dataset.manifest import TokenizerIdentity
from colossal_llama.dataset.options import DatasetOptions
from colossal_llama.dataset.sources import Chunk
from colossal_llama.dataset.workers import available_cores

# Below this, starting processes takes longer than one process with threads takes for all.
_ONE_PROCESS_BYTES = 8 << 20

# Flags on which the output does not depend.
_ELSEWHERE = {
    *("data_input_dirs", "data_arrow_output_dir", "data_jsonl_output_dir", "data_cache_dir"),
    *("max_rejected", "num_workers", "resume", "shard", "overwrite", "tokenizer_backend"),
}


@dataclass
class Job:
    """A run of one of the commands.

    Args:
        kind: "pretrain" or "sft".
        options: of the command.
        files: the input, in order.
        chunks: the input, cut.
        make_kind: builds the kind of documents in a worker; is given ``parallel``, whether it
            may use several threads.
        tokenizer: what makes the ids.
        backend: "hf" or "gigatoken".
        packing: how documents share rows, a name of ``PACKINGS``.
        stages: cleaning stages that may exclude documents.
        chat_template: what formats conversations.
        whole_texts: a ``.txt`` file is one document.
        deduplicate: "none", "exact" or "near".
        other_files: what else is read, lists of words for example.
        named_categories: those for which flags ask something.
    """

    kind: str
    options: DatasetOptions
    files: list[Path]
    chunks: list[Chunk]
    make_kind: Callable[..., Any]
    tokenizer: TokenizerIdentity
    backend: str
    packing: str
    stages: list[str]
    chat_template: str | None = None
    whole_texts: bool = False
    deduplicate: str = "none"
    other_files: list[Path] = field(default_factory=list)
    named_categories: set[str] = field(default_factory=set)

    def settings(self) -> dict[str, Any]:
        """All on which the output depends, as plain values."""
        flags = {k: v for k, v in as_dict(self.options).items() if k not in _ELSEWHERE}
        return {
            **flags,
            "kind": self.kind,
            "jsonl_copy": self.options.data_jsonl_output_dir is not None,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "tokenizer_backend": self.backend,
            "chat_template": self.chat_template,
            "inputs": [_identity(file) for file in self.files],
            "other_files": [_identity(file) for file in self.other_files],
        }


def processes(options: DatasetOptions, chunks: list[Chunk]) -> tuple[int, int]:
    """How many worker processes, and how many threads in each."""
    cores = options.num_workers or available_cores()
    small = sum(chunk.size for chunk in chunks) < _ONE_PROCESS_BYTES
    if small and options.num_workers is None:
        return 1, cores
    count = max(1, min(cores, len(chunks) // options.share()[1]))
    return count, max(1, cores // count)


def _identity(file: Path, end: int = 1 << 16) -> dict[str, Any]:
    """Name, size, and a hash of the first and last 64 KiB, by which a change is noticed."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(end)
        stream.seek(max(0, size - end))
        ends = hashlib.sha256(head + stream.read(end)).hexdigest()[:16]
    return {"file": str(file), "bytes": size, "ends": ends}
