"""The built-in templates give the published formats; a template that teaches nothing is refused."""

from __future__ import annotations

import copy
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.chat.chat_format import (
    DEFAULT_TEMPLATE,
    TEMPLATES,
    ChatFormat,
    encode_conversation,
    template_of,
    turn_end_id,
)
from colossal_llama.dataset.chat.conversations import ConversationEncoder
from colossal_llama.dataset.chat.templates import BUILT_IN, choose_template
from colossal_llama.dataset.records import SftRecord
from colossal_llama.dataset.tokenization import load_tokenizer
from colossal_llama.errors import ColossalLlamaError, DataError, UsageError

ROOT = Path(__file__).resolve().parents[3]
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GENERATION = "{% generation %}{{ message['content'] }}{% endgeneration %}"


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory, english: list[str]) -> Any:
    """A byte-level tokenizer as Llama 3's, with the special tokens of ChatML and of Llama 3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(
        Regex(r" ?\p{L}+| ?\p{N}{1,3}|\s+(?!\S)|\s+| ?[^\s\p{L}\p{N}]+"), "isolated"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    special = [*LLAMA3, "<|end_of_text|>", *CHATML]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*english[:10], "\n\n\n  \n    \n\n\n\n" * 50], trainer)
    directory = tmp_path_factory.mktemp("byte-level")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        additional_special_tokens=special,
    ).save_pretrained(directory)
    return load_tokenizer(directory)


def chatml(messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def llama3(messages):
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>"
        for m in messages
    )


def colossal_llama(messages, bos, eos):
    system = [m["content"] for m in messages if m["role"] == "system"] or [
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions."
    ]
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [m for m in messages if m["role"] != "system"]
    return f"{bos}{system[0]}\n\n" + "".join(
        f"{names[m['role']]}: {bos}{m['content']}{eos}" for m in turns
    )


PUBLISHED = {
    "colossal-llama": lambda messages: colossal_llama(
        messages, "<|begin_of_text|>", "<|end_of_text|>"
    ),
    "chatml": chatml,
    "llama3": llama3,
}
OPENING = {
    "colossal-llama": "Assistant: <|begin_of_text|>",
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
END = {"colossal-llama": "<|end_of_text|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}

TEXT = st.lists(
    st.sampled_from(["Hi", " a", "word ", "\n", "  ", "\n\n", "你好", "é", *CHATML, *LLAMA3, "<|"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    max_size=8,
).map("".join)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", BUILT_IN)
@given(system=st.none() | TEXT, contents=st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_rendering_is_the_published_format(byte_level, name, system, contents):
    """Byte-level ids decode to the very text they stand for."""
    tokenizer = byte_level
    one = ChatFormat(tokenizer, choose_template(name, tokenizer, Path("t")))
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * 3
    messages += [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    ids, loss = one.encode(messages)
    assert decode(tokenizer, ids) == PUBLISHED[name](messages)
    # What is generated: the assistant's words, whatever they are, and what ends them.
    runs = groupby(zip(ids, loss, strict=True), key=lambda pair: pair[1])
    learned = [decode(tokenizer, [token for token, _ in run]) for flag, run in runs if flag]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(learned) == len(answers)
    for text, answer in zip(learned, answers, strict=True):
        if name == "colossal-llama":
            assert text == f"<|begin_of_text|>{answer}<|end_of_text|>"
            continue
        words = (answer.strip() if name == "llama3" else answer) + END[name]
        assert text.endswith(words)
        # A token may join the line break before an answer with the white space it begins with.
        before = text.removesuffix(words)
        assert not before.strip()
        assert not before or words[0].isspace()
    prompt, loss = one.encode(messages[:1], add_generation_prompt=True)
    assert decode(tokenizer, prompt) == PUBLISHED[name](messages[:1]) + OPENING[name]
    assert messages[0]["role"] == "assistant" or not any(loss)


@pytest.mark.parametrize("name", BUILT_IN)
def test_ids_and_mask_are_those_of_transformers(byte_level, english, name):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = choose_template(name, tokenizer, Path("t"))
    roles = ("system", "user", "assistant", "user", "assistant")
    for text in english:
        contents = [text[i * 97 : i * 97 + 90].strip() or "x" for i in range(5)]
        contents[2] = contents[2].replace(" ", "   ")  # tokens that are nothing but spaces
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        for chat in (messages, messages[1:]):
            ids, loss = encode_conversation(tokenizer, chat)
            theirs = tokenizer.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True
            )
            assert ids == theirs["input_ids"]
            assert loss == [bool(flag) for flag in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_choice_comes_back_with_the_tokenizer_it_was_stored_with(byte_level, tmp_path, name):
    chosen = choose_template(name, byte_level, Path("t"))
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = chosen
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert template_of(loaded) == choose_template(None, loaded, tmp_path) == chosen
    messages = [{"role": r, "content": f"  {r} "} for r in ("system", "user", "assistant")]
    encoded = ConversationEncoder(byte_level, chosen, 999).encode(SftRecord(messages, "c"))
    assert encoded is not None
    ids, loss = encode_conversation(loaded, messages)
    assert (encoded.input_ids.tolist(), encoded.loss.tolist()) == (ids, loss)
    assert decode(loaded, [turn_end_id(loaded)]) == END[name]


def test_a_second_system_message_is_refused(byte_level):
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "system")]
    for name in BUILT_IN:
        one = ChatFormat(byte_level, choose_template(name, byte_level, Path("t")))
        with pytest.raises(DataError, match="no place here for the role system"):
            one.encode(messages)


def test_without_a_choice_it_is_the_tokenizers_own_or_the_default(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    assert choose_template(None, tokenizer, Path("t")) == DEFAULT_TEMPLATE
    assert choose_template("colossal-llama", tokenizer, Path("t")) == DEFAULT_TEMPLATE
    own = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        f"{GENERATION}{{% else %}}{{{{ message['content'] }}}}{{% endif %}}{{% endfor %}}"
    )
    tokenizer.chat_template = own
    assert choose_template(None, tokenizer, Path("t")) == own
    assert choose_template("colossal-llama", tokenizer, Path("t")) == DEFAULT_TEMPLATE
    (tmp_path / "my.jinja").write_text(own + "\n", encoding="utf-8")
    assert choose_template(str(tmp_path / "my.jinja"), tokenizer, Path("t")) == own + "\n"


MARKED_IN_A_MACRO = (
    "{% macro say(m) %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}"
    "{% endmacro %}{% for m in messages %}"
    "{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] }}", "no {% generation %}"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "is not what the assistant says",
        ),
        ("{% generation %}{{ bos_token }}{% endgeneration %}", "is not what the assistant says"),
        (MARKED_IN_A_MACRO, "not in a macro"),
        ("{% generation %}\n{% if %}{% endgeneration %}", "not valid Jinja: line 2"),
        ("{% generation %}{{ raise_exception('no!') }}{% endgeneration %}", "no!"),
    ],
)
def test_a_template_that_teaches_nothing_is_refused(tokenizer, tmp_path, template, reason):
    tokenizer = copy.deepcopy(tokenizer)
    path = tmp_path / "my.jinja"
    path.write_text(template, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        choose_template(str(path), tokenizer, Path("tok"))
    assert str(raised.value).startswith(str(path))
    assert reason in str(raised.value)
    tokenizer.chat_template = template
    with pytest.raises(DataError) as raised:
        choose_template(None, tokenizer, Path("tok"))
    assert str(raised.value).startswith("the chat_template of tok")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "needed"), [("chatml", CHATML), ("llama3", LLAMA3)])
def test_special_tokens_that_are_not_there_are_named(tokenizer, byte_level, name, needed):
    with pytest.raises(DataError) as raised:
        choose_template(name, tokenizer, Path("some/tok"))
    assert all(token in str(raised.value) for token in ["some/tok", *needed, "colossal-llama"])
    # A token of that text that is not special would be read out of messages.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(needed[:1])
    tokenizer.add_special_tokens({"additional_special_tokens": needed[1:]})
    with pytest.raises(DataError) as raised:
        choose_template(name, tokenizer, Path("some/tok"))
    assert [token for token in needed if token in str(raised.value)] == needed[:1]


def test_a_file_that_cannot_be_read_is_one_line(tokenizer, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path, error in [
        (tmp_path / "nowhere", UsageError),
        (tmp_path, DataError),
        (tmp_path / "bytes", DataError),
        (DEFAULT_TEMPLATE, ColossalLlamaError),
    ]:
        with pytest.raises(error, match="--chat_template") as raised:
            choose_template(str(path), tokenizer, Path("t"))
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="colossal-llama, chatml, llama3"):
        choose_template("llama-3", tokenizer, Path("t"))


def test_every_template_has_a_file_that_is_installed():
    assert sorted(BUILT_IN) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = content["tool"]["setuptools"]["package-data"]["colossal_llama.dataset.chat"]
    installed = {path for pattern in patterns for path in TEMPLATES.parent.glob(pattern)}
    assert set(TEMPLATES.iterdir()) <= installed
