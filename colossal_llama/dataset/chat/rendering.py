"""Runs a chat template: what text it makes of a conversation, and what of that is generated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from colossal_llama.errors import DataError

# Who speaks, as data sets call it, and what templates call it.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class _Special(NamedTuple):
    """A special token, and whether it takes the white space to its left and right with it."""

    token_id: int
    lstrip: bool
    rstrip: bool


class Span(NamedTuple):
    """A stretch of the rendered conversation: plain text, or a special token (``token_id``).

    ``learned`` is 1 for every character that the template marks as generated, else 0.
    """

    text: str
    learned: bytes
    token_id: int | None

    def is_mixed(self) -> bool:
        """Whether some characters are generated and some are not."""
        return 0 in self.learned and 1 in self.learned


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer."""

    def __init__(self, template: str, tokenizer: Any) -> None:
        """Compiles the template.

        Args:
            template: Jinja, as of ``apply_chat_template``.
            tokenizer: a ``PreTrainedTokenizerFast``.

        Raises:
            DataError: the template is not valid Jinja.
        """
        import jinja2

        # What is behind apply_chat_template; that itself returns only ids, not the text
        # together with the places of what is generated.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            self._template = _compile_jinja_template(template)
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
            raise DataError(f"the chat template is not valid Jinja: {reason}") from None
        self._variables = dict(tokenizer.special_tokens_map)
        self._specials = {
            token.content: _Special(token_id, token.lstrip, token.rstrip)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def spans(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> list[Span]:
        """The rendered conversation, cut at the special tokens that the template wrote.

        The first span is always text, if only an empty one. A special token's text inside a
        message is text.

        Raises:
            DataError: the template refuses the conversation.
        """
        return list(self._cut(*self._render(messages, add_generation_prompt)))

    def learned_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What the template marks as generated, of the whole conversation."""
        rendered, generated, _ = self._render(messages, add_generation_prompt=False)
        return "".join(itertools.compress(rendered, generated))

    def _render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> tuple[str, bytes, str]:
        """Renders with special tokens in contents marked.

        Returns:
            The text; 1 for each character that is generated, else 0; and the mark, a character
            that stands before every special token's text that came from a message ("" where
            there is none).
        """
        chat = [
            {"role": ROLES[speaker(message).lower()], "content": message["content"]}
            for message in messages
        ]
        mark = self._mark_specials(chat)
        rendered, places = self._run_template(chat, add_generation_prompt)
        generated = bytearray(len(rendered))
        for start, stop in places:
            generated[start:stop] = b"\1" * len(generated[start:stop])
        return rendered, bytes(generated), mark

    def _run_template(
        self, chat: list[dict[str, str]], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the characters [start, stop) of what is generated."""
        import jinja2

        # Not an empty list: for that, what is generated first of all would not be noted down.
        blocks = [""]
        places: list[tuple[int, int]] = []
        try:
            with self._template.environment.activate_tracker(blocks, places):
                for block in self._template.generate(
                    messages=chat,
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                ):
                    blocks.append(block)
        # The last two are mistakes in a template, as None + "text" is.
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from None
        return "".join(blocks), places

    def _mark_specials(self, chat: list[dict[str, str]]) -> str:
        contents = "".join(message["content"] for message in chat)
        if not self._special.search(contents):
            return ""
        # Unicode keeps U+FDD0 and what follows out of text; should it be in one, go on from there.
        mark = next(chr(code) for code in range(0xFDD0, 0x110000) if chr(code) not in contents)
        for message in chat:
            message["content"] = self._special.sub(lambda m: mark + m[0], message["content"])
        return mark

    def _cut(self, rendered: str, generated: bytes, mark: str) -> Iterator[Span]:
        """Cuts at special tokens without a mark before them, and drops the marks."""
        begin = 0
        for match in self._special.finditer(rendered):
            left, right = match.span()
            if mark and rendered[left - 1 : left] == mark:
                continue
            special = self._specials[match[0]]
            start, stop = left, right
            while special.lstrip and start > begin and rendered[start - 1].isspace():
                start -= 1
            while special.rstrip and rendered[stop : stop + 1].isspace():
                stop += 1
            yield _text_span(rendered[begin:start], generated[begin:start], mark)
            yield Span(match[0], generated[left:right], special.token_id)
            begin = stop
        yield _text_span(rendered[begin:], generated[begin:], mark)


def speaker(message: Mapping[str, str]) -> str:
    """Who says a message: its ``from`` or ``role``."""
    return message.get("from") or message["role"]


def _text_span(text: str, learned: bytes, mark: str) -> Span:
    if mark and mark in text:
        learned = bytes(
            flag for character, flag in zip(text, learned, strict=True) if character != mark
        )
        text = text.replace(mark, "")
    return Span(text, learned, None)
