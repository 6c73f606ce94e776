"""Turns raw text into packed, bucketed Arrow data for (continued) pretraining."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from colossal_llama.dataset.build import (
    DatasetOptions,
    spool_documents,
    summary,
    workspace,
    write_parts,
)
from colossal_llama.dataset.manifest import tokenizer_identity
from colossal_llama.dataset.packing import pack_in_sequence
from colossal_llama.dataset.records import input_files, pretrain_records


@dataclass
class PretrainDatasetOptions(DatasetOptions):
    """Turns lines of {"source": "...", "target": "...", "category": "..."} into Arrow data.

    The source is context and carries no loss; it may be empty. Documents are laid end to end
    in rows of --max_length tokens. Every part-* directory holds a share of every category.
    """


def prepare_pretrain_dataset(options: PretrainDatasetOptions) -> None:
    """Runs the command.

    Raises:
        DataError: the input or the tokenizer cannot be used; nothing is written.
    """
    from colossal_llama.dataset.tokenization import load_tokenizer, tokenize_documents

    files = input_files(options.data_input_dirs)
    with workspace(options) as space:
        tokenizer = load_tokenizer(options.tokenizer_dir)
        spool_documents(tokenize_documents(tokenizer, pretrain_records(files)), space.spool)
        manifest = write_parts(
            options,
            space,
            functools.partial(pack_in_sequence, max_length=options.max_length),
            kind="pretrain",
            tokenizer=tokenizer_identity(options.tokenizer_dir),
            rejected={"lines": 0},
        )
    print(summary(manifest, options.data_arrow_output_dir))
