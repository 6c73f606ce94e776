"""Which chat template a data set is made with: a built-in one, a file's, or the tokenizer's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from colossal_llama.dataset.chat.chat_format import DEFAULT_TEMPLATE, TEMPLATES, template_of
from colossal_llama.dataset.chat.rendering import ChatTemplate
from colossal_llama.errors import DataError, UsageError

DEFAULT = "colossal-llama"

# chatml: OpenAI's chatml.md (openai-python v0.28). llama3: Meta, "Model Cards & Prompt formats",
# Llama 3 Instruct; as in Meta's program, contents lose white space at both ends.
BUILT_IN = (DEFAULT, "chatml", "llama3")

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKER = re.compile(r"<\|\w+\|>")
_QUESTION, _ANSWER = "question", "answer"


def choose_template(name_or_path: str | None, tokenizer: Any, tokenizer_dir: Path) -> str:
    """The chat template to train with, which is then the trained model's.

    Args:
        name_or_path: one of ``BUILT_IN``, or a Jinja file; None is the tokenizer's own template
            if it has one, else the default.
        tokenizer: a ``PreTrainedTokenizerFast``.
        tokenizer_dir: where it comes from.

    Raises:
        UsageError: there is neither such a built-in template nor such a file.
        DataError: the template is broken, says nothing about what the assistant generates, or
            needs special tokens that the tokenizer does not have.
    """
    if name_or_path in BUILT_IN:
        return _built_in(name_or_path, tokenizer, tokenizer_dir)
    if name_or_path is not None:
        template = _read(name_or_path)
        _check(template, tokenizer, name_or_path)
        return template
    own = template_of(tokenizer)
    if own is None:
        return DEFAULT_TEMPLATE
    _check(own, tokenizer, f"the chat_template of {tokenizer_dir}")
    return own


def _built_in(name: str, tokenizer: Any, tokenizer_dir: Path) -> str:
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [
        marker for marker in dict.fromkeys(_MARKER.findall(template)) if marker not in special
    ]
    if missing:
        raise DataError(
            f"--chat_template {name}: {tokenizer_dir} lacks its special tokens "
            f"{', '.join(missing)}; take {DEFAULT}, which needs none, or a tokenizer and a model "
            "that have them"
        )
    return template


def _read(path: str) -> str:
    shown = f"--chat_template {' '.join(path.split())[:100]}"
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        names = ", ".join(BUILT_IN)
        raise UsageError(
            [f"{shown}: there is no such file, and it is not one of {names}"]
        ) from None
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{shown}: not UTF-8 text") from None


def _check(template: str, tokenizer: Any, where: str) -> None:
    """Raises DataError if the template is of no use to learn from."""
    if not _GENERATION.search(template):
        raise DataError(
            f"{where} has no {{% generation %}} ... {{% endgeneration %}} around what the "
            "assistant says, so nothing marks what to learn; add them, or choose another "
            f"--chat_template ({', '.join(BUILT_IN)} or a file)"
        )
    probe = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        learned = ChatTemplate(template, tokenizer).learned_text(probe * 2)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if _ANSWER not in learned or _QUESTION in learned:
        raise DataError(
            f"{where}: what it marks as generated is not what the assistant says (but "
            f"{learned!r:.60}); put the markers around that, and not in a macro"
        )
