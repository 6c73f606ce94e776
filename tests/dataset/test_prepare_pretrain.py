"""The command as a whole: what it writes, that it loses nothing, what it refuses."""

from __future__ import annotations

import collections
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from colossal_llama import command
from colossal_llama.dataset.loader import IGNORE_INDEX, open_parts
from colossal_llama.dataset.manifest import check_part, read_manifest
from colossal_llama.dataset.prepare_pretrain import (
    PretrainDatasetOptions,
    prepare_pretrain_dataset,
)
from colossal_llama.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "prepare_pretrain_dataset.py"


def prepare(inputs, tokenizer_dir, output, **flags) -> int:
    arguments = {
        "data_input_dirs": inputs,
        "tokenizer_dir": tokenizer_dir,
        "data_arrow_output_dir": output,
        "max_length": 256,
        **flags,
    }
    argv = [f"--{name}={value}" for name, value in arguments.items()]
    return command.run(PretrainDatasetOptions, prepare_pretrain_dataset, argv)


def tree(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def pieces_of(output: Path) -> collections.Counter:
    """How often each (category, tokens of a document's stretch in a row) is in the parts."""
    found: collections.Counter = collections.Counter()
    for part in sorted(output.glob("part-*")):
        for row in datasets.load_from_disk(str(part)):
            ends = list(itertools.accumulate(row["document_lengths"]))
            assert ends[-1] == len(row["input_ids"]) == len(row["labels"])
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                found[row["category"], tuple(row["input_ids"][start:end])] += 1
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_dir, pretrain_lines):
    directory = tmp_path_factory.mktemp("prepared")
    data = directory / "data.jsonl"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in pretrain_lines)
    data.write_text(text, encoding="utf-8")
    jsonl = directory / "jsonl"
    flags = {"num_spliced_dataset_bins": 3, "data_jsonl_output_dir": jsonl}
    assert prepare(data, tokenizer_dir, directory / "arrow", **flags) == 0
    return directory


def expected_documents(tokenizer, lines):
    """(category, ids, how many of them from the start carry no loss) of every line."""
    for line in lines:
        source, target = (
            tokenizer.encode(line[key], add_special_tokens=False) for key in ("source", "target")
        )
        ids = [tokenizer.bos_token_id, *source, *target, tokenizer.eos_token_id]
        yield line["category"], ids, 1 + len(source) if source else 0


def test_no_token_is_lost_and_none_is_doubled(prepared, tokenizer, pretrain_lines):
    """The public application loses 5 to 22 % of the tokens here."""
    counts = read_manifest(prepared / "arrow").categories
    found: collections.Counter = collections.Counter()
    for (category, piece), times in pieces_of(prepared / "arrow").items():
        found.update([(category, token) for token in piece] * times)
    expected: collections.Counter = collections.Counter()
    for category, ids, _ in expected_documents(tokenizer, pretrain_lines):
        expected.update((category, token) for token in ids)
    assert not found - expected
    missing = (expected - found).total()
    assert missing == sum(count.tokens_without_loss for count in counts.values())
    assert expected.total() == sum(count.tokens for count in counts.values())


def test_documents_run_on_from_row_to_row(prepared, tokenizer, pretrain_lines):
    """Every document is cut at a row's end or nowhere; only stretches without loss may lack."""
    pieces = pieces_of(prepared / "arrow")
    for category, ids, prefix in expected_documents(tokenizer, pretrain_lines):
        cuts = ([0, *range(first, len(ids), 256), len(ids)] for first in range(1, 257))
        assert any(
            all(
                end <= prefix or (category, tuple(ids[start:end])) in pieces
                for start, end in itertools.pairwise(stretches)
            )
            for stretches in cuts
        ), ids[:5]


def test_labels_follow_the_source(prepared, tokenizer, pretrain_lines):
    without_loss = sum(prefix for _, _, prefix in expected_documents(tokenizer, pretrain_lines))
    manifest = read_manifest(prepared / "arrow")
    masked = learned = 0
    for part in (prepared / "arrow").glob("part-*"):
        for row in datasets.load_from_disk(str(part)):
            for token, label in zip(row["input_ids"], row["labels"], strict=True):
                assert label in (token, IGNORE_INDEX)
                masked += label == IGNORE_INDEX
                learned += label != IGNORE_INDEX
            assert any(label != IGNORE_INDEX for label in row["labels"][1:])
    counts = manifest.categories.values()
    assert learned == sum(count.loss_tokens for count in counts)
    assert 0 <= without_loss - masked <= sum(count.tokens_without_loss for count in counts)


def test_every_bucket_has_every_category_in_shuffled_rows(prepared):
    for part in (prepared / "arrow").glob("part-*"):
        categories = datasets.load_from_disk(str(part))["category"]
        assert set(categories) == {"en", "zh"}
        assert list(categories) != sorted(categories)


def test_parts_are_as_the_contract_says(prepared):
    for part in (prepared / "arrow").glob("part-*"):
        dataset = datasets.load_from_disk(str(part))
        kinds = {name: str(field) for name, field in dataset.features.items()}
        assert kinds == {
            "input_ids": "List(Value('int32'))",
            "labels": "List(Value('int32'))",
            "document_lengths": "List(Value('int32'))",
            "category": "Value('string')",
        }
        lines = (prepared / "jsonl" / f"{part.name}.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line) for line in lines.splitlines()] == list(dataset)


def test_manifest_tells_the_truth(prepared, tokenizer_dir, pretrain_lines):
    manifest = read_manifest(prepared / "arrow")
    assert (manifest.kind, manifest.max_length, manifest.seed) == ("pretrain", 256, 42)
    for name, count in manifest.categories.items():
        assert count.documents == sum(line["category"] == name for line in pretrain_lines)
    rows = open_parts([prepared / "arrow"], tokenizer_dir, 256)
    assert len(rows) == sum(count.rows for count in manifest.categories.values())
    sizes = [len(row["input_ids"]) for row in rows.take(range(len(rows)))]
    assert manifest.padding_share == pytest.approx(1 - sum(sizes) / 256 / len(sizes), abs=1e-6)
    assert sum(part.tokens for part in manifest.parts.values()) == sum(sizes)


@pytest.mark.parametrize("num_bins", [1, 3, 30])
def test_four_documents_make_any_number_of_parts(
    tmp_path, tokenizer_dir, write_lines, num_bins, capsys
):
    """The public application gives 25 parts for 30, and crashes with four documents."""
    texts = ["one", "two words", "three words here", "long " * 300]
    data = write_lines([{"source": "", "target": text, "category": "c"} for text in texts])
    output = tmp_path / "out"
    assert prepare(data, tokenizer_dir, output, num_spliced_dataset_bins=num_bins) == 0
    parts = sorted(path.name for path in output.glob("part-*"))
    assert parts == [f"part-{number:05d}" for number in range(num_bins)]
    sizes = [len(datasets.load_from_disk(str(output / part))) for part in parts]
    assert sum(size > 0 for size in sizes) == min(num_bins, 4)
    assert len(open_parts([output], tokenizer_dir, 256)) == sum(sizes)
    assert f"{num_bins} part{'s' if num_bins > 1 else ''} in" in capsys.readouterr().out


def test_rows_without_loss_are_counted_not_written(tmp_path, tokenizer_dir, write_lines):
    data = write_lines([{"source": "word " * 1000, "target": "end", "category": "c"}])
    output = tmp_path / "out"
    assert prepare(data, tokenizer_dir, output, num_spliced_dataset_bins=1) == 0
    (count,) = read_manifest(output).categories.values()
    (row,) = datasets.load_from_disk(str(output / "part-00000"))
    assert count.rows == 1
    assert count.tokens_without_loss == count.tokens - len(row["input_ids"]) > 256


def test_a_row_of_one_token_is_not_written(tmp_path, tokenizer, tokenizer_dir, write_lines):
    """Its only label is never used: the mean loss over it would be NaN."""
    text = "one two three four five six seven"
    length = 2 + len(tokenizer.encode(text, add_special_tokens=False))
    data = write_lines([{"source": "", "target": text, "category": "c"}])
    flags = {"num_spliced_dataset_bins": 1, "max_length": length - 1}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    (count,) = read_manifest(tmp_path / "out").categories.values()
    assert (count.rows, count.tokens, count.tokens_without_loss) == (1, length, 1)


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_same_bytes_for_any_number_of_threads(prepared, tmp_path, tokenizer_dir):
    """``prepared`` was made with as many threads as there are cores, in this process."""
    flags = ["--data_input_dirs", prepared / "data.jsonl", "--tokenizer_dir", tokenizer_dir]
    flags += ["--data_arrow_output_dir", tmp_path / "out", "--max_length", 256]
    flags += ["--num_spliced_dataset_bins", 3, "--data_cache_dir", tmp_path / "cache"]
    done = run_script(*flags, RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(prepared / "arrow")
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_line_ends_the_process_with_one_line_and_leaves_nothing(
    tmp_path, tokenizer_dir, write_lines
):
    good = {"source": "", "target": "text", "category": "c"}
    data = write_lines([good, good, {"source": "", "target": 1, "category": "c"}], "in/d.jsonl")
    flags = ["--data_input_dirs", data.parent, "--tokenizer_dir", tokenizer_dir]
    flags += ["--data_arrow_output_dir", tmp_path / "arrow", "--data_cache_dir", tmp_path / "cache"]
    done = run_script(*flags, "--data_jsonl_output_dir", tmp_path / "jsonl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {data}:3: target must be a string, found int\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in"]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"max_length": 1}, "--max_length must be at least 2"),
        ({"num_spliced_dataset_bins": 0}, "--num_spliced_dataset_bins must be between"),
        ({"data_input_dirs": ","}, "--data_input_dirs names nothing"),
        ({"data_input_dirs": "/nowhere"}, "/nowhere: no such file"),
        ({"tokenizer_dir": "/nowhere"}, "/nowhere: no such tokenizer"),
        ({"data_arrow_output_dir": "IN"}, "--data_input_dirs IN/d.jsonl is or lies in"),
        ({"data_jsonl_output_dir": "OUT/jsonl"}, "OUT/jsonl is or lies in --data_arrow"),
        ({"data_cache_dir": "OUT"}, "--data_cache_dir OUT is or lies in"),
    ],
)
def test_unusable_flags(tmp_path, tokenizer_dir, write_lines, capsys, flags, reason):
    data = write_lines([{"source": "", "target": "text", "category": "c"}], "in/d.jsonl")
    places = {"IN": str(data.parent), "OUT": str(tmp_path / "out")}

    def filled(text):
        for name, path in places.items():
            text = text.replace(name, path) if isinstance(text, str) else text
        return text

    settings = {"data_input_dirs": data, "tokenizer_dir": tokenizer_dir}
    settings |= {"data_arrow_output_dir": tmp_path / "out"}
    settings |= {name: filled(value) for name, value in flags.items()}
    argv = [f"--{name}={value}" for name, value in settings.items()]
    assert command.run(PretrainDatasetOptions, prepare_pretrain_dataset, argv) == 2
    printed = capsys.readouterr().err
    assert filled(reason) in printed
    assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert data.is_file()


def test_nothing_is_overwritten_unasked(tmp_path, tokenizer_dir, write_lines, capsys):
    data = write_lines([{"source": "", "target": "text", "category": "c"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine", encoding="utf-8")
    assert prepare(data, tokenizer_dir, tmp_path / "out") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").read_text(encoding="utf-8") == "mine"
    assert prepare(data, tokenizer_dir, tmp_path / "out", overwrite=True) == 0
    assert not (tmp_path / "out" / "precious").exists()
    assert check_part(tmp_path / "out" / "part-00000", tokenizer_dir, checksums=True)


def test_no_document_at_all(tmp_path, tokenizer_dir, write_lines, capsys):
    assert prepare(write_lines([""]), tokenizer_dir, tmp_path / "out") == 2
    assert "no document" in capsys.readouterr().err
    with pytest.raises(DataError):
        read_manifest(tmp_path / "out")
