"""What is refused by name: byte-level directories, and pieces that no text could give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import byte_level, extension
from colossal_llama.tokenizer.byte_level_files import (
    is_byte_level,
    read_byte_level,
    why_unsupported,
)
from colossal_llama.tokenizer.directory import read_tokenizer
from tests.tokenizer.byte_level_styles import STYLES, make_all, read_json, write_json


@pytest.fixture(scope="module")
def sources(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("byte-level"), english[::4])


def _change(source: Path, target: Path, **parts: Any) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    fast = read_json(source / "tokenizer.json")
    for name, value in parts.items():
        model = fast["model"] if name in fast["model"] else fast
        model[name] = value(model[name]) if callable(value) else value
    write_json(target / "tokenizer.json", fast)
    return target


def _token(key: int, text: str) -> dict[str, Any]:
    return byte_level._symbol(text, key)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "a Unigram tokenizer"),
    "wordpiece": ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "a WordPiece tokenizer"),
    "wordlevel": ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "a WordLevel tokenizer"),
    "not byte-level": ({"pre_tokenizer": None}, "not byte-level"),
    "decoder": ({"decoder": None}, "decoder"),
    "suffix": ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix ('</w>')"),
    "prefix space": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        "add_prefix_space",
    ),
    "gap": ({"vocab": lambda v: {**v, "gap": 1600}}, "is nobody's"),
    "twice": ({"vocab": lambda v: {**v, "again": 300}}, "id 300 is both"),
    "moved": ({"added_tokens": lambda a: [*a, _token(1800, "<far>")]}, "'<far>' is id 1800"),
    "broken": ({"merges": [["no", "such"]]}, "not a tokenizer"),
}


@pytest.mark.parametrize(("parts", "complaint"), REFUSED.values(), ids=REFUSED)
def test_sources_are_refused_by_name(
    parts: dict[str, Any], complaint: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    path = _change(sources["smollm"], tmp_path / "changed", **parts)
    with pytest.raises(DataError) as caught:
        read_byte_level(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_be_extended_is_known_from_the_json(sources: dict[str, Path]) -> None:
    for path in sources.values():
        fast = read_json(path / "tokenizer.json")
        assert is_byte_level(fast)
        assert why_unsupported(fast, path) is None
    llama2 = {"model": {"type": "BPE", "vocab": {"a": 0}}, "normalizer": {"type": "Prepend"}}
    assert not is_byte_level(llama2)
    assert not is_byte_level({**fast, "model": {"type": "Unigram", "vocab": []}})


def test_files_that_contradict_each_other_are_refused(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Stale vocab.json and merges.txt, a special token without an id."""

    def refused(name: str, complaint: str, change: Any) -> None:
        path = _change(sources["qwen"], tmp_path / name)
        change(path)
        with pytest.raises(DataError, match=complaint) as caught:
            read_byte_level(path)
        assert str(path) in str(caught.value)

    def swap_lines(path: Path) -> None:
        version, first, second, *rest = (path / "merges.txt").read_text("utf-8").split("\n")
        (path / "merges.txt").write_text("\n".join([version, second, first, *rest]), "utf-8")

    def swap_ids(path: Path) -> None:
        vocabulary = read_json(path / "vocab.json")
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        write_json(path / "vocab.json", vocabulary)

    def add_pad(path: Path) -> None:
        settings = read_json(path / "tokenizer_config.json")
        write_json(path / "tokenizer_config.json", {**settings, "pad_token": "<nowhere>"})

    def other_class(path: Path) -> None:
        settings = read_json(path / "tokenizer_config.json")
        settings["tokenizer_class"] = "GPT2Tokenizer"  # another cut into words
        write_json(path / "tokenizer_config.json", settings)

    def put_a_prefix(path: Path) -> None:
        settings = read_json(path / "tokenizer_config.json")
        write_json(path / "tokenizer_config.json", {**settings, "add_prefix_space": True})

    refused("prefix", "a space before every text", put_a_prefix)
    refused("list", "cannot be read", lambda p: write_json(p / "tokenizer_config.json", [1]))
    refused("merges", "merges.txt and tokenizer.json disagree", swap_lines)
    refused("vocab", "vocab.json and tokenizer.json disagree", swap_ids)
    refused("alone", "merges.txt is of no use alone", lambda p: (p / "vocab.json").unlink())
    refused("pad", "pad_token is '<nowhere>'", add_pad)
    refused("class", "give different ids", other_class)


def test_a_bare_tokenizer_json_gets_a_class(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, config, expected in (
        ("bare", None, "PreTrainedTokenizerFast"),
        ("model", {"model_type": "gpt2"}, "GPT2TokenizerFast"),
    ):
        source = tmp_path / name
        source.mkdir()
        fast = (sources["gpt2"] / "tokenizer.json").read_bytes()
        (source / "tokenizer.json").write_bytes(fast)
        if config is not None:
            write_json(source / "config.json", config)
        tokenizer = read_byte_level(source)
        path = tmp_path / f"{name}-out"
        path.mkdir()
        extended = extension.extend(tokenizer, [tokenizer.spell("龘靐")]).tokenizer
        extended.write(path, settings_from=source)
        auto = AutoTokenizer.from_pretrained(path)
        assert type(auto).__name__ == expected
        assert auto.convert_ids_to_tokens(auto.encode("龘靐")) == [auto.tokenize("龘靐")[0]]


# what cannot be a piece


PROBLEMS = {
    "gpt2": {"你，好": "'你' and '，' and '好'", "a1": "'a' and '1'", "it's": '"\'s"'},
    "llama3": {"1234": "'123' and '4'", "你，": "always cut", "x▁y": "' y'"},
    "qwen": {"e\u0301": "is written 'é'", "12": "'1' and '2'", "\u2126": "is written 'Ω'"},
    "smollm": {"12": "'1' and '2'", "你1": "always cut"},
}
FINE = {
    "gpt2": ["12", "▁12", "，。", "'s", "▁▁", "你好", "▁你好"],
    "llama3": ["123", "，你好", "，。", "'s", "▁▁", "é"],
    "qwen": ["é", "1", "，你好"],
    "smollm": ["1", "你好", "▁你好"],
}


@pytest.mark.parametrize("style", STYLES)
def test_what_no_text_can_give_is_named(style: str, sources: dict[str, Path]) -> None:
    tokenizer = read_byte_level(sources[style])
    for text, complaint in PROBLEMS[style].items():
        problem = tokenizer.problem_of(text)
        assert problem is not None
        assert complaint in problem
    for text in FINE[style]:
        assert tokenizer.problem_of(text) is None
        assert tokenizer.text(tokenizer.spell(text)) == text.replace("▁", " ")
    known = set(tokenizer.pieces())
    new = [piece for piece in map(tokenizer.spell, FINE[style]) if piece not in known]
    assert extension.extend(tokenizer, new).dropped == []


def test_a_byte_that_is_missing_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    """SmolLM2's vocabulary lacks some bytes; the library drops them without a word."""
    fast = read_json(sources["smollm"] / "tokenizer.json")
    (byte,) = read_byte_level(sources["smollm"]).spell("\U0004ffff")[:1]
    assert byte == "ñ"  # F1
    model = fast["model"]
    last = max(model["vocab"], key=model["vocab"].__getitem__)
    model["merges"] = [m for m in model["merges"] if last not in (m.replace(" ", ""), *m.split())]
    del model["vocab"][last]
    model["vocab"][last] = model["vocab"].pop(byte)
    write_json(tmp_path / "tokenizer.json", fast)
    tokenizer = read_byte_level(tmp_path)
    assert tokenizer.problem_of("a\U0004ffff") == (
        "holds '\\U0004ffff', whose byte 0xF1 this vocabulary lacks"
    )


def test_a_symbol_that_is_spelled_like_bytes_is_refused(sources: dict[str, Path]) -> None:
    plain = read_byte_level(sources["gpt2"])
    with pytest.raises(DataError, match="'é' cannot be a user-defined symbol"):
        plain.extended([], symbols=[plain.spell("é")])


def test_a_model_of_another_program_beside_it_is_passed_over(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Some directories of Llama 3 keep Meta's own tokenizer.model, which is a list in base64."""
    path = _change(sources["llama3"], tmp_path / "source")
    (path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert isinstance(read_tokenizer(path), byte_level.ByteLevelTokenizer)
