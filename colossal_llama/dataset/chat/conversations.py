"""Conversations for fine-tuning: from the fields of a record to token ids that fit into a row."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama.dataset.chat.chat_format import ChatFormat
from colossal_llama.dataset.chat.rendering import ROLES
from colossal_llama.dataset.records import SftRecord, text_field
from colossal_llama.errors import DataError, RecordError

if TYPE_CHECKING:
    import numpy as np

SFT_CATEGORY = "sft"

Message = dict[str, str]


class Encoded(NamedTuple):
    """A conversation as token ids.

    Args:
        input_ids: int32 [length].
        loss: which of them carry loss, bool [length].
        notes: what was left out, as counts; only those that are not 0. ``shortened``: 1 where
            exchanges did not fit; ``unanswered``: messages at the end that nobody answers;
            ``empty_turns``: messages that are blank, or whose question or answer is.
    """

    input_ids: np.ndarray
    loss: np.ndarray
    notes: dict[str, int]


class _Exchanges(NamedTuple):
    """A conversation as what there is to learn from.

    An exchange is one or more answers in a row and the questions before them, of which the first
    exchange may have none. ``system`` holds one message at most.
    """

    system: list[Message]
    exchanges: list[list[Message]]
    unanswered: int
    empty_turns: int

    def first(self, count: int) -> list[Message]:
        """The messages of the first exchanges, after the system's."""
        return self.system + [message for part in self.exchanges[:count] for message in part]


class ConversationEncoder:
    """Turns conversations into ids by one tokenizer and chat template."""

    def __init__(self, tokenizer: Any, template: str, max_length: int) -> None:
        """Compiles the template.

        Args:
            tokenizer: a ``PreTrainedTokenizerFast``.
            template: see ``choose_template``.
            max_length: longest conversation in tokens.

        Raises:
            DataError: the template is not valid Jinja.
        """
        self._format = ChatFormat(tokenizer, template)
        self._max_length = max_length

    def encode(self, record: SftRecord) -> Encoded | None:
        """The ids of a conversation, with as many whole exchanges from its start as fit.

        Returns:
            None where not even the first exchange fits.

        Raises:
            RecordError: the template refuses the conversation, or marks nothing to learn in it.
        """
        import numpy as np

        parts = _exchanges(record.messages)
        assert parts.exchanges, "a record without an answer"
        try:
            count, ids, loss = self._longest(parts)
        except DataError as error:
            raise RecordError(str(error)) from None
        if not count:
            return None
        if not any(loss):
            raise RecordError("the chat template leaves nothing to learn of this conversation")
        notes = {
            "shortened": int(count < len(parts.exchanges)),
            "unanswered": parts.unanswered,
            "empty_turns": parts.empty_turns,
        }
        return Encoded(
            np.array(ids, dtype=np.int32),
            np.array(loss, dtype=np.bool_),
            {name: number for name, number in notes.items() if number},
        )

    def _longest(self, parts: _Exchanges) -> tuple[int, list[int], list[bool]]:
        """How many exchanges fit, and their ids and loss.

        A template may write an exchange otherwise when others follow, so each length is that of
        a rendering of its own. The search starts from few exchanges: a conversation may be many
        times longer than what fits. What they have in common is tokenised once (``ChatFormat``).
        """
        total = len(parts.exchanges)
        ids, loss = self._format.encode(parts.first(total))
        if len(ids) <= self._max_length:
            return total, ids, loss

        def length(count: int) -> int:
            return len(self._format.encode(parts.first(count))[0])

        limit = 1
        while limit < total and length(limit) <= self._max_length:
            limit *= 2
        tried = range(limit // 2 + 1, min(limit, total))
        count = limit // 2 + bisect.bisect_right(tried, self._max_length, key=length)
        return (count, *self._format.encode(parts.first(count))) if count else (0, [], [])


def conversation_record(fields: Mapping[str, Any]) -> SftRecord:
    """A conversation from ``{"messages": [{"role", "content"}, ...]}``.

    ``conversations``, ``from`` and ``value`` are understood for ``messages``, ``role`` and
    ``content``, and ``human`` and ``gpt`` for ``user`` and ``assistant``. A ``system`` beside
    the messages is the system message; a blank one is none. Two turns of one speaker in a row
    and a conversation opened by the assistant are accepted. ``category`` is optional ("sft").

    Raises:
        RecordError: a field is missing or malformed, or there is no answer to learn.
    """
    messages = _messages(fields)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise RecordError("no assistant message, nothing to learn")
    if not _exchanges(messages).exchanges:
        raise RecordError("no assistant message that answers one, nothing to learn")
    category = SFT_CATEGORY
    if fields.get("category") is not None:
        category = text_field(fields, "category")
    if not category:
        raise RecordError("category is empty")
    return SftRecord(messages, category)


def _messages(fields: Mapping[str, Any]) -> list[Message]:
    # A column of a table may hold null where another has the conversation.
    name = "conversations" if fields.get("messages") is None else "messages"
    turns = fields.get(name)
    if turns is None:
        raise RecordError("missing key messages")
    if not isinstance(turns, list):
        raise RecordError(f"{name} must be a list, found {type(turns).__name__}")
    messages = []
    if fields.get("system") is not None:
        messages.append({"role": "system", "content": text_field(fields, "system")})
    for number, turn in enumerate(turns, 1):
        try:
            message = _message(turn)
        except RecordError as error:
            # Without its number: reasons are counted, and the record is at hand.
            raise RecordError(f"in a message: {error}") from None
        if message["role"] == "system" and number > 1:
            raise RecordError("a system message is not the first")
        messages.append(message)
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if sum(m["role"] == "system" for m in messages) > 1:
        raise RecordError("two system messages, under the key system and as the first message")
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"must be an object, found {type(turn).__name__}")
    speaker = text_field(turn, "role" if turn.get("from") is None else "from")
    role = ROLES.get(speaker.lower())
    if role is None:
        raise RecordError(f"unknown speaker {speaker!r:.40}; known are {', '.join(ROLES)}")
    key = "value" if turn.get("content") is None and "value" in turn else "content"
    return {"role": role, "content": text_field(turn, key)}


def _exchanges(messages: list[Message]) -> _Exchanges:
    """Groups messages, without blank ones and those that have lost their question or answer."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    exchanges: list[list[Message]] = []
    empty_turns = 0
    unanswered = 0
    for group in _groups(turns):
        kept = [message for message in group if message["content"].strip()]
        if group[-1]["role"] == "user":
            unanswered = len(kept)
        elif {m["role"] for m in kept} == {m["role"] for m in group}:
            exchanges.append(kept)
        else:
            kept = []
        empty_turns += len(group) - len(kept)
    system = messages[: len(messages) - len(turns)]
    return _Exchanges(system, exchanges, unanswered, empty_turns)


def _groups(turns: list[Message]) -> list[list[Message]]:
    """Cuts before every question that follows an answer."""
    groups: list[list[Message]] = []
    for turn in turns:
        if not groups or (turn["role"] == "user" and groups[-1][-1]["role"] == "assistant"):
            groups.append([])
        groups[-1].append(turn)
    return groups
