"""Records: what is accepted, and how a bad one is described."""

from __future__ import annotations

import json

import pytest

from colossal_llama.dataset.records import PretrainRecord, pretrain_record, pretrain_records
from colossal_llama.errors import DataError, RecordError

GOOD = {"source": "", "target": "text", "category": "en"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"source": "", "category": "en"}, "missing key target"),
        ({"target": "t", "category": "en"}, "missing key source"),
        ({"source": "", "target": "t"}, "missing key category"),
        ({**GOOD, "target": 3}, "target must be a string, found int"),
        ({**GOOD, "category": ["en"]}, "category must be a string, found list"),
        ({**GOOD, "category": ""}, "category is empty"),
        ({**GOOD, "target": " \n"}, "target is empty"),
        ({**GOOD, "target": None}, "missing key target"),
        ({**GOOD, "target": "a\0b"}, "target holds NUL"),
        ({**GOOD, "source": json.loads('"\\ud800"')}, "source holds half of a surrogate"),
        ({"text": 5}, "text must be a string, found int"),
        ({"text": "x", "category": 5}, "category must be a string"),
        ({}, "missing key target"),
    ],
)
def test_what_is_wrong_is_said(fields, reason):
    with pytest.raises(RecordError, match=reason):
        pretrain_record(fields)


def test_documents_and_plain_texts():
    record = pretrain_record({"source": "Q", "target": "A", "category": "c", "id": 7})
    assert record == PretrainRecord("Q", "A", "c")
    assert pretrain_record({"text": "T"}, "web") == PretrainRecord("", "T", "web")
    assert pretrain_record({"text": "T", "category": "c"}) == PretrainRecord("", "T", "c")
    both = {"text": "T", **GOOD}
    assert pretrain_record(both) == PretrainRecord("", "text", "en")


def test_strict_reading_names_file_and_line(write_lines):
    path = write_lines([GOOD, "", {**GOOD, "target": ""}, GOOD])
    with pytest.raises(DataError) as caught:
        list(pretrain_records([path]))
    assert str(caught.value) == f"{path}:3: target is empty"
    assert list(pretrain_records([write_lines([GOOD])])) == [PretrainRecord("", "text", "en")]
