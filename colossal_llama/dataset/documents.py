"""The two kinds of documents: how a record is checked, cleaned and turned into tokens.

An object of a kind is built in every worker process, from settings that can be pickled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from colossal_llama.dataset.records import PretrainRecord, SftRecord, pretrain_record
from colossal_llama.dataset.spool import with_loss_mask

if TYPE_CHECKING:
    import numpy as np

    from colossal_llama.dataset.chat.conversations import Encoded
    from colossal_llama.dataset.cleaning.cleaner import CleaningOptions
    from colossal_llama.dataset.tokenization import Encoder, TextTokenizer

Admitted = TypeVar("Admitted")


class Verdict(NamedTuple, Generic[Admitted]):
    """A record as it goes on, or the ``stage`` that excludes it, with the ``reason``."""

    record: Admitted | None
    stage: str = ""
    reason: str = ""


class TokenBatch(NamedTuple):
    """Documents as the spool keeps them.

    ``tokens`` int32 [all tokens]; ``lengths``, ``loss_start`` (position of the first token with
    loss) and ``loss_tokens``, int64 [documents].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    loss_start: np.ndarray
    loss_tokens: np.ndarray


class DocumentKind(Protocol[Admitted]):
    """What tokenising a chunk asks of a kind of documents."""

    notes: Counter[str]  # what else was done to documents

    def record(self, fields: Mapping[str, Any]) -> Any:
        """A checked record; raises RecordError."""

    def admit(self, record: Any) -> Verdict[Admitted]:
        """Cleans a record, or says what excludes it; may raise RecordError as well."""

    def category(self, admitted: Admitted) -> str:
        """Its category."""

    def text(self, admitted: Admitted) -> str:
        """The text by which duplicates are found."""

    def encode(self, admitted: Sequence[Admitted]) -> TokenBatch:
        """Turns records into tokens."""


class PretrainDocuments:
    """Documents for pretraining: bos + source + target + eos.

    bos and source carry no loss where there is a source. Source and target are tokenised apart,
    so that no token crosses the border between them; with a SentencePiece tokenizer the target
    then starts with its usual dummy prefix, as any text does.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        backend: str,
        cleaning: CleaningOptions,
        default_category: str,
        *,
        parallel: bool,
    ) -> None:
        from colossal_llama.dataset.cleaning.cleaner import build_cleaner
        from colossal_llama.dataset.tokenization import GigatokenEncoder, HuggingFaceEncoder

        self.notes: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._clean = build_cleaner(cleaning)
        self._default_category = default_category
        self._encode: Encoder = (
            GigatokenEncoder(tokenizer.json, parallel=parallel)
            if backend == "gigatoken"
            else HuggingFaceEncoder(tokenizer.json)
        )

    def record(self, fields: Mapping[str, Any]) -> PretrainRecord:
        """See ``pretrain_record``."""
        return pretrain_record(fields, self._default_category)

    def admit(self, record: PretrainRecord) -> Verdict[PretrainRecord]:
        """Runs the cleaning stages."""
        cleaned, stage = self._clean(record)
        if stage is not None:
            return Verdict(None, stage, self._clean.reason)
        if cleaned is not record:
            self.notes["normalized"] += 1
        return Verdict(cleaned)

    def category(self, admitted: PretrainRecord) -> str:
        """Its category."""
        return admitted.category

    def text(self, admitted: PretrainRecord) -> str:
        """Source and target."""
        return f"{admitted.source}\n{admitted.target}" if admitted.source else admitted.target

    def encode(self, admitted: Sequence[PretrainRecord]) -> TokenBatch:
        """See ``DocumentKind``."""
        import numpy as np

        texts = [text for record in admitted for text in record[:2] if text]
        ids, counts = self._encode(texts)
        has_source = np.array([bool(record.source) for record in admitted])
        source_lengths = np.zeros(len(admitted), dtype=np.int64)
        # Where there is a source, it is the text before the target.
        targets = np.cumsum(1 + has_source) - 1
        source_lengths[has_source] = counts[targets[has_source] - 1]
        lengths = 2 + source_lengths + counts[targets]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        tokens = np.empty(int(ends[-1]), dtype=np.int32)
        is_text = np.ones(len(tokens), dtype=np.bool_)
        is_text[starts] = is_text[ends - 1] = False
        tokens[is_text] = ids
        tokens[starts] = self._tokenizer.bos_id
        tokens[ends - 1] = self._tokenizer.eos_id
        loss_start = np.where(has_source, 1 + source_lengths, 0)
        for document in np.flatnonzero(has_source):
            prefix = slice(starts[document], starts[document] + loss_start[document])
            tokens[prefix] = ~tokens[prefix]
        return TokenBatch(tokens, lengths, loss_start, lengths - loss_start)


class _Conversation(NamedTuple):
    record: SftRecord
    encoded: Encoded


class SftDocuments:
    """Conversations: only what the assistant says carries loss."""

    def __init__(self, tokenizer_dir: Path, template: str, max_length: int) -> None:
        from colossal_llama.dataset.chat.conversations import ConversationEncoder
        from colossal_llama.dataset.tokenization import load_tokenizer

        self.notes: Counter[str] = Counter()
        self._encoder = ConversationEncoder(load_tokenizer(tokenizer_dir), template, max_length)
        self._max_length = max_length

    def record(self, fields: Mapping[str, Any]) -> SftRecord:
        """See ``conversation_record``."""
        from colossal_llama.dataset.chat.conversations import conversation_record

        return conversation_record(fields)

    def admit(self, record: SftRecord) -> Verdict[_Conversation]:
        """Encodes a conversation, of which not even the first exchange may fit."""
        encoded = self._encoder.encode(record)
        if encoded is None:
            return Verdict(
                None, "too_long", f"its first exchange is over {self._max_length} tokens"
            )
        self.notes.update(encoded.notes)
        return Verdict(_Conversation(record, encoded))

    def category(self, admitted: _Conversation) -> str:
        """Its category."""
        return admitted.record.category

    def text(self, admitted: _Conversation) -> str:
        """What is taught, as ids: of two conversations, the beginnings may be all that fits."""
        return " ".join(map(str, admitted.encoded.input_ids))

    def encode(self, admitted: Sequence[_Conversation]) -> TokenBatch:
        """See ``DocumentKind``."""
        import numpy as np

        losses = [np.asarray(one.encoded.loss, dtype=np.bool_) for one in admitted]
        tokens = [
            with_loss_mask(np.asarray(one.encoded.input_ids, dtype=np.int32), loss)
            for one, loss in zip(admitted, losses, strict=True)
        ]
        return TokenBatch(
            np.concatenate(tokens),
            np.array([len(part) for part in tokens], dtype=np.int64),
            np.array([int(loss.argmax()) for loss in losses], dtype=np.int64),
            np.array([int(loss.sum()) for loss in losses], dtype=np.int64),
        )
