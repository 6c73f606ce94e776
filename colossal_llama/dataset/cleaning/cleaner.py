"""Changes and excludes documents before they are tokenised: the options, and what applies them.

A document goes through the stages in the order of ``STAGES`` until one excludes it:

    cleaner = build_cleaner(options)
    record, stage = cleaner(record)     # stage: None, or what excludes it; cleaner.reason: why

Nothing depends on other documents, so that any worker may clean any document. Duplicates, which
do depend on them, are found in ``near_duplicates``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from colossal_llama.command import option
from colossal_llama.dataset.records import PretrainRecord
from colossal_llama.errors import UsageError
from colossal_llama.storage import find_files
from colossal_llama.tokenizer.unicode_scripts import is_script

if TYPE_CHECKING:
    from colossal_llama.dataset.cleaning.units import TextUnits

NORMALIZATIONS = ("none", "nfc", "nfc_width")
DEDUPLICATIONS = ("none", "exact", "near")
QUALITY_RULES = ("gopher", "gopher_english", "gopher_repetition", "c4")
STAGES = ("length", "script", *QUALITY_RULES, "blocklist", "contamination")

Value = TypeVar("Value")

# A stage: why it excludes a document, or None.
Check = Callable[[PretrainRecord, "TextUnits"], str | None]


@dataclass
class CleaningOptions:
    """Which documents are left out, and how text is changed; by default none and not at all."""

    normalize: str = option(
        "none",
        choices=NORMALIZATIONS,
        help="nfc: one spelling of accented letters; nfc_width: also full-width letters, digits "
        "and symbols as ASCII and half-width katakana as full-width",
    )
    min_characters: int = option(0, help="leave out documents with fewer characters")
    max_characters: int | None = option(None, help="leave out documents with more characters")
    min_script_share: list[str] = option(
        [],
        comma=True,
        help="leave out documents of a category in which a smaller share of the letters is in "
        "its scripts, such as zh=Han:0.5,ja=Han+Hiragana+Katakana:0.5",
    )
    quality_rules: list[str] = option(
        [],
        comma=True,
        help="rules for documents of a category, such as "
        f"en=gopher+gopher_english+c4,zh=gopher_repetition; there are {', '.join(QUALITY_RULES)}",
    )
    blocklist_file: Path | None = option(
        None, help="leave out documents with a word or phrase of this file, which has one a line"
    )
    decontaminate_files: list[Path] = option(
        [],
        comma=True,
        help="leave out documents that share 13 words in a row with these evaluation files "
        "(.jsonl, .jsonl.gz, .txt, or directories of them)",
    )
    deduplicate: str = option(
        "none",
        choices=DEDUPLICATIONS,
        help="keep the first of documents that are equal (exact), or of near-duplicates by "
        "MinHash (near)",
    )

    def cleaning_problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if self.min_characters < 0:
            found.append("--min_characters must not be negative")
        if self.max_characters is not None and self.max_characters < max(self.min_characters, 1):
            found.append("--max_characters must be at least 1 and at least --min_characters")
        found += _table(self.min_script_share, "--min_script_share", _script_share)[1]
        return found + _table(self.quality_rules, "--quality_rules", _rule_names)[1]

    def cleaning_files(self) -> list[Path]:
        """The files that stages read.

        Raises:
            DataError: one is missing.
        """
        from colossal_llama.dataset.cleaning.decontamination import EVALUATION_SUFFIXES

        files = [self.blocklist_file] if self.blocklist_file else []
        return files + find_files(self.decontaminate_files, EVALUATION_SUFFIXES)


class Cleaner:
    """Applies the stages to documents.

    Attributes:
        stages: the stages that can exclude a document, in order; names of ``STAGES``.
        changed: how many documents normalisation altered so far.
        reason: why the last document that was excluded was.
    """

    def __init__(
        self, normalize: Callable[[str], str] | None, checks: list[tuple[str, Check]]
    ) -> None:
        self._normalize = normalize
        self._checks = checks
        self.stages = [name for name, _ in checks]
        self.changed = 0
        self.reason = ""

    def __call__(self, record: PretrainRecord) -> tuple[PretrainRecord, str | None]:
        """The record, normalised, and the stage that excludes it, or None if it is kept."""
        if self._normalize:
            source, target = self._normalize(record.source), self._normalize(record.target)
            if source != record.source or target != record.target:
                self.changed += 1
                record = PretrainRecord(source, target, record.category)
        if not self._checks:
            return record, None
        text = _text(record)
        for stage, check in self._checks:
            reason = check(record, text)
            if reason is not None:
                self.reason = reason
                return record, stage
        return record, None


def build_cleaner(options: CleaningOptions) -> Cleaner:
    """The cleaner for some options, whose files it reads.

    Raises:
        UsageError: the options have problems.
        DataError: a file cannot be read or holds nothing to look for.
    """
    from colossal_llama.dataset.cleaning import normalization

    problems = options.cleaning_problems()
    if problems:
        raise UsageError(problems)
    checks: list[tuple[str, Check]] = []
    if options.min_characters > 0 or options.max_characters is not None:
        checks.append(("length", _length_check(options.min_characters, options.max_characters)))
    shares, _ = _table(options.min_script_share, "--min_script_share", _script_share)
    if shares:
        checks.append(("script", _script_check(shares)))
    rules, _ = _table(options.quality_rules, "--quality_rules", _rule_names)
    checks += [
        (name, _quality_check(name, categories))
        for name in QUALITY_RULES
        if (categories := {category for category, names in rules.items() if name in names})
    ]
    if options.blocklist_file is not None:
        checks.append(("blocklist", _blocklist_check(options.blocklist_file)))
    if options.decontaminate_files:
        checks.append(("contamination", _contamination_check(options.decontaminate_files)))
    return Cleaner(normalization.NORMALIZATIONS[options.normalize], checks)


def _text(record: PretrainRecord) -> TextUnits:
    """Source and target as one text; a line break keeps the words at the border apart."""
    from colossal_llama.dataset.cleaning.units import TextUnits

    return TextUnits(f"{record.source}\n{record.target}" if record.source else record.target)


def _length_check(least: int, most: int | None) -> Check:
    def check(record: PretrainRecord, text: TextUnits) -> str | None:
        characters = len(record.source) + len(record.target)
        if characters < least:
            return f"characters: {characters} < {least}"
        if most is not None and characters > most:
            return f"characters: {characters} > {most}"
        return None

    return check


def _script_check(shares: dict[str, tuple[tuple[str, ...], float]]) -> Check:
    from colossal_llama.dataset.cleaning.units import script_table

    def check(record: PretrainRecord, text: TextUnits) -> str | None:
        if record.category not in shares:
            return None
        scripts, least = shares[record.category]
        inside = int(script_table(scripts)[text.codes].sum())
        share = inside / text.letters if text.letters else 0.0
        if share < least:
            return f"letters in {'+'.join(scripts)}: {share:.3g} < {least}"
        return None

    return check


def _quality_check(name: str, categories: set[str]) -> Check:
    from colossal_llama.dataset.cleaning.quality_rules import RULES

    rule = RULES[name]
    return lambda record, text: rule(text) if record.category in categories else None


def _blocklist_check(path: Path) -> Check:
    from colossal_llama.dataset.cleaning.blocklist import Blocklist

    blocklist = Blocklist(path)

    def check(record: PretrainRecord, text: TextUnits) -> str | None:
        phrase = blocklist.find(text)
        return phrase and f"holds {phrase!r}"

    return check


def _contamination_check(paths: list[Path]) -> Check:
    from colossal_llama.dataset.cleaning.decontamination import EvaluationTexts

    texts = EvaluationTexts(paths)
    return lambda record, text: texts.find(text)


def _table(
    items: list[str], flag: str, parse: Callable[[str], Value]
) -> tuple[dict[str, Value], list[str]]:
    """(Category -> value, problems) of items such as ``zh=Han:0.5``."""
    values: dict[str, Value] = {}
    problems = []
    for item in items:
        category, _, value = item.partition("=")
        try:
            if not category or not value:
                raise ValueError("expected category=..., see --help")
            if category in values:
                raise ValueError(f"category {category} is given twice")
            values[category] = parse(value)
        except ValueError as error:
            problems.append(f"{flag} {item}: {error}")
    return values, problems


def _script_share(value: str) -> tuple[tuple[str, ...], float]:
    """``Han+Hiragana:0.5`` as (scripts, smallest share).

    Raises:
        ValueError: it is something else; says what.
    """
    names, colon, number = value.rpartition(":")
    if not colon:
        raise ValueError("expected category=Script:share, such as zh=Han:0.5")
    scripts = tuple(names.split("+"))
    for name in scripts:
        if not re.fullmatch("[A-Za-z_]+", name) or not is_script(name):
            raise ValueError(f"{name!r} is not a Unicode script such as Han or Cyrillic")
    try:
        share = float(number)
    except ValueError:
        raise ValueError(f"{number!r} is not a number") from None
    if not 0 < share <= 1:
        raise ValueError(f"the share {number} is not above 0 and at most 1")
    return scripts, share


def _rule_names(value: str) -> list[str]:
    """``gopher+c4`` as the names of rules.

    Raises:
        ValueError: there is no such rule; says which there are.
    """
    names = value.split("+")
    unknown = [name for name in names if name not in QUALITY_RULES]
    if unknown:
        raise ValueError(f"no rule {unknown[0]!r}; there are {', '.join(QUALITY_RULES)}")
    return names
