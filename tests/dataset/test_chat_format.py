"""Conversations to ids: as transformers does it, except that content is never a control token."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path

import pytest

from colossal_llama.dataset.chat_format import (
    DEFAULT_TEMPLATE,
    encode_conversation,
    training_template,
)
from colossal_llama.dataset.tokenization import load_tokenizer
from colossal_llama.errors import DataError

# Trims contents, and marks as generated what begins inside a stretch of plain text.
TRIMMING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)

ODD = ["\n x", "  lead", "trail \n", "龘", "▁▁", "a\u3000", "你好", "x"]


def conversations(texts: list[str]) -> list[list[str]]:
    """Random slices of real text (alternating human, assistant), and odd ones."""
    generator = random.Random(1)
    found = [[a, b] for a in ODD for b in ODD]
    for _ in range(40):
        turns = []
        for _ in range(generator.choice([2, 3, 6])):
            text = generator.choice(texts)
            start = generator.randrange(len(text))
            turns.append(text[start : start + generator.randint(1, 300)])
        found.append(turns)
    return found


def on_disk(turns):
    speakers = ("human", "assistant")
    return [{"from": speakers[i % 2], "content": turn} for i, turn in enumerate(turns)]


def in_template(turns):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def check_equals_transformers(tokenizer, template, texts):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    for turns in conversations(texts):
        ids, loss = encode_conversation(tokenizer, on_disk(turns))
        theirs = tokenizer.apply_chat_template(
            in_template(turns), return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == theirs["input_ids"], turns
        assert loss == [bool(flag) for flag in theirs["assistant_masks"]], turns
        prompt, _ = encode_conversation(tokenizer, on_disk(turns), add_generation_prompt=True)
        assert prompt == tokenizer.apply_chat_template(
            in_template(turns), add_generation_prompt=True
        )


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, TRIMMING_TEMPLATE])
def test_ids_and_mask_are_those_of_transformers(tokenizer, english, template):
    check_equals_transformers(tokenizer, template, english)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_dummy_prefix_written_by_the_pre_tokenizer(tokenizer, english, scheme):
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import Metaspace

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = Replace("x", "x")
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace("▁", scheme, split=False)
    check_equals_transformers(tokenizer, DEFAULT_TEMPLATE, english)


@pytest.mark.parametrize("name", ["llama2", "mistral-v1"])
def test_ids_and_mask_with_real_tokenizers(shared_data, english, name):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    check_equals_transformers(tokenizer, DEFAULT_TEMPLATE, english)


def test_llama2_without_its_fast_file_puts_the_prefix_first_only(shared_data, tmp_path, english):
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(shared_data / "tokenizers" / "llama2" / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.backend_tokenizer.pre_tokenizer.prepend_scheme == "first"
    check_equals_transformers(tokenizer, DEFAULT_TEMPLATE, english)
    assert tokenizer.backend_tokenizer.pre_tokenizer.prepend_scheme == "first"


def test_the_default_format(tokenizer):
    ids, loss = encode_conversation(tokenizer, on_disk(["Hi", "Hello", "Why", "So"]))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    text = "".join(pieces).replace("▁", " ").replace("<0x0A>", "\n")
    assert text == (
        " A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.\n\n"
        "Human: <s> Hi</s> Assistant: <s> Hello</s> Human: <s> Why</s> Assistant: <s> So</s>"
    )
    learned = [piece for piece, flag in zip(pieces, loss, strict=True) if flag]
    assert "".join(learned).replace("▁", " ") == " Hello</s> So</s>"


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, TRIMMING_TEMPLATE])
@pytest.mark.parametrize("text", ["</s>", "<s>a</s>", "say </s> or <unk>", "\ufdd0</s>\ufdd1"])
def test_content_is_never_a_control_token(tokenizer, template, text):
    """The public application drops such a conversation or stops at an assertion."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    ids, loss = encode_conversation(tokenizer, on_disk([text, f"It is {text}"]))
    plain, plain_loss = encode_conversation(tokenizer, on_disk(["text", "It is text"]))
    control = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert sum(i in control for i, flag in zip(ids, loss, strict=True) if flag) == 1
    assert any(plain_loss)
    shown = tokenizer.decode([i for i, flag in zip(ids, loss, strict=True) if flag])
    assert shown.strip() == f"It is {text}</s>"


def test_template_of_the_tokenizer_goes_first_and_needs_markers(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    assert training_template(tokenizer, Path("t")) == DEFAULT_TEMPLATE
    tokenizer.chat_template = TRIMMING_TEMPLATE
    assert training_template(tokenizer, Path("t")) == TRIMMING_TEMPLATE
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="generation"):
        training_template(tokenizer, Path("t"))
    ids, _ = encode_conversation(tokenizer, on_disk(["Hi"]))  # to talk, no markers are needed
    assert tokenizer.decode(ids) == "Hi"


def test_refusal_of_a_template_is_an_error_for_the_user(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('alternate!') }}"
    with pytest.raises(DataError, match="alternate!"):
        encode_conversation(tokenizer, on_disk(["Hi"]))
