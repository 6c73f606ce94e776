"""Reading: whatever the format and however files are cut, the same records at the same lines."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset import sources
from colossal_llama.dataset.sources import Chunk, ChunkReader, divide, input_files
from colossal_llama.errors import DataError, RecordError

GOOD = {"source": "", "target": "text 中文", "category": "en"}


def records(path: Path, **settings) -> list:
    """(line, fields or the reason) of a whole file."""
    return [
        (line, str(fields) if isinstance(fields, RecordError) else fields)
        for line, fields in ChunkReader(Chunk(0, path), **settings)
    ]


def compress(content: bytes, path: Path) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        path.write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_in_every_packing(tmp_path, suffix):
    content = (json.dumps(GOOD, ensure_ascii=False) + "\n\n" + json.dumps(GOOD)).encode()
    path = compress(b"\xef\xbb\xbf" + content, tmp_path / f"a.jsonl{suffix}")
    assert records(path) == [(1, GOOD), (3, GOOD)]


def test_several_frames_of_zstd_and_gzip(tmp_path):
    line = json.dumps(GOOD).encode() + b"\n"
    gz, zst = tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"
    gz.write_bytes(gzip.compress(line) * 3)
    zst.write_bytes(pa.Codec("zstd").compress(line, asbytes=True) * 3)
    assert [line for line, _ in records(gz)] == [line for line, _ in records(zst)] == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_packed_file_that_is_cut_short_is_an_error(tmp_path, suffix, keep):
    line = json.dumps(GOOD).encode() + b"\n"
    whole = compress(
        b"".join(line.replace(b"text", str(n).encode()) for n in range(5000)),
        tmp_path / f"a.jsonl{suffix}",
    )
    whole.write_bytes(whole.read_bytes()[: max(3, int(whole.stat().st_size * keep))])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}:\d+: the compressed stream"):
        records(whole)


def test_what_is_not_packed_is_an_error_too(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b'{"text": "not packed"}\n' * 10)
        with pytest.raises(DataError, match="compressed stream is broken"):
            records(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'{"text": "half a li', "not JSON: Unterminated string"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"text": "\xe4\xb8"}', "not UTF-8 text"),
        (b'{"text": "a\0b"}', "NUL bytes"),
        (b"\0" * 100, "NUL bytes"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_bad_lines_are_records_of_their_own(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode())
    (first, _), (second, error), (third, _) = ChunkReader(Chunk(0, path))
    assert (first, second, third) == (1, 2, 3)
    assert isinstance(error, RecordError)
    assert reason in str(error)
    assert error.text == line[:400].decode("utf-8", "replace").strip()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_endless_line_is_passed_over(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    good = json.dumps(GOOD).encode() + b"\n"
    long = b'{"text": "' + b"a" * (5 << 20) + b'"}\n'
    path = compress(good + long + good, tmp_path / f"a.jsonl{suffix}")
    assert records(path) == [(1, GOOD), (2, "longer than 16 MiB"), (3, GOOD)]


def test_texts_are_lines_or_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\r\n\nsecond\n", encoding="utf-8")
    assert records(path) == [(1, {"text": "first"}), (3, {"text": "second"})]
    assert records(path, whole_texts=True) == [(1, {"text": "first\r\n\nsecond"})]
    assert divide([path], whole_texts=True)[0].stop is None


def test_parquet_rows(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"t{n}", "category": None if n % 2 else "c", "more": [n]} for n in range(10)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    expected = [
        (n + 1, {k: v for k, v in row.items() if v is not None and k != "more"})
        for n, row in enumerate(rows)
    ]
    assert records(path) == expected
    chunks = [Chunk(0, path, start, start + 2) for start in (0, 2)]
    assert [f for chunk in chunks for _, f in ChunkReader(chunk)] == [f for _, f in expected]
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1)
    assert {fields for _, fields in records(path)} == {"longer than 16 MiB"}
    path.write_bytes(path.read_bytes()[:-20])
    for read in (lambda: records(path), lambda: divide([path])):
        with pytest.raises(DataError, match="not a Parquet file"):
            read()


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30),
    size=st.integers(1, 100),
    ends_with_newline=st.booleans(),
)
def test_any_cut_gives_the_same_records(tmp_path_factory, lines, size, ends_with_newline):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    content = "\n".join(json.dumps({"text": text}) if text else "" for text in lines)
    path.write_text(content + "\n" * ends_with_newline, encoding="utf-8")
    whole = ChunkReader(Chunk(0, path))
    expected = [fields for _, fields in whole]
    found, lines_read = [], []
    for start in range(0, path.stat().st_size, size):
        reader = ChunkReader(Chunk(0, path, start, min(start + size, path.stat().st_size)))
        before = sum(lines_read)
        found += [(before + line, fields) for line, fields in reader]
        lines_read.append(reader.lines)
    assert [fields for _, fields in found] == expected
    assert [line for line, _ in found] == [line for line, _ in ChunkReader(Chunk(0, path))]
    assert sum(lines_read) == whole.lines


def test_chunks_cover_files_once_and_follow_from_their_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_CHUNK", 1000)
    paths = []
    for number, size in enumerate([0, 1, 999, 1000, 1001, 5500]):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_bytes(b"x" * size)
    chunks = divide(paths)
    for number, path in enumerate(paths):
        own = [(chunk.start, chunk.stop) for chunk in chunks if chunk.file == number]
        edges = [0, *(stop for _, stop in own)]
        assert own == list(itertools.pairwise(edges))
        assert edges[-1] == path.stat().st_size
    assert divide([compress(b"x" * 9999, tmp_path / "a.jsonl.gz")])[0].stop is None


def test_directories_are_read_in_sorted_order(write_lines, tmp_path):
    names = ["b.jsonl", "a.jsonl", "aa.jsonl.gz", "c.parquet", "d.txt", "notes.md", "below/c.jsonl"]
    for name in [*(f"d/{name}" for name in names), "e.jsonl"]:
        write_lines([GOOD], name)
    files = input_files([tmp_path / "e.jsonl", tmp_path / "d"])
    assert [file.name for file in files] == [
        *("e.jsonl", "a.jsonl", "aa.jsonl.gz", "b.jsonl", "c.parquet", "d.txt"),
    ]


def test_missing_empty_and_double_inputs(write_lines, tmp_path):
    path = write_lines([GOOD], "d/a.jsonl")
    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, reason in [
        ([Path("/nowhere")], "no such file"),
        ([empty], "no .jsonl"),
        ([tmp_path / "d", path], "given twice"),
    ]:
        with pytest.raises(DataError, match=reason):
            input_files(paths)
