"""The figures of a dataset as text in rows and columns, which terminal and page both draw."""

from __future__ import annotations

from dataclasses import dataclass

from colossal_llama.dataset.inspection.figures import (
    Target,
    bins,
    bytes_on_disk,
    bytes_per_token,
    padding,
    plural,
    share,
    size,
    total,
)
from colossal_llama.dataset.manifest import CategoryCount, Part
from colossal_llama.tokenizer.analysis_format import percent, visible


@dataclass(frozen=True)
class Grid:
    """A table: the first column is a name, the others are numbers. ``note`` explains them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    last_is_total: bool = False


def heading(target: Target) -> list[tuple[str, str]]:
    """What the dataset is and what became of its input, as (name, value)."""
    manifest, documents = target.manifest, target.manifest.documents
    identity = manifest.tokenizer
    lines = [
        ("path", str(target.path)),
        ("kind", manifest.kind),
        (
            "tokenizer",
            f"{identity.fingerprint[:12]}…, {identity.vocabulary_size:,} ids, "
            f"run by {manifest.tokenizer_backend}",
        ),
        ("max_length", plural(manifest.max_length, "token")),
        ("seed", str(manifest.seed)),
    ]
    if target.whole:
        lines += [
            (
                "documents",
                f"{documents.input:,} read = {documents.accepted:,} accepted + "
                f"{documents.rejected:,} rejected + {documents.filtered:,} filtered",
            ),
            ("rejected", _reasons(manifest.rejected)),
            ("filtered", _reasons(manifest.filtered)),
            ("notes", _reasons(manifest.notes)),
            ("padding", f"{percent(manifest.padding_share)} if every row had max_length"),
        ]
    return [(name, visible(value)) for name, value in lines if value]


def grids(target: Target, most_parts: int, most_categories: int) -> list[Grid]:
    """The tables of a dataset, or of a part.

    Args:
        target: which.
        most_parts: training parts to list.
        most_categories: categories that may be columns of the parts' table.
    """
    if not target.whole:
        return [_parts(target, most_parts, len(target.manifest.categories))]
    found = [_categories(target), _parts(target, most_parts, most_categories)]
    return [*found, _bins(target)] if len(target.training_parts()) > 1 else found


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count)


def _categories(target: Target) -> Grid:
    sums = total(target.manifest)
    counts = [*target.manifest.categories.items(), ("total", sums)]
    return Grid(
        "Categories",
        [
            *("category", "documents", "tokens", "validation\ndocuments", "epochs"),
            *("training\ntokens", "share", "loss tokens", "rows", "without\nloss"),
        ],
        [_category_row(name, count, sums) for name, count in counts],
        note="share: of all training tokens. without loss: tokens in rows with nothing to learn, "
        "which are not written.",
        last_is_total=True,
    )


def _category_row(name: str, count: CategoryCount, sums: CategoryCount) -> list[str]:
    return [
        visible(name),
        f"{count.documents:,}",
        f"{count.tokens:,}",
        f"{count.validation_documents:,}",
        f"{count.epochs:.2f}",
        f"{count.training_tokens:,}",
        percent(share(count.training_tokens, sums.training_tokens)),
        f"{count.loss_tokens:,}",
        f"{count.rows:,}",
        f"{count.tokens_without_loss:,}",
    ]


def _parts(target: Target, most_parts: int, most_categories: int) -> Grid:
    training = list(target.training_parts().items())
    validation = [item for item in target.parts.items() if item not in training]
    names = list(target.manifest.categories)
    if len(names) > most_categories:
        names = []
    note = "padding: if every row had max_length."
    if len(training) > most_parts:
        note += f" {plural(len(training) - most_parts, 'more part')} not listed."
    return Grid(
        "Parts" if target.whole else "Part",
        [
            *("part", "rows", "tokens", "longest\nrow", "padding", "on disk", "bytes per\ntoken"),
            *(f"tokens of\n{visible(name)}" for name in names),
        ],
        [_part_row(*item, target, names) for item in training[:most_parts] + validation],
        note,
    )


def _part_row(name: str, part: Part, target: Target, categories: list[str]) -> list[str]:
    return [
        visible(name),
        f"{part.rows:,}",
        f"{part.tokens:,}",
        f"{part.longest_row:,}",
        percent(padding(part, target.manifest.max_length)),
        size(bytes_on_disk(part)),
        bytes_per_token(part),
        *(f"{part.category_tokens.get(category, 0):,}" for category in categories),
    ]


def _bins(target: Target) -> Grid:
    return Grid(
        "Bins",
        ["category", "fewest\ntokens", "mean", "most", "balance"],
        [
            [
                visible(found.category),
                f"{found.fewest:,}",
                f"{found.mean:,.0f}",
                f"{found.most:,}",
                "–" if found.balance is None else percent(found.balance),
            ]
            for found in bins(target)
        ],
        note="Tokens of a category in a training part. balance: the smallest bin as a share of "
        "the largest.",
    )
