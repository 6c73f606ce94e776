"""Opening parts: every row as it was written, read where it lies, and no damaged file taken."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from colossal_llama.dataset.arrow_rows import ArrowRows
from colossal_llama.dataset.loader import VERIFICATIONS, TrainingRows, open_parts, part_directories
from colossal_llama.dataset.manifest import read_manifest
from colossal_llama.dataset.writer import ARROW_FILE
from colossal_llama.errors import DataError
from tests.dataset.made_parts import (
    CATEGORIES,
    RowData,
    plain,
    some_rows,
    write_dataset,
    write_rows,
    write_tokenizer,
)

# More than two record batches, one row, none, one batch.
PARTS = [some_rows(600, 1), some_rows(1, 2), [], some_rows(200, 3)]
VALIDATION = some_rows(50, 4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "abc")


@pytest.fixture
def output(tmp_path: Path, tokenizer: Path) -> Path:
    return write_dataset(tmp_path / "out", tokenizer, PARTS, VALIDATION)


def taken(rows: TrainingRows) -> list[tuple]:
    return plain(rows.take(range(len(rows))))


def test_every_row_is_what_was_written(output: Path, tokenizer: Path) -> None:
    rows = open_parts([output], tokenizer, 64)
    written = plain([row for part in PARTS for row in part])
    assert len(rows) == len(written) == 801
    assert taken(rows) == written
    some = np.random.default_rng(0).integers(0, len(written), 500).tolist()
    assert plain(rows.take(some)) == [written[index] for index in some]
    assert rows.take([]) == []


def test_place_of_a_row_is_where_it_lies(output: Path, tokenizer: Path) -> None:
    """A user who looks there finds it; parts without rows are nobody's place."""
    rows = open_parts([output], tokenizer, 64)
    for index in (0, 1, 255, 256, 599, 600, 601, 800):
        path, _, place = rows.where(index).rpartition(":")
        assert plain([ArrowRows(Path(path)).row(int(place))]) == plain(rows.take([index]))
    assert rows.where(601) == f"{output / 'part-00003' / ARROW_FILE}:0"


def test_categories_and_longest_row_are_those_of_what_was_opened(
    tmp_path: Path, tokenizer: Path
) -> None:
    def row(category: str, length: int) -> RowData:
        ids = np.arange(length, dtype=np.int32)
        return RowData(ids, ids, [length], category)

    parts = [[row("zh", 3)], [row("code", 9), row("zh", 2)], [row("en", 20)]]
    output = write_dataset(tmp_path / "categories", tokenizer, parts)
    for names, categories, longest in (
        (["part-00000"], ["zh"], 3),
        (["part-00001", "part-00000"], ["code", "zh"], 9),
        (["."], ["code", "en", "zh"], 20),
    ):
        rows = open_parts([output / name for name in names], tokenizer, 64)
        assert (rows.categories, rows.longest_row) == (categories, longest)


def test_rows_have_the_documented_form(output: Path, tokenizer: Path) -> None:
    (row,) = open_parts([output], tokenizer, 64).take([600])
    assert set(row) == {"input_ids", "labels", "document_lengths", "category"}
    assert isinstance(row["category"], str)
    for name in ("input_ids", "labels", "document_lengths"):
        assert row[name].dtype == np.int32
        assert row[name].ndim == 1
        assert not row[name].flags.writeable


def test_part_is_what_datasets_opens(output: Path, tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_from_disk(str(output / "part-00000"))
    assert plain(list(dataset)) == taken(open_parts([output / "part-00000"], tokenizer, 64))


def test_parts_and_datasets_are_those_of_the_paths(output: Path, tokenizer: Path) -> None:
    last = output / "part-00003"
    entries = read_manifest(output).parts
    fingerprints = [entries[f"part-0000{n}"].files[ARROW_FILE].sha256 for n in (0, 1, 3)]
    whole = open_parts([output], tokenizer, 64)
    assert (whole.datasets, whole.rows_per_part) == ([[600, 1, 200]], [600, 1, 200])
    assert whole.fingerprints == fingerprints
    first = [output / "part-00000", output / "part-00002"]
    mixed = open_parts([last, *first], tokenizer, 64)
    assert (mixed.datasets, mixed.rows_per_part) == ([[200], [600], []], [200, 600])
    assert mixed.fingerprints == [fingerprints[2], fingerprints[0]]
    assert taken(mixed) == plain([*PARTS[3], *PARTS[0]])
    with pytest.raises(DataError, match="part-00002: no part has any row"):
        open_parts(first[1:], tokenizer, 64)


def test_validation_is_opened_by_name_alone(output: Path, tokenizer: Path) -> None:
    assert [path.name for path in part_directories([output])[0]] == [
        f"part-0000{number}" for number in range(4)
    ]
    validation = open_parts([output / "validation"], tokenizer, 64, "full")
    assert taken(validation) == plain(VALIDATION)
    manifest = read_manifest(output)
    manifest.validation = None
    manifest.write(output)
    for verify in VERIFICATIONS:
        with pytest.raises(DataError, match="validation is not a part that"):
            open_parts([output / "validation"], tokenizer, 64, verify)


@pytest.mark.parametrize("verify", VERIFICATIONS)
def test_manifests_are_always_checked(output: Path, tmp_path: Path, verify: str) -> None:
    same, other = (write_tokenizer(tmp_path / name, name) for name in ("abc", "cab"))
    assert len(open_parts([output], same, 64, verify)) == 801
    with pytest.raises(DataError, match="prepared with tokenizer"):
        open_parts([output], other, 64, verify)
    with pytest.raises(DataError, match="rows of 40 tokens, --max_length is 39"):
        open_parts([output], same, 39, verify)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def cut_after_a_batch(path: Path) -> None:
    """A stream that ends between two batches is not damaged, only shorter."""
    write_rows(path.parent / "shorter", PARTS[0][:256], CATEGORIES)
    (path.parent / "shorter" / ARROW_FILE).replace(path)


def alter_a_token(path: Path) -> None:
    content, ids = path.read_bytes(), PARTS[0][77].input_ids.tobytes()
    assert content.count(ids) >= 1
    path.write_bytes(content.replace(ids, ids[:-1] + b"\1"))


def alter_the_schema(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"labels", b"Labels"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_text(path: Path) -> None:
    path.write_bytes((b"no Arrow here\n" * path.stat().st_size)[: path.stat().st_size])


SIZE, SUM = r"\d+ bytes, the manifest says \d+", r"SHA-256 \w{12}, the manifest says"


@pytest.mark.parametrize(
    ("damage", "size", "full", "off"),
    [
        (cut, SIZE, SIZE, "cannot be read as Arrow: Expected to be able to read"),
        (cut_after_a_batch, SIZE, SIZE, "256 rows, the manifest says 600"),
        (empty, SIZE, SIZE, "cannot be read as Arrow"),
        (Path.unlink, "missing", "missing", "cannot be read as Arrow: .*No such file"),
        (alter_a_token, None, SUM, None),
        (alter_the_schema, "has the columns", SUM, "has the columns"),
        (fill_with_zeros, "cannot be read as Arrow", SUM, "cannot be read as Arrow"),
        (replace_by_text, "cannot be read as Arrow", SUM, "cannot be read as Arrow"),
    ],
)
def test_damaged_files(output: Path, tokenizer: Path, damage, size, full, off) -> None:
    path = output / "part-00000" / ARROW_FILE
    damage(path)
    for verify, reason in (("size", size), ("full", full), ("off", off)):
        if reason is None:
            assert len(open_parts([output], tokenizer, 64, verify)) == 801
            continue
        with pytest.raises(DataError, match=reason) as caught:
            open_parts([output], tokenizer, 64, verify)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert len(open_parts([output / "part-00003"], tokenizer, 64, verify)) == 200


def test_every_file_is_verified(output: Path, tokenizer: Path) -> None:
    open_parts([output, output / "validation"], tokenizer, 64, "full")
    for part in ("part-00001", "part-00003", "validation"):
        path = output / part / ARROW_FILE
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{part}/{ARROW_FILE}: SHA-256"):
            open_parts([output, output / "validation"], tokenizer, 64, "full")
        path.write_bytes(content)


def test_no_damage_is_more_than_an_error(tmp_path: Path) -> None:
    """Offsets that lead out of the file, lengths that lie: followed, they end the process."""
    write_rows(tmp_path / "part", some_rows(300, 5), CATEGORIES)
    path = tmp_path / "part" / ARROW_FILE
    content = path.read_bytes()
    generator = random.Random(0)
    errors = []
    for attempt in range(300):
        damaged = bytearray(content)
        # Headers are at the beginning of the file; most of the rest is tokens.
        place = generator.randrange(2500 if attempt % 2 else len(content))
        damaged[place] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            rows = ArrowRows(path)
            for index in range(len(rows)):
                plain([rows.row(index)])
        except DataError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert all(error.startswith(f"{path}: ") and "\n" not in error for error in errors)


def add_batch(path: Path, row: RowData) -> None:
    """Writes the file again with a batch of one more row, as our writer never would."""
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        schema, batches = stream.schema, list(stream)
    columns = [pa.array([list(value)], pa.list_(pa.int32())) for value in row[:3]]
    category = batches[0].column("category").dictionary
    columns.append(pa.DictionaryArray.from_arrays(pa.array([1], pa.int32()), category))
    with pa.ipc.new_stream(path, schema) as sink:
        for batch in [*batches, pa.RecordBatch.from_arrays(columns, schema=schema)]:
            sink.write_batch(batch)


def test_columns_that_disagree(tmp_path: Path) -> None:
    ids = np.arange(5, dtype=np.int32)
    for row, reason in [
        (RowData(ids, ids[:4], [5], "en"), "5 ids, 4 labels and documents of 5 tokens"),
        (RowData(ids, ids, [2, 2], "en"), "5 ids, 5 labels and documents of 4 tokens"),
    ]:
        part = tmp_path / reason
        write_rows(part, some_rows(3), CATEGORIES)
        add_batch(part / ARROW_FILE, row)
        rows = ArrowRows(part / ARROW_FILE)
        rows.row(2)
        with pytest.raises(DataError, match=f"row 3 has {reason}"):
            rows.row(3)


def test_rows_stay_in_the_file(output: Path, tokenizer: Path) -> None:
    """Reading costs what is read: neither opening nor taking copies tokens."""
    size = (output / "part-00000" / ARROW_FILE).stat().st_size
    before = pa.total_allocated_bytes()
    rows = open_parts([output], tokenizer, 64)
    kept = rows.take(range(len(rows)))
    assert pa.total_allocated_bytes() - before < size / 10
    assert all(row["input_ids"].base is not None for row in kept)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files under /proc")
def test_parts_stay_open_without_an_open_file(tmp_path: Path, tokenizer: Path) -> None:
    """A process may have 1,024 of them, and a dataset more parts."""
    output = write_dataset(tmp_path / "many", tokenizer, [some_rows(2, seed) for seed in range(20)])
    before = len(os.listdir("/proc/self/fd"))
    rows = open_parts([output], tokenizer, 64)
    assert len(os.listdir("/proc/self/fd")) < before + 5
    assert len(taken(rows)) == 40


def test_rows_are_read_without_datasets(output: Path, tokenizer: Path) -> None:
    """Importing it, or pandas, takes longer than all the rest of a first batch."""
    code = (
        "import sys; from pathlib import Path;"
        "from colossal_llama.dataset.loader import open_parts;"
        "rows = open_parts([Path(sys.argv[1])], Path(sys.argv[2]), 64); rows.take([3]);"
        "print({'datasets', 'pandas', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, output, tokenizer], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
