"""Conversations to token ids, by a chat template whose generation markers say what is learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama.dataset.tokenization import text_only
from colossal_llama.errors import DataError

# The format of Colossal-LLaMA's conversations, with the bos and eos of the tokenizer in use.
DEFAULT_TEMPLATE = """\
{{- 'A chat between a curious human and an artificial intelligence assistant. ' -}}
{{- 'The assistant gives helpful, detailed, and polite answers to the human\\'s questions.' -}}
{{- '\\n\\n' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'Human: ' + bos_token + message['content'] + eos_token -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'Assistant: ' + bos_token -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- raise_exception('the roles are user and assistant, not ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' + bos_token -}}{%- endif -%}
"""

_ROLES = {"human": "user", "user": "user", "assistant": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Span(NamedTuple):
    """A stretch of the rendered conversation: plain text, or a special token (``token_id``).

    ``learned`` says for every character whether the template marks it as generated.
    """

    text: str
    learned: list[bool]
    token_id: int | None


def training_template(tokenizer: Any, tokenizer_dir: Path) -> str:
    """The template to train with: the tokenizer's own if it has one, else the default.

    Raises:
        DataError: the tokenizer's own template does not say what the assistant generates.
    """
    template = _template(tokenizer)
    if not _GENERATION.search(template):
        raise DataError(
            f"{tokenizer_dir}: its chat_template has no {{% generation %}} ... "
            "{% endgeneration %} around what the assistant says, so nothing marks what to "
            "learn; add them, or remove the chat_template to use the default format"
        )
    return template


def encode_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Tokenises a conversation by the tokenizer's chat template, or the default one.

    The ids are those of the fast tokenizer's ``apply_chat_template``, the mask its
    ``return_assistant_tokens_mask``, with one difference: a special token's text inside a
    message stays text.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast``.
        messages: ``{"from": "human" | "assistant", "content": text}``; ``role`` and ``user``
            are understood as well.
        add_generation_prompt: end with what stands before an answer of the assistant.

    Returns:
        Token ids, and for each whether it carries loss; [length] both.

    Raises:
        DataError: the template refuses the conversation.
    """
    rendered, generated, mark = _render(tokenizer, messages, add_generation_prompt)
    ids: list[int] = []
    loss: list[bool] = []
    for position, span in enumerate(_spans(tokenizer, rendered, generated, mark)):
        if span.token_id is not None:
            ids.append(span.token_id)
            loss.append(any(span.learned))
            continue
        with text_only(tokenizer) as backend, _prefix(backend, first=position == 0):
            encoding = backend.encode(span.text, add_special_tokens=False)
        ids += encoding.ids
        # A token that lies across the border of what is generated counts as generated.
        loss += [any(span.learned[start:stop]) for start, stop in encoding.offsets]
    return ids, loss


def _template(tokenizer: Any) -> str:
    return tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> tuple[str, list[bool], str]:
    """Renders with special tokens in contents marked.

    Returns:
        The text, for each character whether it is generated, and the mark: a character that
        stands before every special token's text that came from a message.
    """
    import jinja2

    # The rendering behind apply_chat_template; that itself returns only ids, not the text
    # together with the places of what is generated.
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        _render_with_assistant_indices,
    )

    contents = "".join(message["content"] for message in messages)
    # Unicode keeps U+FDD0 and what follows out of text; should it be in one, go on from there.
    mark = next(chr(code) for code in range(0xFDD0, 0x110000) if chr(code) not in contents)
    special = _special_pattern(tokenizer)
    chat = [
        {
            "role": _ROLES[message.get("from") or message["role"]],
            "content": special.sub(lambda match: mark + match[0], message["content"]),
        }
        for message in messages
    ]
    try:
        rendered, places = _render_with_assistant_indices(
            _compile_jinja_template(_template(tokenizer)),
            chat,
            None,
            None,
            add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None
    generated = [False] * len(rendered)
    for start, stop in places:
        generated[start:stop] = [True] * (stop - start)
    return rendered, generated, mark


def _spans(tokenizer: Any, rendered: str, generated: list[bool], mark: str) -> Iterator[_Span]:
    """Cuts the rendered text at the special tokens that the template wrote; drops the marks.

    The first span is always text, if only an empty one.
    """
    begin = 0
    for match in _special_pattern(tokenizer, unless_after=mark).finditer(rendered):
        yield _text_span(rendered[begin : match.start()], generated[begin : match.start()], mark)
        begin = match.end()
        token_id = tokenizer.convert_tokens_to_ids(match[0])
        yield _Span(match[0], generated[match.start() : begin], token_id)
    yield _text_span(rendered[begin:], generated[begin:], mark)


def _text_span(text: str, generated: list[bool], mark: str) -> _Span:
    kept = [
        learned for character, learned in zip(text, generated, strict=True) if character != mark
    ]
    return _Span(text.replace(mark, ""), kept, None)


def _special_pattern(tokenizer: Any, unless_after: str = "") -> re.Pattern[str]:
    """Matches any special token, the longest where several begin."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens.sort(key=len, reverse=True)
    before = f"(?<!{unless_after})" if unless_after else ""
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, tokens))})")


@contextmanager
def _prefix(backend: Any, *, first: bool) -> Iterator[None]:
    """Takes the dummy prefix off a text that is not the first, where the tokenizer does so.

    A tokenizer converted with ``legacy: false`` puts it only before the first text of what it
    is given; here the texts between special tokens are given one by one. Others (Llama 2's
    own file) put it before every text by themselves, or never.
    """
    from tokenizers.pre_tokenizers import Metaspace

    before = backend.pre_tokenizer
    if first or not isinstance(before, Metaspace) or before.prepend_scheme != "first":
        yield
        return
    backend.pre_tokenizer = Metaspace(
        replacement=before.replacement, prepend_scheme="never", split=before.split
    )
    try:
        yield
    finally:
        backend.pre_tokenizer = before
