"""Rules for quality: each limit to both sides of its border, and what real text they keep."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.cleaning import quality_rules as rules
from colossal_llama.dataset.cleaning.cleaner import QUALITY_RULES
from colossal_llama.dataset.cleaning.quality_rules import (
    c4,
    gopher,
    gopher_english,
    gopher_repetition,
)
from colossal_llama.dataset.cleaning.units import TextUnits

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(count, length=5, first=0):
    """Different words, e.g. aaaaa, aaaab, ..."""
    made = map("".join, itertools.product(LETTERS, repeat=length))
    return list(itertools.islice(made, first, first + count))


def prose(count):
    """Words that no rule but those of C4 minds, 20 a line."""
    found = words(count)
    return [found[start : start + 20] for start in range(0, count, 20)]


def lines(rows):
    return "\n".join(" ".join(row) for row in rows)


def with_symbols(symbol, count):
    rows = prose(100)
    for number in range(count):
        rows[number // 20][number % 20] += symbol
    return lines([*rows[:-1], rows[-1][::-1]])  # none at the end of a line


def bulleted(bullets, plain):
    rows = prose(20 * (bullets + plain))
    return lines([["• " + row[0], *row[1:]] if i < bullets else row for i, row in enumerate(rows)])


def trailing_off(count, mark):
    return "\n".join(" ".join(row) + mark * (i < count) for i, row in enumerate(prose(200)))


def mean_length(short, medium, long):
    return " ".join(words(short, 2) + words(medium, 3) + words(long, 10))


GOPHER_BORDERS = [
    ("words", lines(prose(50)), lines(prose(50))[:-6]),
    ("words", lines(prose(100_000)), lines(prose(100_001))),
    ("mean word length", mean_length(0, 100, 0), mean_length(1, 99, 0)),
    ("mean word length", mean_length(0, 0, 100), mean_length(0, 0, 99) + " " + "b" * 11),
    ("# per word", with_symbols("#", 10), with_symbols("#", 11)),
    ("ellipses per word", with_symbols("...", 10), with_symbols("...", 11)),
    ("ellipses per word", with_symbols("…", 10), with_symbols("…", 11)),
    ("lines with bullets", bulleted(9, 1), bulleted(10, 1)),
    ("lines that end with an ellipsis", trailing_off(3, "..."), trailing_off(4, " …")),
    (
        "words with a letter",
        " ".join([*words(80), *["12345"] * 20]),
        " ".join([*words(79), *["12345"] * 21]),
    ),
]


@pytest.mark.parametrize(("reason", "kept", "excluded"), GOPHER_BORDERS)
def test_gopher_border(reason, kept, excluded):
    assert gopher(TextUnits(kept)) is None
    assert gopher(TextUnits(excluded)).startswith(reason + ":")


def test_gopher_english_wants_two_different_words():
    assert gopher_english(TextUnits("The cat and a dog")) is None
    assert gopher_english(TextUnits("the cat, THE dog: the bathe ofand")).endswith("1 < 2")


def marked(parts):
    """Different lines without a unit, 100 characters each: no n-gram can be repeated in them."""
    signs = "!?;:=+*/<>"
    return [signs[i % 10] * (50 + i // 10) + signs[(i + 3) % 10] * (50 - i // 10) for i in parts]


def repeated_runs(n, limit, more):
    """A share of the words, ``limit`` or 1 % more, is in runs of n words that occur again."""
    runs = round(limit * 100) + more
    fresh = words(100 * n - runs * n)
    again = fresh[: runs * n]
    # Between two runs that are repeated, at both places, stands something that is not.
    fresh = fresh[runs * n :]
    parts = [again[i : i + n] for i in range(0, len(again), n)]
    gaps = iter(fresh)
    text = []
    for part in [*parts, *parts]:
        text += [*part, next(gaps)]
    return " ".join([*text, *gaps])


def frequent_run(n, times):
    """``times`` percent of the words are in the same run of n."""
    fresh = iter(words(100 * n, first=n))
    text = []
    for _ in range(times):
        text += [*words(n), next(fresh)]
    return " ".join([*text, *itertools.islice(fresh, 100 * n - len(text))])


REPETITION_BORDERS = [
    (
        "duplicate lines",
        "\n".join(["="] * 4 + marked(range(6))),
        "\n".join(["="] * 5 + marked(range(6))),
    ),
    (
        "characters in duplicate lines",
        "\n".join(marked([0, 0, 1, 2, 3])),
        "\n".join([*marked([0, 0, 1, 2]), marked([3])[0][:-1]]),
    ),
    (
        "duplicate paragraphs",
        "\n\n".join(["="] * 4 + ["\n".join(marked(range(9 * i, 9 * i + 9))) for i in range(6)]),
        "\n\n".join(["="] * 5 + ["\n".join(marked(range(9 * i, 9 * i + 9))) for i in range(6)]),
    ),
    ("characters in the top 2-gram", frequent_run(2, 20), frequent_run(2, 21)),
    ("characters in the top 3-gram", frequent_run(3, 18), frequent_run(3, 19)),
    ("characters in the top 4-gram", frequent_run(4, 16), frequent_run(4, 17)),
    *(
        (f"characters in duplicate {n}-grams", repeated_runs(n, most, 0), repeated_runs(n, most, 1))
        for n, most in rules.CHARACTERS_IN_DUPLICATE_NGRAMS.items()
    ),
]


@pytest.mark.parametrize(("reason", "kept", "excluded"), REPETITION_BORDERS)
def test_repetition_border(reason, kept, excluded):
    assert gopher_repetition(TextUnits(kept)) is None
    assert gopher_repetition(TextUnits(excluded)).startswith(reason + ":")


@pytest.mark.parametrize(("more", "excluded"), [(0, False), (1, True)])
def test_characters_in_duplicate_paragraphs(more, excluded):
    """Spaces inside paragraphs, which lines lose, tell this rule from that on lines."""
    others = ["\n".join(marked(range(9 * i, 9 * i + 9))) for i in range(3)]
    repeated = "=\n" + " " * (len(others[0]) - 3 + more) + "+"
    found = gopher_repetition(TextUnits("\n\n".join([repeated, repeated, *others])))
    assert bool(found) == excluded
    assert (found or "characters in duplicate paragraphs").startswith(
        "characters in duplicate paragraphs"
    )


def plain_shares(text):
    """(Share of the most frequent n-grams, of duplicate ones), counted word by word."""
    units = TextUnits(text)
    found = [units.excerpt(i, 1) for i in range(len(units.starts))]
    total = sum(map(len, found))
    shares = {}
    for n in range(2, 11):
        grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
        counts = Counter(grams)
        top = max(counts, key=lambda gram: (counts[gram], sum(map(len, gram))), default=None)
        seen, covered = set(), set()
        for place, gram in enumerate(grams):
            counted = gram == top and counts[gram] > 1 if n < 5 else gram in seen
            covered.update(range(place, place + n) if counted else ())
            seen.add(gram)
        shares[n] = sum(len(found[place]) for place in covered) / max(total, 1)
    return shares


@pytest.mark.parametrize("name", ["zh", "en", "code"])
def test_repetition_is_what_counting_word_by_word_says(corpora, name):
    limits = rules.CHARACTERS_IN_TOP_NGRAM | rules.CHARACTERS_IN_DUPLICATE_NGRAMS
    verdicts = set()
    for text in corpora[name][::12]:
        text = " ".join(text.split())  # one line: rules on lines and paragraphs do not speak
        shares = plain_shares(text)
        first = next((n for n, most in limits.items() if shares[n] > most), None)
        reason = gopher_repetition(TextUnits(text))
        kind = "the top" if (first or 0) < 5 else "duplicate"
        expected = first and f"characters in {kind} {first}-gram"
        assert (reason is None) if first is None else reason.startswith(expected)
        verdicts.add(first is None)
    assert verdicts == {True, False}


COMPLETE = "This line has enough words."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{COMPLETE}\n{COMPLETE}\n{COMPLETE}", None),
        (f"{COMPLETE} {COMPLETE} {COMPLETE}", None),
        (f"{COMPLETE}\n{COMPLETE}\nThis one does not end", "sentences"),
        (f"{COMPLETE}\n{COMPLETE}\nFour words are few.", "sentences"),
        (f"{COMPLETE}\n{COMPLETE}\nThis line trails off somehow...", "sentences"),
        (f"{COMPLETE}\n{COMPLETE}\nPlease enable JavaScript in your browser.", "sentences"),
        (f"{COMPLETE}\n{COMPLETE}\nWe care about our Privacy Policy.", "sentences"),
        (f'{COMPLETE}\n{COMPLETE}\n"He said that it was enough"', None),
        (f"{COMPLETE}\n{COMPLETE}\nThis one is from a wiki.[12]", None),
        (f"{COMPLETE}\n" * 3 + "Lorem IPSUM dolor", "holds 'lorem ipsum'"),
        (f"{COMPLETE}\n" * 3 + "if (x) {", "holds a curly bracket"),
        ("水在零度结冰。在一百度沸腾！这是谁都知道的。", None),
        ("水在零度结冰。在一百度沸腾", "sentences"),
        ("（水在零度结冰。在一百度沸腾。）（这是谁都知道的。）", None),
        ("他说：“水在零度结冰。”\n“在一百度沸腾吗？”\n这是谁都知道的……", "sentences"),
        ("他说：“水在零度结冰。”\n“在一百度沸腾吗？”\n这是谁都知道的。", None),
        ("यह एक अच्छा वाक्य है। यह एक अच्छा वाक्य है। यह एक अच्छा वाक्य है।", None),
        ("ภาษาไทยไม่มีเครื่องหมายจบประโยค", None),
        ("", "sentences"),
    ],
)
def test_c4(text, reason):
    found = c4(TextUnits(text))
    assert (found is None) if reason is None else found.startswith(reason)


def test_scripts_without_spaces_are_not_measured_in_words():
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 60)))
    assert gopher(TextUnits(han)) is None
    assert gopher(TextUnits(han[:49])).startswith("words: 49")
    assert gopher(TextUnits(han + " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17")) is None


def test_korean_has_short_words():
    rng = np.random.default_rng(0)
    syllables = ["".join(chr(c) for c in rng.integers(0xAC00, 0xD7A3, 2)) for _ in range(60)]
    assert gopher(TextUnits(" ".join(syllables))) is None
    assert gopher(TextUnits(" ".join(words(60, 2)))).startswith("mean word length")


@pytest.mark.parametrize(
    ("name", "rule", "least"),
    [
        # Much of the English is reference manuals: tables, synopses, entries that are alike.
        ("en", gopher, 0.85),
        ("en", gopher_english, 0.9),
        ("en", gopher_repetition, 0.8),
        ("zh", gopher, 0.99),
        ("zh", gopher_repetition, 0.8),
        ("zh", c4, 0.88),
    ],
)
def test_real_documents_are_kept(corpora, name, rule, least):
    kept = [rule(TextUnits(text)) is None for text in corpora[name]]
    assert least < np.mean(kept) < 1


def test_prose_is_kept_by_all_rules(corpora):
    """Documents without the braces of C4's rule, of lines that are long: not lists or tables."""
    for name, chosen in [("en", rules.RULES), ("zh", ["gopher", "gopher_repetition", "c4"])]:
        long = 60 if name == "en" else 40
        prose = [
            text
            for text in corpora[name]
            if "{" not in text and np.median([len(line) for line in text.splitlines()]) > long
        ]
        kept = [all(rules.RULES[rule](TextUnits(t)) is None for rule in chosen) for t in prose]
        assert len(prose) > 40
        assert np.mean(kept) > 0.8


def test_python_is_not_taken_for_prose(corpora):
    assert np.mean([c4(TextUnits(text)) is None for text in corpora["code"]]) < 0.3


@pytest.mark.parametrize("name", ["zh", "en"])
def test_real_documents_three_times_over_are_repetitions(corpora, name):
    assert all(gopher_repetition(TextUnits(f"{t} {t} {t}")) for t in corpora[name][:100])


@given(st.text(max_size=300) | st.text(st.sampled_from("ab .…•-\n{#中。ไ1"), max_size=400))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_has_a_verdict_and_always_the_same(text):
    for rule in rules.RULES.values():
        reason = rule(TextUnits(text))
        assert reason is None or (reason and "\n" not in reason)
        assert rule(TextUnits(text)) == reason


@pytest.mark.parametrize(
    "piece", ["!", '!"', "a", "。", "\n", "\n ", "[", "[]", "a ", "…", "ก", "- "]
)
def test_long_and_strange_documents_take_no_longer(piece):
    """Nothing takes the square of the length of a document: that would be minutes."""
    text = TextUnits("a b c d " + piece * 200_000 + "x.\nEnd.")
    start = time.perf_counter()
    for rule in rules.RULES.values():
        rule(text)
    assert time.perf_counter() - start < 5


def test_the_options_know_every_rule():
    assert tuple(rules.RULES) == QUALITY_RULES
