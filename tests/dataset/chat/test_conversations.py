"""From raw fields to rows: as the public program does it, whole exchanges, nothing lost unsaid."""

from __future__ import annotations

import bisect
import gzip
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.chat.chat_format import (
    DEFAULT_TEMPLATE,
    ChatFormat,
    encode_conversation,
)
from colossal_llama.dataset.chat.conversations import ConversationEncoder, conversation_record
from colossal_llama.dataset.records import SftRecord
from colossal_llama.dataset.tokenization import load_tokenizer
from colossal_llama.errors import DataError, RecordError

ROLES = {"S": "system", "U": "user", "A": "assistant"}
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions.\n\n"
)


def say(role, content):
    return {"role": role, "content": content}


def talk(*contents):
    return [say(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


def encoder(tokenizer, max_length=1 << 20, template=DEFAULT_TEMPLATE):
    return ConversationEncoder(tokenizer, template, max_length)


def result(tokenizer, messages, max_length=1 << 20):
    encoded = encoder(tokenizer, max_length).encode(SftRecord(messages, "c"))
    return encoded and (encoded.input_ids.tolist(), encoded.loss.tolist())


# The public program


def their_rows(tokenizer, messages, max_length):
    """Colossal-LLaMA's ids and loss, in a few lines of our own; None if nothing fits."""
    messages = messages[: len(messages) // 2 * 2]

    def prompt_ids(count):
        names = {"user": "Human", "assistant": "Assistant"}
        turns = (f"{names[m['role']]}: <s>{m['content']}</s>" for m in messages[: 2 * count])
        return tokenizer(SYSTEM + "".join(turns), add_special_tokens=False)["input_ids"]

    counts = range(1, len(messages) // 2 + 1)
    kept = bisect.bisect_right(counts, max_length - 1, key=lambda n: len(prompt_ids(n)))
    if not kept:
        return None
    ids = prompt_ids(kept)
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id][1::2]
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id][1::2]
    loss = [False] * len(ids)
    for start, end in zip(starts, ends, strict=True):
        loss[start : end + 1] = [True] * (end + 1 - start)
    return [tokenizer.bos_token_id, *ids], [False, *loss]


@pytest.fixture(scope="session")
def llama2(shared_data):
    """The slow tokenizer that the public program uses, and ours."""
    from transformers import LlamaTokenizer

    directory = shared_data / "tokenizers" / "llama2"
    return LlamaTokenizer.from_pretrained(directory, legacy=True), load_tokenizer(directory)


@pytest.fixture(scope="session")
def real_texts(shared_data):
    """Chinese, English and code."""
    texts = []
    for name in ("zh", "en", "code"):
        with gzip.open(shared_data / "corpora" / f"{name}.jsonl.gz", "rt") as lines:
            texts += [json.loads(next(lines))["target"] for _ in range(100)]
    return texts


def test_rows_are_those_of_the_public_program(llama2, real_texts):
    slow, fast = llama2
    generator = random.Random(3)
    outcomes = []
    for number in range(200):
        contents = []
        for _ in range(generator.randint(2, 9)):
            text = generator.choice(real_texts)
            start = generator.randrange(len(text))
            contents.append(text[start : start + generator.randint(1, 500)])
        messages = talk(*(text if text.strip() else "x" for text in contents))
        max_length = (4096, 1024, 512, 256)[number % 4]
        theirs = their_rows(slow, messages, max_length)
        assert result(fast, messages, max_length) == theirs, messages
        outcomes.append("none" if theirs is None else len(theirs[0]) * 4 // max_length)
    assert {"none", 0, 1, 2, 3} == set(outcomes)


@given(
    contents=st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
        ).filter(str.strip),
        min_size=2,
        max_size=5,
    ),
    spare=st.integers(0, 40),
)
@settings(max_examples=100, deadline=None)
def test_rows_are_those_of_the_public_program_for_any_text(llama2, contents, spare):
    slow, fast = llama2
    messages = talk(*contents)
    assert result(fast, messages, 60 + spare) == their_rows(slow, messages, 60 + spare)


# What is left out


def shape(letters):
    """A conversation from letters: S, U, A speak; u, a are blank. Each content is unlike others."""
    return [
        say(ROLES[letter.upper()], f"w{i}" if letter.isupper() else " \n")
        for i, letter in enumerate(letters)
    ]


@given(system=st.booleans(), letters=st.text("UAua", max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_is_left_out_is_counted(tokenizer, system, letters):
    letters = "S" * system + letters
    messages = shape(letters)
    kept, empty, unanswered = list("S" * system), 0, 0
    for questions, answers in re.findall(r"([Uu]*)([Aa]*)", letters.removeprefix("S")):
        whole = "".join(filter(str.isupper, questions + answers))
        if not answers:
            unanswered += len(whole)
            empty += len(questions) - len(whole)
        elif (questions and "U" not in questions) or "A" not in answers:
            empty += len(questions) + len(answers)
        else:
            kept += whole
            empty += len(questions) + len(answers) - len(whole)
    if "A" not in kept:
        with pytest.raises(RecordError, match="no assistant message"):
            conversation_record({"messages": messages})
        return
    record = conversation_record({"messages": messages})
    assert record == SftRecord(messages, "sft")
    encoded = encoder(tokenizer).encode(record)
    assert encoded is not None
    notes = {"unanswered": unanswered, "empty_turns": empty}
    assert encoded.notes == {name: count for name, count in notes.items() if count}
    assert len(kept) + unanswered + empty == len(messages)
    # The kept messages are those with content, in order, up to what is gone as a whole.
    text = tokenizer.decode(encoded.input_ids)
    said = [m for m in messages if f"{m['content']}</s>" in text or f"{m['content']}\n\n" in text]
    assert "".join(m["role"][0].upper() for m in said) == "".join(kept)
    ids, loss = encode_conversation(tokenizer, said)
    assert (encoded.input_ids.tolist(), encoded.loss.tolist()) == (ids, loss)


def test_arrays_are_small(tokenizer):
    encoded = encoder(tokenizer).encode(SftRecord(talk("Hi", "Hello"), "c"))
    assert (str(encoded.input_ids.dtype), str(encoded.loss.dtype)) == ("int32", "bool")
    assert encoded.notes == {}


@pytest.fixture(scope="session")
def passage(english):
    return " ".join(english)[:400]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    system=st.integers(0, 80),
    again=st.sets(st.integers(0, 19)),
    at=st.integers(0, 19),
    spare=st.integers(-1, 1),
)
@settings(max_examples=60, deadline=None)
def test_the_most_whole_exchanges_that_fit(tokenizer, passage, sizes, system, again, at, spare):
    messages = [say("system", passage[:system])] if system else []
    ends = []
    for number, size in enumerate(sizes):
        messages += talk(f"q{passage[size : 2 * size]}", f"a{passage[3 * size : 5 * size]}")
        if number in again:
            messages.append(say("assistant", "And more."))
        ends.append(len(messages))
    messages.append(say("user", "And?"))
    rows = [encode_conversation(tokenizer, messages[:end]) for end in ends]
    max_length = len(rows[at % len(rows)][0]) + spare
    fitting = [(ids, loss) for ids, loss in rows if len(ids) <= max_length]
    encoded = encoder(tokenizer, max_length).encode(SftRecord(messages, "c"))
    if not fitting:
        assert encoded is None
        return
    assert encoded is not None
    assert (encoded.input_ids.tolist(), encoded.loss.tolist()) == fitting[-1]
    assert encoded.notes.get("shortened", 0) == (len(fitting) < len(rows))
    assert encoded.notes["unanswered"] == 1


# Writes what is not the last exchange otherwise, so that more of them may be less.
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] if loop.index > messages | length - 2 else '...' }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=9), max_length=st.integers(10, 200))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_fits_by_any_template(tokenizer, passage, sizes, max_length):
    messages = talk(*(f"x{passage[i : i + size]}" for i, size in enumerate(sizes) for _ in "UA"))
    one = ChatFormat(tokenizer, FORGETFUL)
    rows = [one.encode(messages[: 2 * count + 2]) for count in range(len(sizes))]
    encoded = encoder(tokenizer, max_length, FORGETFUL).encode(SftRecord(messages, "c"))
    if encoded is None:
        assert len(rows[0][0]) > max_length
        return
    assert len(encoded.input_ids) <= max_length
    kept = rows.index((encoded.input_ids.tolist(), encoded.loss.tolist()))
    assert encoded.notes == ({} if kept == len(rows) - 1 else {"shortened": 1})


def test_a_long_conversation_takes_few_renderings(tokenizer, monkeypatch):
    rendered = []
    encode = ChatFormat.encode
    monkeypatch.setattr(
        ChatFormat, "encode", lambda self, m, **more: rendered.append(len(m)) or encode(self, m)
    )
    messages = talk(*(f"word {i}" for i in range(4000)))
    encoded = encoder(tokenizer, 500).encode(SftRecord(messages, "c"))
    assert encoded is not None
    assert encoded.notes == {"shortened": 1}
    assert 450 < len(encoded.input_ids) <= 500
    # All of it once; then only as much as what fits asks for.
    assert rendered[0] == 4000
    assert sum(rendered[1:]) < 500
    assert len(rendered) < 16


def test_what_the_template_refuses_is_the_records_fault(tokenizer):
    strict = DEFAULT_TEMPLATE + (
        "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    )
    one = encoder(tokenizer, template=strict)
    assert one.encode(SftRecord(talk("Hi", "Hello"), "c")) is not None
    with pytest.raises(RecordError, match="no system"):
        one.encode(SftRecord([say("system", "x"), *talk("Hi", "Hello")], "c"))
    unlearned = encoder(tokenizer, template="{{ messages[0]['content'] }}")
    with pytest.raises(RecordError, match="nothing to learn"):
        unlearned.encode(SftRecord(talk("Hi", "Hello"), "c"))
    with pytest.raises(DataError, match="not valid Jinja"):
        encoder(tokenizer, template="{% if %}")


# What a record may look like

SPELLINGS = {
    "system": ["system", "System"],
    "user": ["user", "human", "Human"],
    "assistant": ["assistant", "gpt", "GPT"],
}


@given(data=st.data(), letters=st.text("UA", max_size=5).map(lambda rest: rest + "UA"))
@settings(max_examples=100, deadline=None)
def test_spellings_of_one_conversation_are_one_record(data, letters):
    draw = data.draw
    messages = shape(draw(st.sampled_from(["", "S"])) + letters)
    turns = []
    for message in messages:
        speaker = draw(st.sampled_from(SPELLINGS[message["role"]]))
        # Tables have every column in every row.
        turn = draw(st.sampled_from([{"from": speaker}, {"role": speaker, "from": None}]))
        keys = st.sampled_from([("content",), ("value",), ("value", "content")])
        key, *others = draw(keys)
        turns.append({**turn, key: message["content"], **dict.fromkeys(others)})
    fields = {draw(st.sampled_from(["messages", "conversations"])): turns, "id": 7}
    if "messages" not in fields and draw(st.booleans()):
        fields["messages"] = None
    if messages[0]["role"] == "system" and draw(st.booleans()):
        fields["system"] = turns.pop(0).get("content") or messages[0]["content"]
    elif draw(st.booleans()):
        fields["system"] = draw(st.sampled_from([None, "", " \n"]))
    category = draw(st.sampled_from([None, "chat"]))
    if category or draw(st.booleans()):
        fields["category"] = category
    assert conversation_record(fields) == SftRecord(messages, category or "sft")


def test_a_blank_system_message_is_none():
    record = conversation_record({"messages": [say("system", " "), *talk("Hi", "Hello")]})
    assert record.messages == talk("Hi", "Hello")


Q, A, S = say("user", "Hi"), say("assistant", "Hello"), say("system", "Be brief.")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "missing key messages"),
        ({"messages": None, "conversations": None}, "missing key messages"),
        ({"messages": "Hi"}, "messages must be a list, found str"),
        ({"conversations": {}}, "conversations must be a list, found dict"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [Q]}, "no assistant message"),
        ({"messages": [S, Q]}, "no assistant message"),
        ({"messages": [Q, say("assistant", " ")]}, "no assistant message"),
        ({"messages": [say("user", ""), A]}, "no assistant message that answers one"),
        ({"messages": [Q, "Hello"]}, "in a message: must be an object, found str"),
        ({"messages": [Q, {"role": "assistant"}]}, "in a message: missing key content"),
        ({"messages": [Q, {"content": "Hello"}]}, "in a message: missing key role"),
        ({"messages": [Q, say("assistant", ["Hello"])]}, "content must be a string, found list"),
        ({"messages": [Q, {"from": "gpt", "value": 3}]}, "value must be a string, found int"),
        ({"messages": [Q, say("assistant", "\ud800")]}, "surrogate"),
        ({"messages": [Q, say("tool", "3"), A]}, "unknown speaker 'tool'; known are system, human"),
        ({"messages": [Q, S, A]}, "a system message is not the first"),
        ({"messages": [S, S, Q, A]}, "a system message is not the first"),
        ({"system": "Short!", "messages": [S, Q, A]}, "two system messages"),
        ({"system": 3, "messages": [Q, A]}, "system must be a string"),
        ({"messages": [Q, A], "category": ""}, "category is empty"),
        ({"messages": [Q, A], "category": 3}, "category must be a string"),
    ],
)
def test_what_is_wrong_is_said(fields, reason):
    with pytest.raises(RecordError) as raised:
        conversation_record(fields)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
