"""Conversations to token ids, by a chat template whose generation markers say what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama.dataset.chat.rendering import ChatTemplate, Span
from colossal_llama.dataset.tokenization import text_only
from colossal_llama.errors import DataError

TEMPLATES = Path(__file__).resolve().parent / "chat_templates"

# With the Llama tokenizer (``legacy: true``) the ids and labels of Colossal-LLaMA's own program.
DEFAULT_TEMPLATE = (TEMPLATES / "colossal-llama.jinja").read_text(encoding="utf-8")

# A text that was tokenised is remembered until so many characters have come together.
_REMEMBERED_CHARACTERS = 1 << 20


class _Text(NamedTuple):
    """What to tokenise: whether it is the ``first`` of a conversation may make a difference."""

    text: str
    first: bool
    offsets: bool  # whether to find out which characters belong to which token


class _Tokens(NamedTuple):
    """The ids of a text, and, where asked for, the characters [start, stop) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class ChatFormat:
    """A tokenizer with a chat template, made ready once for many conversations."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        """Compiles the template.

        Args:
            tokenizer: a ``PreTrainedTokenizerFast``.
            template: Jinja, as of ``apply_chat_template``.

        Raises:
            DataError: the template is not valid Jinja.
        """
        self._template = ChatTemplate(template, tokenizer)
        self._tokenizer = tokenizer
        self._unprefixed = _unprefixed(tokenizer.backend_tokenizer.pre_tokenizer)
        self._memory: dict[_Text, _Tokens] = {}
        self._remembered = 0

    def encode(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Tokenises a conversation; see ``encode_conversation``."""
        if self._remembered > _REMEMBERED_CHARACTERS:
            self._memory.clear()
            self._remembered = 0
        spans = self._template.spans(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        loss: list[bool] = []
        for span, tokens in zip(spans, self._tokenize(spans), strict=True):
            ids += tokens.ids
            loss += _learned(span, tokens)
        return ids, loss

    def _tokenize(self, spans: list[Span]) -> list[_Tokens]:
        """The tokens of every span; the same text is tokenised once."""
        mixed = any(span.is_mixed() for span in spans)
        texts = [
            _Text(span.text, position == 0 and self._unprefixed is not None, mixed)
            for position, span in enumerate(spans)
            if span.token_id is None
        ]
        new = [text for text in dict.fromkeys(texts) if text not in self._memory]
        for first in (True, False):
            self._remember([text for text in new if text.first == first], first, mixed)
        tokens = (self._memory[text] for text in texts)
        return [
            next(tokens) if span.token_id is None else _Tokens([span.token_id], [])
            for span in spans
        ]

    def _remember(self, texts: list[_Text], first: bool, offsets: bool) -> None:
        if not texts:
            return
        with self._backend(first=first) as backend:
            run = backend.encode_batch if offsets else backend.encode_batch_fast
            encodings = run([text.text for text in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            self._memory[text] = _Tokens(encoding.ids, encoding.offsets if offsets else [])
            self._remembered += len(text.text)

    @contextmanager
    def _backend(self, *, first: bool) -> Iterator[Any]:
        """The tokenizer for texts that are, or are not, the first of their conversations."""
        with text_only(self._tokenizer) as backend:
            before = backend.pre_tokenizer, backend.post_processor
            # A byte-level tokenizer's takes white space out of the offsets.
            backend.post_processor = None
            if self._unprefixed is not None and not first:
                backend.pre_tokenizer = self._unprefixed
            try:
                yield backend
            finally:
                backend.pre_tokenizer, backend.post_processor = before


def encode_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Tokenises a conversation by the tokenizer's chat template, or the default one.

    The ids are those of the fast tokenizer's ``apply_chat_template``, the mask its
    ``return_assistant_tokens_mask``, with two differences: a special token's text inside a
    message stays text, and white space at the start of what is generated is learned too.

    By the default template they are also those of Colossal-LLaMA's own program, bos + prompt,
    for a tokenizer that puts its dummy prefix before every text (the Llama tokenizer with
    ``legacy: true``, or Llama 2's ``tokenizer.json``) or never. One that puts it before the
    first text only (converted with ``legacy: false``) begins "A chat" without the prefix here,
    as bos stands before; there the prompt was tokenised without bos, hence with the prefix.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast``.
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``; ``from``,
            ``human`` and ``gpt`` are understood as well.
        add_generation_prompt: end with what stands before an answer of the assistant.

    Returns:
        Token ids, and for each whether it carries loss; [length] both.

    Raises:
        DataError: the template is broken, or refuses the conversation.
    """
    chat_format = ChatFormat(tokenizer, template_of(tokenizer) or DEFAULT_TEMPLATE)
    return chat_format.encode(messages, add_generation_prompt=add_generation_prompt)


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template, if it has one.

    Raises:
        DataError: it has several, and none is the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(
            f"{tokenizer.name_or_path}: none of its chat templates ({names}) is named default"
        ) from None


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token that ends an answer by the tokenizer's chat template, or the default one.

    None if no special token does, or if the template does not say what is generated.
    """
    template = ChatTemplate(template_of(tokenizer) or DEFAULT_TEMPLATE, tokenizer)
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    learned = [span for span in template.spans(probe) if 1 in span.learned]
    return learned[-1].token_id if learned else None


def _learned(span: Span, tokens: _Tokens) -> list[bool]:
    """Whether each token carries loss.

    One that lies across the border of what is generated does.
    """
    if not span.is_mixed():
        return [1 in span.learned] * len(tokens.ids)
    return [1 in span.learned[start:stop] for start, stop in tokens.offsets]


def _unprefixed(pre_tokenizer: Any) -> Any:
    """The pre-tokenizer for texts that are not the first, None if it is the same.

    A tokenizer converted with ``legacy: false`` puts the dummy prefix only before the first text
    of what it is given; here the texts between special tokens are given one by one. Others
    (Llama 2's own file) put it before every text by themselves, or never.
    """
    from tokenizers.pre_tokenizers import Metaspace

    if not isinstance(pre_tokenizer, Metaspace) or pre_tokenizer.prepend_scheme != "first":
        return None
    return Metaspace(
        replacement=pre_tokenizer.replacement, prepend_scheme="never", split=pre_tokenizer.split
    )
