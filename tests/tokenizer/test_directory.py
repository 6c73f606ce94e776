"""Reading a tokenizer directory and making its missing half."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import directory, extension, fast_tokenizer
from colossal_llama.tokenizer.sentencepiece_model import processor, read_model


def _without_fast_half(small: Path, target: Path, **settings: Any) -> Path:
    target.mkdir()
    model = read_model(small / "tokenizer.model")
    for name, value in settings.items():
        setattr(model.normalizer_spec, name, value)
    (target / "tokenizer.model").write_bytes(model.SerializeToString())
    return target


@pytest.mark.parametrize("prefix", [True, False])
def test_a_made_fast_half_has_the_models_dummy_prefix(
    prefix: bool, small: Path, english: list[str], tmp_path: Path
) -> None:
    """Defect 19: the prefix is what the SentencePiece model says, not transformers' default."""
    source = _without_fast_half(small, tmp_path / "in", add_dummy_prefix=prefix)
    read = directory.read_tokenizer(source)
    encoder, fast = processor(read.model), fast_tokenizer.load(read.fast)
    for text in [*english[:20], " space first", "", "\n"]:
        ids = encoder.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert fast.decode(ids) == encoder.decode(ids)


def test_a_made_fast_half_ignores_transformers_newer_prefix(small: Path, tmp_path: Path) -> None:
    """With ``legacy: false`` transformers leaves the prefix out before a space."""
    source = _without_fast_half(small, tmp_path / "in")
    (source / "tokenizer_config.json").write_text('{"legacy": false}')
    read = directory.read_tokenizer(source)
    encoder, fast = processor(read.model), fast_tokenizer.load(read.fast)
    slow = AutoTokenizer.from_pretrained(small, use_fast=False, legacy=False)
    for text in (" space first", "▁the", "the", "  two"):
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == encoder.encode(text) == slow.encode(text, add_special_tokens=False)


def test_halves_that_segment_differently_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "in")
    path = tmp_path / "in" / "tokenizer.json"
    fast = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fast, "normalizer": None}), encoding="utf-8")
    with pytest.raises(DataError, match="different ids"):
        directory.read_tokenizer(tmp_path / "in")


def test_every_setting_survives(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(small, source)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"legacy": False, "add_eos_token": True, "chat_template": "{{ messages }}"}
    config |= {"model_max_length": 77, "padding_side": "left", "something_else": [1]}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")
    read = directory.read_tokenizer(source)
    target = tmp_path / "out"
    target.mkdir()
    read.write(target, settings_from=source)
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert (target / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert json.loads((target / "tokenizer.json").read_text(encoding="utf-8")) == read.fast
    loaded = AutoTokenizer.from_pretrained(target)
    assert (loaded.model_max_length, loaded.padding_side, loaded.legacy) == (77, "left", False)


@pytest.mark.parametrize("value", [None, True])
def test_a_setting_that_transformers_adds_on_saving_goes(
    value: bool | None, small: Path, tmp_path: Path
) -> None:
    """With add_prefix_space true the fast class throws tokenizer.json away; with null and
    ``legacy: false`` the slow one puts no space before a text."""
    source = tmp_path / "in"
    shutil.copytree(small, source)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"legacy": False, "add_prefix_space": value}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    extended = extension.extend(directory.read_tokenizer(source), ["您好"], symbols=["<h1>"])
    target = tmp_path / "out"
    target.mkdir()
    extended.tokenizer.write(target, settings_from=source)
    halves = [AutoTokenizer.from_pretrained(target, use_fast=fast) for fast in (True, False)]
    texts = ["the", " the", "  two", "<h1>the<h1> x", "x<h1>您好"]
    for text, ids in zip(texts, processor(extended.tokenizer.model).encode(texts), strict=True):
        assert [half.encode(text, add_special_tokens=False) for half in halves] == [ids, ids]
    del config["add_prefix_space"]
    assert json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8")) == config


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        (True, {"add_prefix_space": False}),
        (False, {"add_prefix_space": True}),
        (False, {"legacy": False}),
    ],
)
def test_settings_that_contradict_the_model_are_refused(
    prefix: bool, settings: dict[str, bool], small: Path, tmp_path: Path
) -> None:
    source = _without_fast_half(small, tmp_path / "in", add_dummy_prefix=prefix)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"a space before a text|puts no space") as caught:
        directory.read_tokenizer(source)
    assert str(source / "tokenizer_config.json") in str(caught.value)


def test_merges_of_special_tokens_are_left_out(small: Path) -> None:
    """A text that spells a special token letter by letter must not merge into it."""
    read = directory.read_tokenizer(small)
    results = {merge.replace(" ", "") for merge in read.fast["model"]["merges"]}
    assert results.isdisjoint({"<s>", "</s>", "<unk>", "<0x0A>"})
    bare = fast_tokenizer.load_bare(read.fast)
    for text in ("<s>", "</s>", "<unk>", "<0x0A>"):
        assert text not in bare.encode(text).tokens


def test_other_classes_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(DataError, match="T5Tokenizer"):
        directory.read_tokenizer(tmp_path / "in")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": 1}, "Unigram"),
        ({"remove_extra_whitespaces": True}, "rewrites the text"),
        ({"precompiled_charsmap": b"x"}, "rewrites the text"),
    ],
)
def test_other_kinds_are_refused(
    change: dict[str, Any], complaint: str, small: Path, tmp_path: Path
) -> None:
    model = read_model(small / "tokenizer.model")
    for name, value in change.items():
        spec = model.trainer_spec if name == "model_type" else model.normalizer_spec
        setattr(spec, name, value)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=complaint):
        directory.read_tokenizer(tmp_path)


def test_pieces_of_one_score_are_refused(small: Path, tmp_path: Path) -> None:
    """Defects 5 and 20: no list of merges does what SentencePiece does with equal scores."""
    source = _without_fast_half(small, tmp_path / "in")
    model = read_model(source / "tokenizer.model")
    present = {entry.piece for entry in model.pieces}
    for pair in itertools.product("abcdefgh", repeat=2):
        if "".join(pair) not in present:
            model.pieces.add(piece="".join(pair), score=0.0, type=1)
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"share their score.*extend that one"):
        directory.read_tokenizer(source)


def test_an_old_oddity_is_no_warning(small: Path, tmp_path: Path) -> None:
    """InternLM has a piece of one NUL, which SentencePiece mentions on every loading."""
    code = (
        "from pathlib import Path; from colossal_llama.tokenizer import sentencepiece_model as s;"
        f"model = s.read_model(Path({str(small / 'tokenizer.model')!r}));"
        "print(s.processor(s.append_pieces(model, ['\\0'])).vocab_size())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 701
    assert done.stderr == ""


def test_nul_is_a_byte_in_both_halves(small: Path, tmp_path: Path) -> None:
    """Even where it is a piece, as in InternLM: SentencePiece takes the byte."""
    source = _without_fast_half(small, tmp_path / "in")
    model = read_model(source / "tokenizer.model")
    model.pieces.add(piece="\0", score=-1e6, type=1)
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    read = directory.read_tokenizer(source)
    assert read.disagreements(["a\0b", "\0", "x\0\0"]) == []
    extended = extension.extend(read, ["您好"]).tokenizer
    assert extended.disagreements(["a\0您好", "\0"]) == []
