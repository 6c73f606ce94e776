"""Turns conversations into Arrow data for supervised fine-tuning."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option
from colossal_llama.dataset.build import build_dataset
from colossal_llama.dataset.documents import SftDocuments
from colossal_llama.dataset.job import Job, processes
from colossal_llama.dataset.manifest import tokenizer_identity
from colossal_llama.dataset.options import DatasetOptions
from colossal_llama.dataset.sources import divide, input_files
from colossal_llama.dataset.workers import prepare_processes

# What a worker needs, of which transformers takes seconds to import.
_WORKER_MODULES = [
    *("numpy", "pyarrow", "transformers.models.auto.tokenization_auto", "jinja2"),
    "colossal_llama.dataset.chunk_worker",
]


@dataclass
class SftDatasetOptions(DatasetOptions):
    """Turns {"messages": [{"from": "human", "content": "..."}, ...]} into Arrow data.

    "from" is human or assistant ("role": user, assistant or system is understood as well); only
    what the assistant says carries loss. A conversation is a row of its own unless --packing
    says otherwise; one longer than --max_length keeps as many exchanges as fit from its start.
    """

    packing: str = option(
        "none",
        help="none: a conversation a row; best_fit: several conversations a row, none is cut",
        choices=("none", "best_fit"),
    )
    chat_template: str | None = option(
        None,
        help="format: colossal-llama, chatml, llama3, or a .jinja file (default: the "
        "tokenizer's own, else colossal-llama)",
    )


def prepare_sft_dataset(options: SftDatasetOptions) -> None:
    """Runs the command.

    Raises:
        DataError: the input or the tokenizer cannot be used; no output is written.
    """
    from colossal_llama.dataset.chat.templates import choose_template
    from colossal_llama.dataset.tokenization import load_tokenizer

    files = input_files(options.data_input_dirs)
    chunks = divide(files)
    if processes(options, chunks)[0] > 1:
        prepare_processes(_WORKER_MODULES)
    tokenizer = load_tokenizer(options.tokenizer_dir)
    template = choose_template(options.chat_template, tokenizer, options.tokenizer_dir)
    build_dataset(
        Job(
            kind="sft",
            options=options,
            files=files,
            chunks=chunks,
            make_kind=functools.partial(
                _sft_documents, options.tokenizer_dir, template, options.max_length
            ),
            tokenizer=tokenizer_identity(options.tokenizer_dir),
            backend="hf",
            packing="none" if options.packing == "none" else "best_fit_uncut",
            stages=["too_long"],
            chat_template=template,
        )
    )


def _sft_documents(tokenizer_dir: Path, template: str, max_length: int, *, parallel: bool) -> Any:
    """Conversations are encoded one by one: there is nothing to do in parallel."""
    del parallel
    return SftDocuments(tokenizer_dir, template, max_length)
