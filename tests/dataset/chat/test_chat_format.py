"""Conversations to ids: as transformers does it, except that content is never a control token."""

from __future__ import annotations

import copy
import random
import shutil

import pytest

from colossal_llama.dataset.chat.chat_format import (
    DEFAULT_TEMPLATE,
    encode_conversation,
    template_of,
    turn_end_id,
)
from colossal_llama.dataset.chat.rendering import ChatTemplate
from colossal_llama.dataset.tokenization import load_tokenizer
from colossal_llama.errors import DataError

# Trims contents, and marks as generated what begins inside a stretch of plain text.
TRIMMING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)

# The same text can come first and later on.
BARE_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
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


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, TRIMMING_TEMPLATE, BARE_TEMPLATE])
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
    check_equals_transformers(tokenizer, BARE_TEMPLATE, english)


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


SYSTEM_LINE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions."
)


def shown(tokenizer, ids):
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    return text.replace("▁", " ").replace("<0x0A>", "\n")


def test_the_default_format(tokenizer):
    ids, loss = encode_conversation(tokenizer, on_disk(["Hi", "Hello", "Why", "So"]))
    assert shown(tokenizer, ids) == (
        f"<s> {SYSTEM_LINE}\n\n"
        "Human: <s> Hi</s> Assistant: <s> Hello</s> Human: <s> Why</s> Assistant: <s> So</s>"
    )
    learned = [token for token, flag in zip(ids, loss, strict=True) if flag]
    assert shown(tokenizer, learned) == "<s> Hello</s><s> So</s>"
    prompt, loss = encode_conversation(tokenizer, on_disk(["Hi"]), add_generation_prompt=True)
    assert shown(tokenizer, prompt).endswith("Human: <s> Hi</s> Assistant: <s>")
    assert prompt == ids[: len(prompt)]
    assert not any(loss)


def test_a_system_message_replaces_the_system_line(tokenizer):
    messages = on_disk(["Hi", "Hello"])
    plain, _ = encode_conversation(tokenizer, messages)
    system = [{"role": "system", "content": "Be brief."}]
    ids, loss = encode_conversation(tokenizer, system + messages)
    expected = shown(tokenizer, plain).replace(SYSTEM_LINE, "Be brief.")
    assert shown(tokenizer, ids) == expected
    learned = [token for token, flag in zip(ids, loss, strict=True) if flag]
    assert shown(tokenizer, learned) == "<s> Hello</s>"
    with pytest.raises(DataError, match="system"):
        encode_conversation(tokenizer, messages + system)


def test_speakers_have_many_names(tokenizer):
    expected = encode_conversation(tokenizer, on_disk(["Hi", "Hello"]))
    for key, names in [("role", ("user", "assistant")), ("from", ("Human", "GPT"))]:
        pairs = zip(names, ("Hi", "Hello"), strict=True)
        messages = [{key: name, "content": text} for name, text in pairs]
        assert encode_conversation(tokenizer, messages) == expected


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
    learned = [i for i, flag in zip(ids, loss, strict=True) if flag]
    plain_learned = [i for i, flag in zip(plain, plain_loss, strict=True) if flag]
    assert [i for i in learned if i in control] == [i for i in plain_learned if i in control]
    told = tokenizer.decode(learned).removeprefix("<s>")
    assert told.strip() == f"It is {text}</s>"


def test_the_tokenizers_own_template_goes_first(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    assert template_of(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert template_of(tokenizer) == tokenizer.chat_template
    ids, _ = encode_conversation(tokenizer, on_disk(["Hi"]))  # to talk, no markers are needed
    assert tokenizer.decode(ids) == "Hi"
    tokenizer.chat_template = {"default": TRIMMING_TEMPLATE, "rag": "x"}
    assert template_of(tokenizer) == TRIMMING_TEMPLATE
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(DataError, match="rag, tool_use"):
        encode_conversation(tokenizer, on_disk(["Hi"]))


def test_refusal_of_a_template_is_an_error_for_the_user(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('alternate!') }}"
    with pytest.raises(DataError, match="alternate!"):
        encode_conversation(tokenizer, on_disk(["Hi"]))


@pytest.mark.parametrize("mistake", ["{% if %}", "{{ 'a' + 1 }}", "{{ messages[9].content }}"])
def test_a_broken_template_is_an_error_for_the_user(tokenizer, mistake):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = mistake
    with pytest.raises(DataError, match="the chat template"):
        encode_conversation(tokenizer, on_disk(["Hi"]))


def test_what_ends_an_answer(tokenizer):
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TRIMMING_TEMPLATE.replace("eos_token", "unk_token")
    assert turn_end_id(tokenizer) == tokenizer.unk_token_id
    tokenizer.chat_template = TRIMMING_TEMPLATE.replace("{{ eos_token }}", "")
    assert turn_end_id(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert turn_end_id(tokenizer) is None


def test_what_is_generated_may_come_first_of_all(tokenizer):
    """Where transformers' own mask is empty."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    ids, loss = encode_conversation(tokenizer, [{"role": "assistant", "content": "Hello"}])
    assert tokenizer.decode(ids) == "Hello"
    assert all(loss)


@pytest.mark.parametrize("stripping", [("lstrip",), ("rstrip",), ("lstrip", "rstrip")])
def test_special_tokens_that_take_white_space_along(tokenizer, english, stripping):
    from transformers import AddedToken

    tokenizer = copy.deepcopy(tokenizer)
    flags = dict.fromkeys(stripping, True)
    token = AddedToken("<|end|>", special=True, normalized=False, **flags)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    template = TRIMMING_TEMPLATE.replace("{{ eos_token }}", "{{ ' ' }}{{ '<|end|>' }}")
    template = template.replace("{% endfor %}", "{{ '\\n x' }}{% endfor %}")
    check_equals_transformers(tokenizer, template, english)


def test_what_is_marked_but_not_written_does_no_harm(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% set unused %}{% generation %}{{ messages[0].content * 9 }}{% endgeneration %}"
        "{% endset %}{{ messages[0].content }}"
    )
    spans = ChatTemplate(tokenizer.chat_template, tokenizer).spans(on_disk(["Hi </s>"]))
    assert [(span.text, span.learned) for span in spans] == [("Hi </s>", b"\1" * 7)]


def test_what_was_said_before_makes_no_difference(tokenizer, english, monkeypatch):
    """Texts are remembered from one conversation to the next, up to a limit."""
    from colossal_llama.dataset.chat import chat_format

    monkeypatch.setattr(chat_format, "_REMEMBERED_CHARACTERS", 2000)
    talks = [on_disk(turns) for turns in conversations(english)]
    for template in (DEFAULT_TEMPLATE, TRIMMING_TEMPLATE):
        one = chat_format.ChatFormat(tokenizer, template)
        for talk in talks + talks[::-1]:
            assert one.encode(talk) == chat_format.ChatFormat(tokenizer, template).encode(talk)
            assert sum(len(text.text) for text in one._memory) < 5000
