"""What a prepared dataset says about itself, and the check at the door of whoever opens it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, sha256_file, write_json
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint, vocabulary_size

MANIFEST_FILE = "dataset_manifest.json"
VALIDATION_PART = "validation"
SCHEMA_VERSION = 2


@dataclass
class DocumentCount:
    """What became of the input: ``input`` = ``accepted`` + ``rejected`` + ``filtered``.

    A rejected record is malformed, a filtered document was excluded by a cleaning stage.
    """

    input: int
    accepted: int
    rejected: int
    filtered: int


@dataclass
class CategoryCount:
    """Sums over one category.

    ``documents`` and ``tokens`` are those of every accepted document; ``validation_documents``
    and ``validation_tokens`` of them are in the validation part. The others were taken ``epochs``
    times (1.0 without ``--mix``), which makes ``training_tokens``. ``tokens_without_loss`` of
    those are in no row, because a row of theirs would have nothing to learn; all others are in
    exactly one of ``rows``. ``loss_tokens`` are the labels of these rows that are not -100.
    """

    documents: int = 0
    tokens: int = 0
    validation_documents: int = 0
    validation_tokens: int = 0
    epochs: float = 1.0
    training_tokens: int = 0
    tokens_without_loss: int = 0
    loss_tokens: int = 0
    rows: int = 0


@dataclass
class ArrowFile:
    """Size and SHA-256 of a file in a part."""

    bytes: int
    sha256: str


@dataclass
class Part:
    """A directory of rows: their number, tokens, longest; tokens by category; files by name."""

    rows: int
    tokens: int
    longest_row: int
    category_tokens: dict[str, int]
    files: dict[str, ArrowFile]


@dataclass
class TokenizerIdentity:
    """Which tokenizer made the ids: fingerprint and number of ids."""

    fingerprint: str
    vocabulary_size: int


@dataclass
class Manifest:
    """The content of ``dataset_manifest.json``, the file beside the parts.

    Args:
        schema_version: of this class.
        kind: "pretrain" or "sft".
        tokenizer: what made the ids; ``tokenizer_backend`` ("hf" or "gigatoken") ran it.
        max_length: longest row in tokens.
        seed: of every shuffle.
        documents: what became of the input.
        rejected: reason -> malformed records.
        filtered: cleaning stage -> excluded documents.
        notes: what was done to accepted documents ("shortened", "normalized", ...) -> how many.
        categories: by name.
        padding_share: share of padding if every row were padded to ``max_length``.
        chat_template: what formatted the conversations (sft only).
        settings: every flag on which the rows depend, and the input files with their sizes.
        parts: the training parts by name.
        validation: the part beside them that no training part shares a document with.
    """

    schema_version: int
    kind: str
    tokenizer: TokenizerIdentity
    tokenizer_backend: str
    max_length: int
    seed: int
    documents: DocumentCount
    rejected: dict[str, int]
    filtered: dict[str, int]
    notes: dict[str, int]
    categories: dict[str, CategoryCount]
    padding_share: float
    chat_template: str | None
    settings: dict[str, Any]
    parts: dict[str, Part]
    validation: Part | None = None

    def part(self, name: str) -> Part | None:
        """The part in the directory ``name``, training or validation; None if there is none."""
        return self.validation if name == VALIDATION_PART else self.parts.get(name)

    def write(self, directory: Path) -> None:
        """Writes the manifest into ``directory``, beside the parts."""
        write_json(directory / MANIFEST_FILE, dataclasses.asdict(self))


def tokenizer_identity(tokenizer_dir: Path) -> TokenizerIdentity:
    """The identity of the tokenizer in a directory.

    Raises:
        DataError: there is none.
    """
    return TokenizerIdentity(tokenizer_fingerprint(tokenizer_dir), vocabulary_size(tokenizer_dir))


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest in ``directory``.

    Raises:
        DataError: there is none, or it is not one that this version understands.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise DataError(
            f"{directory}: not a prepared dataset (no {MANIFEST_FILE}); a part is read from the "
            "directory it was prepared in"
        )
    content = read_json(path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; "
            "prepare the dataset again"
        )
    try:
        categories = {name: CategoryCount(**c) for name, c in content.pop("categories").items()}
        parts = {name: _part(part) for name, part in content.pop("parts").items()}
        validation = content.pop("validation", None)
        tokenizer = TokenizerIdentity(**content.pop("tokenizer"))
        documents = DocumentCount(**content.pop("documents"))
        return Manifest(
            **content,
            tokenizer=tokenizer,
            documents=documents,
            categories=categories,
            parts=parts,
            validation=validation and _part(validation),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a dataset manifest ({error})") from None


def check_part(part_dir: Path, tokenizer_dir: Path, *, checksums: bool = False) -> Manifest:
    """Checks that a part is whole and was made with the tokenizer of ``tokenizer_dir``.

    File sizes are always compared, the content only with ``checksums`` (it reads every byte).

    Raises:
        DataError: it is not; names both sides.
    """
    manifest = read_manifest(part_dir.parent)
    check_tokenizer(manifest, part_dir.parent, tokenizer_identity(tokenizer_dir), tokenizer_dir)
    check_files(manifest, part_dir, checksums=checksums)
    return manifest


def check_tokenizer(
    manifest: Manifest, directory: Path, tokenizer: TokenizerIdentity, tokenizer_dir: Path
) -> None:
    """Raises DataError if the dataset in ``directory`` was made with another tokenizer."""
    ours, theirs = tokenizer, manifest.tokenizer
    if ours.vocabulary_size != theirs.vocabulary_size:
        raise DataError(
            f"{directory} was prepared with a tokenizer of {theirs.vocabulary_size} ids, "
            f"{tokenizer_dir} has {ours.vocabulary_size}; prepare it again with that tokenizer"
        )
    if ours.fingerprint != theirs.fingerprint:
        raise DataError(
            f"{directory} was prepared with tokenizer {theirs.fingerprint[:12]}, "
            f"{tokenizer_dir} is {ours.fingerprint[:12]}; prepare it again with that tokenizer"
        )


def check_files(manifest: Manifest, part_dir: Path, *, checksums: bool = False) -> None:
    """Raises DataError if a file of the part is missing, cut short or (on demand) altered."""
    entry = manifest.part(part_dir.name)
    if entry is None:
        raise DataError(
            f"{part_dir} is not a part that {part_dir.parent / MANIFEST_FILE} lists: "
            f"{', '.join(manifest.parts)}"
        )
    for name, expected in entry.files.items():
        path = part_dir / name
        if not path.is_file():
            raise DataError(f"{path}: missing; the manifest lists it; prepare the dataset again")
        size = path.stat().st_size
        if size != expected.bytes:
            raise DataError(
                f"{path}: {size} bytes, the manifest says {expected.bytes}; "
                "the file is incomplete or was changed"
            )
        if checksums and (found := sha256_file(path)) != expected.sha256:
            raise DataError(
                f"{path}: SHA-256 {found[:12]}, the manifest says {expected.sha256[:12]}; "
                "the file was changed"
            )


def _part(content: dict) -> Part:
    files = {name: ArrowFile(**file) for name, file in content.pop("files").items()}
    return Part(**content, files=files)
