"""Cleaning of documents: options, stages in order, what they change and exclude."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.command import check_config, parse
from colossal_llama.dataset.cleaning import cleaner as cleaning
from colossal_llama.dataset.cleaning.blocklist import Blocklist
from colossal_llama.dataset.cleaning.cleaner import STAGES, CleaningOptions, build_cleaner
from colossal_llama.dataset.cleaning.normalization import NORMALIZATIONS, nfc, nfc_width
from colossal_llama.dataset.cleaning.units import TextUnits
from colossal_llama.dataset.records import PretrainRecord
from colossal_llama.errors import DataError, UsageError


@dataclass
class Options(CleaningOptions):
    """A command with the options."""

    def problems(self):
        return self.cleaning_problems()


def record(target, category="en", source=""):
    return PretrainRecord(source, target, category)


def verdict(cleaner, target, category="en", source=""):
    return cleaner(record(target, category, source))[1]


# Options


def test_flags_become_options_and_a_config():
    flags = [
        *("--normalize", "nfc_width", "--min_characters", "5", "--max_characters", "5"),
        *("--min_script_share", "zh=Han:0.5,ja=Han+Hiragana+Katakana:1"),
        *("--quality_rules", "en=gopher+c4,zh=gopher_repetition"),
        *("--blocklist_file", "words.txt", "--decontaminate_files", "a.jsonl,b.txt"),
        *("--deduplicate", "near"),
    ]
    options = parse(Options, flags)
    assert options.min_script_share == ["zh=Han:0.5", "ja=Han+Hiragana+Katakana:1"]
    assert options.quality_rules == ["en=gopher+c4", "zh=gopher_repetition"]
    assert options.decontaminate_files == [Path("a.jsonl"), Path("b.txt")]
    check_config(options)


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("min_characters", "-1", "must not be negative"),
        ("max_characters", "0", "at least 1"),
        ("max_characters", "0", "at least --min_characters"),
        ("min_script_share", "zh", "zh: expected category="),
        ("min_script_share", "=Han:0.5", "expected category="),
        ("min_script_share", "zh=Han", "such as zh=Han:0.5"),
        ("min_script_share", "zh=Hann:0.5", "'Hann' is not a Unicode script"),
        ("min_script_share", "zh=Han}|(:0.5", "is not a Unicode script"),
        ("min_script_share", "ja=Han+:0.5", "'' is not a Unicode script"),
        ("min_script_share", "zh=Han:half", "'half' is not a number"),
        ("min_script_share", "zh=Han:50", "the share 50 is not above 0 and at most 1"),
        ("min_script_share", "zh=Han:0", "not above 0"),
        ("min_script_share", "zh=Han:nan", "not above 0"),
        ("min_script_share", "zh=Han:0.5,zh=Latin:0.1", "category zh is given twice"),
        ("quality_rules", "en=gofer", "no rule 'gofer'; there are gopher, gopher_english"),
        ("quality_rules", "gopher", "gopher: expected category="),
        ("quality_rules", "en=c4,en=gopher", "category en is given twice"),
        ("normalize", "nfkc", "nfc_width"),
        ("deduplicate", "fuzzy", "near"),
    ],
)
def test_problems_of_options(flag, value, problem):
    with pytest.raises(UsageError) as caught:
        parse(Options, [f"--{flag}", value])
    assert problem in str(caught.value)
    assert flag in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_load_nothing_heavy():
    program = (
        "import sys, colossal_llama.dataset.cleaning.cleaner as c;"
        "c.CleaningOptions().cleaning_problems();"
        "sys.exit(str({'numpy', 'regex', 'rensa'} & set(sys.modules)) if "
        "{'numpy', 'regex', 'rensa'} & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_choices_are_what_there_is():
    assert tuple(NORMALIZATIONS) == cleaning.NORMALIZATIONS
    with pytest.raises(UsageError, match="negative"):
        build_cleaner(CleaningOptions(min_characters=-1))


# Stages


def test_without_options_records_pass_untouched():
    cleaner = build_cleaner(CleaningOptions())
    given_record = record("ＡＢＣ e\u0301 {")
    kept, stage = cleaner(given_record)
    assert kept is given_record
    assert (stage, cleaner.stages, cleaner.changed) == (None, [], 0)


@pytest.mark.parametrize(("least", "most"), [(5, 7), (5, None), (0, 7)])
def test_length_border(least, most):
    cleaner = build_cleaner(CleaningOptions(min_characters=least, max_characters=most))
    assert cleaner.stages == ["length"]
    for characters in range(1, 10):
        fits = least <= characters <= (most or 9)
        expected = None if fits else "length"
        assert verdict(cleaner, "é" * characters) == expected
        assert verdict(cleaner, "猫", source="猫" * (characters - 1)) == expected
        if not fits:
            assert cleaner.reason.startswith(f"characters: {characters} ")


def test_script_border():
    shares = ["zh=Han:0.5", "ja=Han+Hiragana+Katakana:0.8"]
    cleaner = build_cleaner(CleaningOptions(min_script_share=shares))
    assert cleaner.stages == ["script"]
    assert verdict(cleaner, "中文 ab, 123!", "zh") is None
    assert verdict(cleaner, "中文 abc", "zh") == "script"
    assert cleaner.reason == "letters in Han: 0.4 < 0.5"
    assert verdict(cleaner, "ひらカーa", "ja") is None
    assert verdict(cleaner, "ひら中ab", "ja") == "script"
    assert verdict(cleaner, "123 ... !", "zh") == "script"
    assert verdict(cleaner, "Latin only", "en") is None


def files(folder):
    blocklist, evaluation = folder / "words.txt", folder / "test.jsonl"
    blocklist.write_text("forbidden\n", encoding="utf-8")
    evaluation.write_text('{"q": "one two three four five six seven eight"}\n', encoding="utf-8")
    return blocklist, evaluation


def everything(folder):
    blocklist, evaluation = files(folder)
    rules = "+".join(reversed(cleaning.QUALITY_RULES))
    return CleaningOptions(
        normalize="nfc_width",
        min_characters=3,
        max_characters=100_000,
        min_script_share=["en=Latin:0.5"],
        quality_rules=[f"en={rules}", "zh=gopher_repetition"],
        blocklist_file=blocklist,
        decontaminate_files=[evaluation],
    )


def test_stages_in_order_and_the_first_that_excludes(tmp_path):
    cleaner = build_cleaner(everything(tmp_path))
    assert tuple(cleaner.stages) == STAGES
    numbers = "one two three four five six seven eight"
    for text, category, stage, reason in [
        ("ab", "en", "length", "characters: 2 < 3"),
        ("ＡＢ", "en", "length", "characters: 2 < 3"),
        ("中文 {", "en", "script", "letters in Latin: 0 < 0.5"),
        ("short {", "en", "gopher", "words: 2 not in 50-100000"),
        ("forbidden " * 60, "en", "gopher_english", "frequent English words: 0 < 2"),
        ("the of forbidden " * 60, "en", "gopher_repetition", "characters in the top 2-gram"),
        ("forbidden " * 60, "zh", "gopher_repetition", "characters in the top 2-gram"),
        ("forbidden", "zh", "blocklist", "holds 'forbidden'"),
        (f"forbidden {numbers}", "other", "blocklist", "holds 'forbidden'"),
        (numbers.upper(), "other", "contamination", f"'{numbers}' is in"),
        ("nothing to mind", "other", None, ""),
    ]:
        assert verdict(cleaner, text, category) == stage
        if stage:
            assert cleaner.reason.startswith(reason)


def test_source_is_cleaned_as_target_is(tmp_path):
    cleaner = build_cleaner(everything(tmp_path))
    assert verdict(cleaner, "text", "other", source="Forbidden!") == "blocklist"
    assert verdict(cleaner, "den text", "other", source="forbid") is None
    assert verdict(cleaner, "five six seven eight", "other", "one two three four") is not None
    kept, _ = cleaner(record("ｱ", "other", source="Ａ１ text"))
    assert kept == record("ア", "other", source="A1 text")


def test_changed_counts_documents():
    cleaner = build_cleaner(CleaningOptions(normalize="nfc"))
    for target, source in [("e\u0301", ""), ("é", ""), ("a", "e\u0301"), ("e\u0301", "e\u0301")]:
        kept, _ = cleaner(record(target, source=source))
        assert kept == record(nfc(target), source=nfc(source))
    assert cleaner.changed == 3


def test_files_are_named_when_they_cannot_be_used(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n", encoding="utf-8")
    for options, reason in [
        (CleaningOptions(blocklist_file=tmp_path / "none.txt"), r"none\.txt: No such file"),
        (CleaningOptions(blocklist_file=tmp_path / "empty.txt"), r"empty\.txt: no word in it"),
        (CleaningOptions(decontaminate_files=[tmp_path / "no.jsonl"]), r"no\.jsonl: no such file"),
        (CleaningOptions(decontaminate_files=[tmp_path / "empty.txt"]), r"empty\.txt: no text"),
    ]:
        with pytest.raises(DataError, match=reason) as caught:
            build_cleaner(options)
        assert "\n" not in str(caught.value)


@given(
    st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80), st.sampled_from(["en", "zh"])))
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_documents_and_any_worker_give_the_same(tmp_path_factory, documents):
    options = everything(tmp_path_factory.getbasetemp())
    one, other = build_cleaner(options), build_cleaner(options)
    records = [PretrainRecord(*document) for document in documents]
    results = [one(item) for item in records]
    assert list(reversed([other(item) for item in reversed(records)])) == results
    assert one.changed == other.changed
    assert one.changed == sum(
        kept != item for (kept, _), item in zip(results, records, strict=True)
    )


def test_real_documents_pass_most_stages(corpora, tmp_path):
    options = everything(tmp_path)
    options.quality_rules = ["en=gopher", "zh=gopher"]
    options.min_script_share = ["en=Latin:0.9", "zh=Han:0.2"]
    cleaner = build_cleaner(options)
    for name, least in [("en", 0.8), ("zh", 0.8)]:
        records = [PretrainRecord("", text, name) for text in corpora[name]]
        kept = [cleaner(item) for item in records]
        assert least < sum(stage is None for _, stage in kept) / len(kept) < 1
        assert all(
            nfc_width(old.target) == new.target for (new, _), old in zip(kept, records, strict=True)
        )


# Normalisation


@given(st.text() | st.text(st.characters(min_codepoint=0x3000, max_codepoint=0xFFEF)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_normalisations_are_stable_forms(text):
    assert nfc(text) == unicodedata.normalize("NFC", text)
    wide = nfc_width(text)
    assert nfc_width(wide) == wide == nfc(wide)
    assert unicodedata.normalize("NFKC", wide) == unicodedata.normalize("NFKC", text)


def test_width():
    assert nfc_width("ＡＢＣ　１２３％＠［］") == "ABC 123%@[]"
    assert nfc_width("ｶﾞｷﾞﾊﾟ｡｢ﾃｽﾄ｣ｰ") == "ガギパ。「テスト」ー"
    assert nfc_width("你好，世界！（真的吗？）：；～") == "你好，世界！（真的吗？）：；～"
    assert nfc_width("①㍻ﬁ²Å") == "①㍻ﬁ²Å"
    for code in range(0xFF01, 0xFF5F):
        assert nfc_width(chr(code)) in (chr(code), chr(code - 0xFEE0))
        assert (nfc_width(chr(code)) == chr(code)) == (chr(code) in "！（），：；？～")


# Blocklist


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A BAD word", "bad word"),
        ("such bad, WORDS", None),
        ("bad\nword", "bad word"),
        ("a badword", None),
        ("slapper", None),
        ("Slap!", "slap"),
        ("这是坏话吗", "坏话"),
        ("坏的话", None),
        ("c++ or c", "c++"),
        ("objectivec++", None),
        ("我c++你", "c++"),
        ("vitamin c", None),
        ("F**K that", "f**k"),
        ("off**k", None),
        ("f**ks", None),
        ("see 🖕🏽", "🖕"),
        ("straße", "STRASSE"),
        ("ห้ามคำหยาบเลย", "คำหยาบ"),
        ("", None),
    ],
)
def test_blocklist(tmp_path, text, found):
    path = tmp_path / "words.txt"
    phrases = ["bad  word", "slap", "", "坏话", "c++", "f**k", "🖕", "STRASSE", "คำหยาบ"]
    path.write_text("\n".join(phrases), encoding="utf-8")
    assert Blocklist(path).find(TextUnits(text)) == found


def test_blocklist_of_many_words_finds_each(tmp_path, english):
    words = sorted({word for text in english for word in text.split() if word.isalpha()})
    path = tmp_path / "words.txt"
    path.write_text("\n".join(words[::2]), encoding="utf-8")
    blocklist = Blocklist(path)
    listed = {word.casefold() for word in words[::2]}
    assert [blocklist.find(TextUnits(f"x, {word}.")) is not None for word in words] == [
        word.casefold() in listed for word in words
    ]
