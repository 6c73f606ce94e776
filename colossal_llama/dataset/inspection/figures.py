"""What is looked at, and its figures from the manifest, for the terminal and the page alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.dataset.manifest import (
    MANIFEST_FILE,
    VALIDATION_PART,
    CategoryCount,
    Manifest,
    Part,
    read_manifest,
)
from colossal_llama.errors import DataError


@dataclass(frozen=True)
class Target:
    """A prepared dataset, or one part of it.

    Args:
        path: as the user gave it.
        directory: where the manifest lies.
        manifest: its content.
        parts: the parts in question by name, the validation part last.
        whole: whether these are all parts.
    """

    path: Path
    directory: Path
    manifest: Manifest
    parts: dict[str, Part]
    whole: bool

    def training_parts(self) -> dict[str, Part]:
        """``parts`` without the validation part."""
        return {name: part for name, part in self.parts.items() if name != VALIDATION_PART}


@dataclass(frozen=True)
class Bins:
    """The bins of a category: how many of its tokens each training part has, in order."""

    category: str
    tokens: list[int]

    @property
    def fewest(self) -> int:
        return min(self.tokens)

    @property
    def most(self) -> int:
        return max(self.tokens)

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def balance(self) -> float | None:
        """The smallest bin as a share of the largest; None if all are empty."""
        return self.fewest / self.most if self.most else None


def find_target(path: Path) -> Target:
    """The dataset that ``path`` is, or the part.

    Raises:
        DataError: it is neither, or the manifest cannot be read.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such directory"
        raise DataError(f"{path}: {what}; expected a prepared dataset or a part of one")
    if (path / MANIFEST_FILE).is_file():
        manifest = read_manifest(path)
        parts = {name: manifest.parts[name] for name in sorted(manifest.parts)}
        if manifest.validation:
            parts[VALIDATION_PART] = manifest.validation
        if not parts:
            raise DataError(f"{path / MANIFEST_FILE} lists no part; prepare the dataset again")
        return Target(path, path, manifest, parts, whole=True)
    place = path.resolve()  # "." too has a parent with a manifest
    if not (place.parent / MANIFEST_FILE).is_file():
        raise DataError(
            f"{path}: no {MANIFEST_FILE} in it or beside it; give the output directory of a "
            "prepare command, or a part in it"
        )
    manifest = read_manifest(place.parent)
    part = manifest.part(place.name)
    if part is None:
        known = ", ".join([*sorted(manifest.parts)][:5])
        raise DataError(f"{path} is not a part that {place.parent / MANIFEST_FILE} lists: {known}")
    return Target(path, place.parent, manifest, {place.name: part}, whole=False)


def total(manifest: Manifest) -> CategoryCount:
    """The sums over all categories; ``epochs`` is how often a token was taken on average."""
    counts = manifest.categories.values()
    sums = {
        field.name: sum(getattr(count, field.name) for count in counts)
        for field in dataclasses.fields(CategoryCount)
    }
    taken = sums["tokens"] - sums["validation_tokens"]
    sums["epochs"] = sums["training_tokens"] / taken if taken else 1.0
    return CategoryCount(**sums)


def bins(target: Target) -> list[Bins]:
    """The bins of every category in the training parts; none where there is no such part."""
    parts = target.training_parts().values()
    if not parts:
        return []
    return [
        Bins(name, [part.category_tokens.get(name, 0) for part in parts])
        for name in target.manifest.categories
    ]


def share(part: float, whole: float) -> float:
    """``part`` of ``whole``; 0 of nothing is 0."""
    return part / whole if whole else 0.0


def padding(part: Part, max_length: int) -> float:
    """The share of padding if every row of the part were padded to ``max_length``."""
    return 1 - part.tokens / (part.rows * max_length) if part.rows else 0.0


def bytes_on_disk(part: Part) -> int:
    """The size of the part's Arrow files."""
    return sum(file.bytes for file in part.files.values())


def bytes_per_token(part: Part) -> str:
    """Bytes on disk for every token; "–" where there is none."""
    return f"{bytes_on_disk(part) / part.tokens:.2f}" if part.tokens else "–"


def size(number: float) -> str:
    """A number of bytes in the unit that keeps it readable: kB is 1,000 bytes."""
    units = ("bytes", "kB", "MB", "GB")
    for unit in units:
        if number < 1000 or unit == units[-1]:
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"


def plural(number: int, noun: str) -> str:
    """A count with its noun, in the number that fits."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
