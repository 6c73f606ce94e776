"""Turns conversations into Arrow data for supervised fine-tuning."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from colossal_llama.dataset.build import (
    DatasetOptions,
    spool_documents,
    summary,
    workspace,
    write_parts,
)
from colossal_llama.dataset.manifest import tokenizer_identity
from colossal_llama.dataset.packing import one_row_each
from colossal_llama.dataset.records import SftRecord, input_files, sft_records
from colossal_llama.dataset.spool import Document
from colossal_llama.errors import DataError


@dataclass
class SftDatasetOptions(DatasetOptions):
    """Turns lines of {"messages": [{"from": "human", "content": "..."}, ...]} into Arrow data.

    "from" is human or assistant; only what the assistant says carries loss. The format is the
    tokenizer's chat_template, or Colossal-LLaMA's where it has none. A conversation is a row of
    its own; one longer than --max_length keeps as many exchanges as fit from its start.
    """


def prepare_sft_dataset(options: SftDatasetOptions) -> None:
    """Runs the command.

    Raises:
        DataError: the input or the tokenizer cannot be used; nothing is written.
    """
    from colossal_llama.dataset.chat_format import training_template
    from colossal_llama.dataset.tokenization import load_tokenizer

    files = input_files(options.data_input_dirs)
    cuts: Counter[str] = Counter()
    with workspace(options) as space:
        tokenizer = load_tokenizer(options.tokenizer_dir)
        template = training_template(tokenizer, options.tokenizer_dir)
        documents = tokenize_conversations(tokenizer, sft_records(files), options.max_length, cuts)
        spool_documents(documents, space.spool)
        manifest = write_parts(
            options,
            space,
            one_row_each,
            kind="sft",
            tokenizer=tokenizer_identity(options.tokenizer_dir),
            rejected={"lines": 0, "too_long": cuts["too_long"]},
            shortened=cuts["shortened"],
            chat_template=template,
        )
    print(summary(manifest, options.data_arrow_output_dir))


def tokenize_conversations(
    tokenizer: Any, records: Iterable[SftRecord], max_length: int, cuts: Counter[str]
) -> Iterator[Document]:
    """Yields conversations of at most ``max_length`` tokens.

    Counts in ``cuts`` the conversations that were "shortened" and those left out because not
    even their first exchange fits ("too_long").

    Raises:
        DataError: none fits.
    """
    import numpy as np

    from colossal_llama.dataset.chat_format import encode_conversation

    fitting = 0
    for record in records:
        ids, loss = encode_conversation(tokenizer, record.messages)
        if len(ids) > max_length:
            kept = whole_exchanges(tokenizer, record.messages, max_length)
            cuts["shortened" if kept else "too_long"] += 1
            if not kept:
                continue
            ids, loss = encode_conversation(tokenizer, record.messages[:kept])
        fitting += 1
        yield Document(
            record.category, np.array(ids, dtype=np.int32), np.array(loss, dtype=np.bool_)
        )
    if cuts["too_long"] and not fitting:
        raise DataError(
            f"conversations in the input: {cuts['too_long']}, all left out: not even the first "
            f"exchange of any fits into --max_length {max_length}; raise it"
        )


def whole_exchanges(tokenizer: Any, messages: Sequence[dict[str, str]], max_length: int) -> int:
    """How many messages to keep so that the exchanges among them are whole and fit.

    An exchange ends with an assistant's message that the human answers, or that is the last.
    """
    from colossal_llama.dataset.chat_format import encode_conversation

    speakers = [message["from"] for message in messages] + ["human"]
    ends = [
        index + 1
        for index in range(len(messages))
        if speakers[index] == "assistant" and speakers[index + 1] == "human"
    ]
    fitting = bisect.bisect_right(
        ends, max_length, key=lambda end: len(encode_conversation(tokenizer, messages[:end])[0])
    )
    return ends[fitting - 1] if fitting else 0
