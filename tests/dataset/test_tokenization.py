"""Documents to ids: the border of source and target, and text that looks like control tokens."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest

from colossal_llama.dataset.backend import choose_backend
from colossal_llama.dataset.cleaning.cleaner import CleaningOptions
from colossal_llama.dataset.documents import PretrainDocuments
from colossal_llama.dataset.records import PretrainRecord, text_hash
from colossal_llama.dataset.sources import divide
from colossal_llama.dataset.spool import ids_and_labels, with_loss_mask
from colossal_llama.dataset.tokenization import (
    BACKENDS,
    TextTokenizer,
    load_tokenizer,
    text_tokenizer,
)
from colossal_llama.errors import DataError

TRICKY = ["</s>", "a <s> b </s>", "<s><s></s>x", "<unk>", "plain", "\n\t <s", "龘</s>龘", "  two"]


def encode(tokenizer_dir, records, backend="hf"):
    """(ids, which carry loss) of each record."""
    kind = PretrainDocuments(
        text_tokenizer(tokenizer_dir), backend, CleaningOptions(), "text", parallel=False
    )
    batch = kind.encode(records)
    assert batch.lengths.sum() == len(batch.tokens)
    found = []
    for index, tokens in enumerate(np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])):
        ids, labels = ids_and_labels(tokens)
        assert (np.flatnonzero(labels >= 0)[0], (labels >= 0).sum()) == (
            batch.loss_start[index],
            batch.loss_tokens[index],
        )
        assert np.array_equal(labels, np.where(labels >= 0, ids, -100))
        found.append((ids.tolist(), (labels >= 0).tolist()))
    return found


def check_text_stays_text(tokenizer_dir, backend):
    tokenizer = load_tokenizer(tokenizer_dir)
    records = [PretrainRecord("", text, "c") for text in TRICKY]
    records += [PretrainRecord(text, text, "c") for text in TRICKY]
    for record, (ids, loss) in zip(records, encode(tokenizer_dir, records, backend), strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)
        if not record.source:
            assert all(loss)
            assert tokenizer.decode(ids[1:-1]) == record.target


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_tokens_in_text_stay_text(tokenizer_dir, backend):
    check_text_stays_text(tokenizer_dir, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_tokens_in_text_stay_text_with_llama2(shared_data, backend):
    check_text_stays_text(shared_data / "tokenizers" / "llama2", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_source_carries_no_loss_and_no_token_crosses_the_border(tokenizer_dir, english, backend):
    tokenizer = load_tokenizer(tokenizer_dir)
    records = []
    for index, text in enumerate(english):
        cut = len(text) // 2 if index % 3 else 0
        records.append(PretrainRecord(text[:cut], text[cut:], "c"))
    for record, (ids, loss) in zip(records, encode(tokenizer_dir, records, backend), strict=True):
        source, target = (tokenizer.encode(text, add_special_tokens=False) for text in record[:2])
        assert ids == [tokenizer.bos_token_id, *source, *target, tokenizer.eos_token_id]
        without = 1 + len(source) if record.source else 0
        assert loss == [False] * without + [True] * (len(ids) - without)


def test_loss_is_kept_by_the_sign():
    ids = np.array([0, 1, 5, 2**31 - 1], dtype=np.int32)
    loss = np.array([True, False, True, False])
    found, labels = ids_and_labels(with_loss_mask(ids, loss))
    assert found.tolist() == ids.tolist()
    assert labels.tolist() == [0, -100, 5, -100]


def test_hashes_are_the_same_on_every_machine():
    # Written down once: which documents are kept for validation depends on it.
    assert text_hash("中文") == 6508751399110960641


SETTINGS_BESIDE = [
    {},
    {"add_prefix_space": True},
    {"add_prefix_space": None},
    {"split_special_tokens": True},
    {"added_tokens_decoder": {"700": {"content": "<new>", "special": False}}},
    {"additional_special_tokens": ["<extra>"]},
    {"bos_token": {"content": "<s>", "__type": "AddedToken"}},
    {"bos_token": None},
]


@pytest.mark.parametrize("extra", SETTINGS_BESIDE, ids=str)
def test_the_shortcut_past_transformers_gives_what_transformers_gives(
    tokenizer_dir, tmp_path, extra
):
    directory = shutil.copytree(tokenizer_dir, tmp_path / "t")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | extra), encoding="utf-8")
    try:
        loaded = load_tokenizer(directory)
    except DataError as error:
        with pytest.raises(DataError, match=str(error)[-20:]):
            text_tokenizer(directory)
        return
    expected = json.loads(loaded.backend_tokenizer.to_str())
    found = text_tokenizer(directory)
    content = json.loads(found.json)
    for irrelevant in ("post_processor",):  # adds bos and eos, which we add ourselves
        expected.pop(irrelevant)
        content.pop(irrelevant)
    assert content == expected
    assert (found.bos_id, found.eos_id) == (loaded.bos_token_id, loaded.eos_token_id)


@pytest.mark.parametrize("name", ["llama2", "mistral-v1", "hammerllm-105789"])
def test_the_shortcut_with_published_tokenizers(shared_data, name):
    directory = shared_data / "tokenizers" / name
    loaded = load_tokenizer(directory)
    found = text_tokenizer(directory)
    expected = json.loads(loaded.backend_tokenizer.to_str())
    content = json.loads(found.json)
    assert {**content, "post_processor": None} == {**expected, "post_processor": None}
    assert (found.bos_id, found.eos_id) == (loaded.bos_token_id, loaded.eos_token_id)


def text_of(fields):
    return fields["target"]


def test_gigatoken_is_used_where_it_gives_the_same_ids(tokenizer_dir, write_lines, english):
    chunks = divide([write_lines([{"target": text} for text in english])])
    tokenizer = text_tokenizer(tokenizer_dir)
    for wanted in ("auto", "gigatoken"):
        backend, reason = choose_backend(wanted, tokenizer.json, chunks, text_of)
        assert backend == "gigatoken"
        assert "same ids" in reason
    assert choose_backend("hf", tokenizer.json, chunks, text_of)[0] == "hf"


def test_any_doubt_is_resolved_in_favour_of_hugging_face(
    tokenizer_dir, write_lines, english, monkeypatch
):
    """A backend that differs in one token of one document of the sample is not used."""
    from colossal_llama.dataset import backend as module

    class Wrong(module.GigatokenEncoder):
        def __call__(self, texts):
            ids, lengths = super().__call__(texts)
            ids = ids.copy()
            ids[-3] += 1
            return ids, lengths

    monkeypatch.setattr(module, "GigatokenEncoder", Wrong)
    chunks = divide([write_lines([{"target": text} for text in english])])
    tokenizer = text_tokenizer(tokenizer_dir)
    backend, reason = choose_backend("auto", tokenizer.json, chunks, text_of)
    assert backend == "hf"
    assert "other ids in 1 of" in reason
    with pytest.raises(DataError, match=r"--tokenizer_backend gigatoken: .*other ids.*; use hf"):
        choose_backend("gigatoken", tokenizer.json, chunks, text_of)


def test_a_tokenizer_that_gigatoken_does_not_take(write_lines, english):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = TextTokenizer(backend.to_str(), 0, 0)
    chunks = divide([write_lines([{"target": text} for text in english[:3]])])
    chosen, reason = choose_backend("auto", tokenizer.json, chunks, text_of)
    assert chosen == "hf"
    assert "gigatoken cannot be used" in reason


def test_a_missing_gigatoken_is_said(tokenizer_dir, write_lines, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gigatoken" else find(name)
    )
    chunks = divide([write_lines([{"target": "x"}])])
    tokenizer = text_tokenizer(tokenizer_dir)
    assert "pip install gigatoken" in choose_backend("auto", tokenizer.json, chunks, text_of)[1]
    with pytest.raises(DataError, match="not installed"):
        choose_backend("gigatoken", tokenizer.json, chunks, text_of)


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_text_with_real_tokenizers(shared_data, corpora, backend):
    """Identical ids to transformers' on every document of the shared corpora."""
    directory = shared_data / "tokenizers" / "llama2"
    tokenizer = copy.deepcopy(load_tokenizer(directory))
    tokenizer.backend_tokenizer.encode_special_tokens = True
    texts = corpora["code"][:60] + corpora["zh"][:60] + corpora["en"][:60]
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    ids, lengths = BACKENDS[backend](text_tokenizer(directory).json)(texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected


def test_unusable_tokenizers_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(DataError, match="no such tokenizer directory"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: not a tokenizer"):
        load_tokenizer(tmp_path / "empty")
    broken = shutil.copytree(tokenizer_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(DataError, match="broken: not a tokenizer"):
        load_tokenizer(broken)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_tokenizer_without_bos_or_eos_is_refused(tokenizer_dir, tmp_path, name):
    lacking = shutil.copytree(tokenizer_dir, tmp_path / "lacking")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((lacking / file).read_text(encoding="utf-8"))
        content.pop(name)
        (lacking / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=f"no {name}"):
        load_tokenizer(lacking)
