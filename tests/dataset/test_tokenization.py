"""Documents to ids: the border of source and target, and text that looks like control tokens."""

from __future__ import annotations

import json
import shutil

import pytest

from colossal_llama.dataset.records import PretrainRecord
from colossal_llama.dataset.tokenization import load_tokenizer, tokenize_documents
from colossal_llama.errors import DataError

TRICKY = ["</s>", "a <s> b </s>", "<s><s></s>x", "<unk>", "plain", "\n\t <s", "龘</s>龘", "  two"]


def check_text_stays_text(tokenizer):
    for text in TRICKY:
        records = [PretrainRecord("", text, "c"), PretrainRecord(text, text, "c")]
        for document in tokenize_documents(tokenizer, records):
            ids = document.input_ids.tolist()
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)
            if document.loss[0]:  # no source
                assert tokenizer.decode(ids[1:-1]) == text


def test_special_tokens_in_text_stay_text(tokenizer):
    check_text_stays_text(tokenizer)


def test_special_tokens_in_text_stay_text_with_llama2(shared_data):
    check_text_stays_text(load_tokenizer(shared_data / "tokenizers" / "llama2"))


def test_callers_tokenizer_is_left_as_it_was(tokenizer):
    list(tokenize_documents(tokenizer, [PretrainRecord("", "</s>", "c")]))
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]


def test_source_carries_no_loss_and_no_token_crosses_the_border(tokenizer, english):
    for text in english[:20]:
        cut = len(text) // 2
        record = PretrainRecord(text[:cut], text[cut:], "c")
        (document,) = tokenize_documents(tokenizer, [record])
        learned = document.input_ids[document.loss]
        context = document.input_ids[~document.loss]
        assert document.loss.tolist() == sorted(document.loss.tolist())
        assert tokenizer.decode(context[1:]) == text[:cut]
        assert tokenizer.decode(learned[:-1]) == text[cut:]


def test_ordinary_text_is_what_the_tokenizer_says(tokenizer, english):
    records = [PretrainRecord("", text, "c") for text in english]
    for text, document in zip(english, tokenize_documents(tokenizer, records), strict=True):
        assert document.input_ids[1:-1].tolist() == tokenizer.encode(text, add_special_tokens=False)
        assert document.loss.all()


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
