"""The table that a command prints when a dataset is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from colossal_llama.dataset.manifest import CategoryCount, Manifest

_NOTES = {
    "shortened": "conversations shortened to --max_length",
    "unanswered": "messages at the end of conversations that nobody answers, left out",
    "empty_turns": "empty turns left out",
    "normalized": "documents changed by normalisation",
}


def summary(manifest: Manifest, output: Path) -> str:
    """What became of the input, category by category."""
    lines = [
        f"{'category':<16}{'documents':>12}{'tokens':>16}{'loss tokens':>16}"
        f"{'rows':>10}{'tokens/row':>12}"
    ]
    total = CategoryCount()
    for name, count in manifest.categories.items():
        lines.append(_row(name, count))
        for field in dataclasses.fields(total):
            value = getattr(total, field.name) + getattr(count, field.name)
            setattr(total, field.name, value)
    lines += [_row("total", total), *_remarks(manifest, total)]
    lines.append(f"{_count('part', len(manifest.parts))} in {output}")
    return "\n".join(lines)


def _row(name: str, count: CategoryCount) -> str:
    written = count.training_tokens - count.tokens_without_loss
    return (
        f"{name:<16}{count.documents:>12,}{count.tokens:>16,}{count.loss_tokens:>16,}"
        f"{count.rows:>10,}{written / max(count.rows, 1):>12,.1f}"
    )


def _remarks(manifest: Manifest, total: CategoryCount) -> list[str]:
    found = [f"padding in rows of {manifest.max_length}: {manifest.padding_share:.2%}"]
    if total.validation_documents:
        found.append(
            f"validation: {_count('document', total.validation_documents)}, "
            f"{total.validation_tokens:,} tokens"
        )
    if manifest.settings.get("mix"):
        written = sum(part.tokens for part in manifest.parts.values())
        for name, count in manifest.categories.items():
            share = (count.training_tokens - count.tokens_without_loss) / max(1, written)
            often = " (over four times gains little)" if count.epochs > 4 else ""
            found.append(f"mix: {name} {share:.1%}, taken {count.epochs:.2f} times{often}")
    if total.tokens_without_loss:
        found.append(f"{total.tokens_without_loss:,} tokens are in rows without loss: not written")
    if manifest.documents.rejected:
        rejected = _count("malformed record", manifest.documents.rejected)
        found.append(f"{rejected} left out, see rejected.jsonl")
    for stage, number in manifest.filtered.items():
        if number:
            found.append(f"{_count('document', number)} excluded, see excluded/{stage}.jsonl")
    return found + [
        f"{number:,} {_NOTES.get(name, name)}" for name, number in manifest.notes.items() if number
    ]


def _count(noun: str, number: int) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
