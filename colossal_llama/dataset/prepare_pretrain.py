"""Turns raw text into packed, bucketed Arrow data for (continued) pretraining."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option
from colossal_llama.dataset.backend import BACKENDS
from colossal_llama.dataset.build import build_dataset
from colossal_llama.dataset.cleaning.cleaner import CleaningOptions, build_cleaner
from colossal_llama.dataset.documents import PretrainDocuments
from colossal_llama.dataset.job import Job, processes
from colossal_llama.dataset.manifest import tokenizer_identity
from colossal_llama.dataset.options import DatasetOptions
from colossal_llama.dataset.records import DEFAULT_CATEGORY, pretrain_record
from colossal_llama.dataset.sources import divide, input_files
from colossal_llama.dataset.workers import prepare_processes

# What a worker needs; a module that is missing is passed over.
_WORKER_MODULES = [
    *("numpy", "pyarrow", "tokenizers", "awkward", "gigatoken"),
    "colossal_llama.dataset.chunk_worker",
]


@dataclass
class PretrainDatasetOptions(CleaningOptions, DatasetOptions):
    """Turns {"source": "...", "target": "...", "category": "..."} into packed Arrow data.

    The source is context and carries no loss; it may be empty. {"text": "..."} and lines of .txt
    files are targets of --txt_category. Documents are packed into rows of --max_length tokens,
    none is lost; every part-* directory holds a share of every category.
    """

    txt_category: str = option(
        DEFAULT_CATEGORY, help="category of .txt files, and of {text} that names none"
    )
    txt_documents: str = option(
        "line", help="what is a document in a .txt file", choices=("line", "file")
    )
    tokenizer_backend: str = option(
        "auto",
        help="hf, gigatoken, or auto: gigatoken if it is installed and gives the same ids on a "
        "sample of the input",
        choices=BACKENDS,
    )

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        return [*DatasetOptions.problems(self), *self.cleaning_problems()]

    def other_inputs(self) -> list[tuple[str, Path]]:
        """The files of the cleaning stages."""
        found = [("--decontaminate_files", path) for path in self.decontaminate_files]
        if self.blocklist_file:
            found.append(("--blocklist_file", self.blocklist_file))
        return found


def prepare_pretrain_dataset(options: PretrainDatasetOptions) -> None:
    """Runs the command.

    Raises:
        DataError: the input or the tokenizer cannot be used; no output is written.
    """
    from colossal_llama.dataset.backend import choose_backend
    from colossal_llama.dataset.cleaning.near_duplicates import require_rensa
    from colossal_llama.dataset.tokenization import text_tokenizer

    files = input_files(options.data_input_dirs)
    whole_texts = options.txt_documents == "file"
    chunks = divide(files, whole_texts=whole_texts)
    if processes(options, chunks)[0] > 1:
        prepare_processes(_WORKER_MODULES)
    tokenizer = text_tokenizer(options.tokenizer_dir)
    cleaner = build_cleaner(options)
    if options.deduplicate == "near":
        require_rensa()

    def text_of(fields: dict[str, Any]) -> str:
        return pretrain_record(fields, options.txt_category).target

    backend, reason = choose_backend(options.tokenizer_backend, tokenizer.json, chunks, text_of)
    print(reason, file=sys.stderr)
    build_dataset(
        Job(
            kind="pretrain",
            options=options,
            files=files,
            chunks=chunks,
            make_kind=functools.partial(
                PretrainDocuments, tokenizer, backend, options, options.txt_category
            ),
            tokenizer=tokenizer_identity(options.tokenizer_dir),
            backend=backend,
            packing=options.packing,
            stages=cleaner.stages,
            whole_texts=whole_texts,
            deduplicate=options.deduplicate,
            other_files=options.cleaning_files(),
            named_categories={
                item.partition("=")[0] for item in options.quality_rules + options.min_script_share
            },
        )
    )
