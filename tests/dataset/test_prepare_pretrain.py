"""The command as a whole: what it writes, that it loses nothing, what it refuses."""

from __future__ import annotations

import collections
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from colossal_llama import command
from colossal_llama.dataset.loader import open_parts
from colossal_llama.dataset.manifest import check_part, read_manifest
from colossal_llama.dataset.prepare_pretrain import (
    PretrainDatasetOptions,
    prepare_pretrain_dataset,
)
from colossal_llama.dataset.writer import IGNORE_INDEX
from colossal_llama.errors import DataError
from tests.dataset.preparing import (
    leftovers,
    prepare,
    stretches_of,
    tokens_of,
    training_parts,
    tree,
)

GOOD = {"source": "", "target": "text", "category": "c"}


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


@pytest.mark.parametrize("packing", ["best_fit", "sequential", "none"])
def test_no_token_is_lost_and_none_is_doubled(
    prepared, tokenizer, tokenizer_dir, pretrain_lines, tmp_path, packing
):
    """The public application loses 5 to 22 % of the tokens here."""
    output = tmp_path / "out"
    flags = {"packing": packing, "num_spliced_dataset_bins": 2}
    assert prepare(prepared / "data.jsonl", tokenizer_dir, output, **flags) == 0
    counts = read_manifest(output).categories.values()
    found = tokens_of(training_parts(output))
    expected: collections.Counter = collections.Counter()
    for category, ids, _ in expected_documents(tokenizer, pretrain_lines):
        expected.update((category, token) for token in ids)
    assert not found - expected
    missing = (expected - found).total()
    assert missing == sum(count.tokens_without_loss for count in counts)
    assert expected.total() == sum(count.tokens for count in counts)


def test_documents_run_on_from_row_to_row(
    tokenizer, tokenizer_dir, pretrain_lines, prepared, tmp_path
):
    """Every document is in consecutive stretches; only those without loss may lack."""
    pieces = stretches_of(training_parts(prepared / "arrow"))
    by_category = collections.defaultdict(collections.Counter)
    for (category, stretch), times in pieces.items():
        by_category[category][stretch] += times
    for category, ids, prefix in expected_documents(tokenizer, pretrain_lines):
        stretches = by_category[category]
        position = 0
        while position < len(ids):
            rest = tuple(ids[position:])
            fitting = [len(s) for s in stretches if rest[: len(s)] == s]
            if not fitting:
                # A row in which there is nothing to learn is not written.
                assert position < prefix
                break
            position += max(fitting)


def test_labels_follow_the_source(prepared, tokenizer, pretrain_lines):
    without_loss = sum(prefix for _, _, prefix in expected_documents(tokenizer, pretrain_lines))
    masked = learned = 0
    for part in training_parts(prepared / "arrow"):
        for row in datasets.load_from_disk(str(part)):
            for token, label in zip(row["input_ids"], row["labels"], strict=True):
                assert label in (token, IGNORE_INDEX)
                masked += label == IGNORE_INDEX
                learned += label != IGNORE_INDEX
            assert any(label != IGNORE_INDEX for label in row["labels"][1:])
    counts = read_manifest(prepared / "arrow").categories.values()
    assert learned == sum(count.loss_tokens for count in counts)
    assert 0 <= without_loss - masked <= sum(count.tokens_without_loss for count in counts)


def test_every_bucket_has_every_category_in_shuffled_rows(prepared):
    for part in training_parts(prepared / "arrow"):
        categories = datasets.load_from_disk(str(part))["category"]
        assert set(categories) == {"en", "zh"}
        assert list(categories) != sorted(categories)


def test_parts_are_as_the_contract_says(prepared):
    for part in training_parts(prepared / "arrow"):
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
    assert vars(manifest.documents) == {
        "input": len(pretrain_lines),
        "accepted": len(pretrain_lines),
        "rejected": 0,
        "filtered": 0,
    }
    for name, count in manifest.categories.items():
        assert count.documents == sum(line["category"] == name for line in pretrain_lines)
        assert sum(part.category_tokens[name] for part in manifest.parts.values()) == (
            count.training_tokens - count.tokens_without_loss
        )
    rows = open_parts([prepared / "arrow"], tokenizer_dir, 256)
    assert len(rows) == sum(count.rows for count in manifest.categories.values())
    sizes = [len(row["input_ids"]) for row in rows.take(range(len(rows)))]
    assert manifest.padding_share == pytest.approx(1 - sum(sizes) / 256 / len(sizes), abs=1e-6)
    assert sum(part.tokens for part in manifest.parts.values()) == sum(sizes)
    assert manifest.settings["packing"] == "best_fit"
    assert manifest.settings["inputs"][0]["file"] == str(prepared / "data.jsonl")


def test_padding_is_small_on_real_text(shared_data, tmp_path):
    corpora = shared_data / "corpora"
    tokenizer_dir = shared_data / "tokenizers" / "llama2"
    assert prepare(corpora, tokenizer_dir, tmp_path / "out", max_length=4096) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.padding_share < 0.005
    assert set(manifest.categories) == {"code", "en", "zh"}
    assert all(
        count.training_tokens == count.tokens and not count.tokens_without_loss
        for count in manifest.categories.values()
    )
    size = sum(len(content) for content in tree(tmp_path / "out").values())
    assert size < 9 * sum(part.tokens for part in manifest.parts.values())


@pytest.mark.parametrize("num_bins", [1, 3, 30])
def test_four_documents_make_any_number_of_parts(
    tmp_path, tokenizer_dir, write_lines, num_bins, capsys
):
    """The public application gives 25 parts for 30, and crashes with four documents."""
    texts = ["one", "two words", "three words here", "long " * 300]
    data = write_lines([{"source": "", "target": text, "category": "c"} for text in texts])
    output = tmp_path / "out"
    assert prepare(data, tokenizer_dir, output, num_spliced_dataset_bins=num_bins) == 0
    parts = [part.name for part in training_parts(output)]
    assert parts == [f"part-{number:05d}" for number in range(num_bins)]
    sizes = [len(datasets.load_from_disk(str(output / part))) for part in parts]
    assert sum(size > 0 for size in sizes) == min(num_bins, sum(sizes))
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


def test_every_format_gives_the_same_rows(tmp_path, tokenizer_dir, english, write_lines):
    texts = [" ".join(text.split()) for text in english[:20]]
    rows = [{"text": text, "category": "text"} for text in texts]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "in").mkdir()
    paths = {
        name: tmp_path / "in" / f"a.{name}"
        for name in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "txt.gz")
    }
    paths["jsonl"].write_bytes(content)
    paths["jsonl.gz"].write_bytes(gzip.compress(content))
    paths["jsonl.zst"].write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    paths["txt"].write_text("\n\n".join(texts), encoding="utf-8")
    paths["txt.gz"].write_bytes(gzip.compress("\n".join(texts).encode()))
    for path in paths.values():
        output = tmp_path / f"out-{path.name}"
        assert prepare(path, tokenizer_dir, output, num_spliced_dataset_bins=2) == 0
    parts = [
        {name: data for name, data in tree(tmp_path / f"out-{path.name}").items() if "/" in name}
        for path in paths.values()
    ]
    assert parts[0]
    assert all(part == parts[0] for part in parts)


def test_whole_files_and_their_category(tmp_path, tokenizer, tokenizer_dir):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(f"{name}\n\nmore\n", encoding="utf-8")
    flags = {"txt_documents": "file", "txt_category": "books", "packing": "none"}
    assert prepare(tmp_path / "in", tokenizer_dir, tmp_path / "out", **flags) == 0
    found = {
        tokenizer.decode(ids[1:-1]) for _, ids in stretches_of(training_parts(tmp_path / "out"))
    }
    assert found == {"a\n\nmore", "b\n\nmore"}
    assert list(read_manifest(tmp_path / "out").categories) == ["books"]


def test_a_few_bad_records_are_listed_and_left_out(tmp_path, tokenizer_dir, write_lines, capsys):
    lines = [GOOD] * 99 + ["{", "", {**GOOD, "target": ""}, *[GOOD] * 99]
    data = write_lines(lines)
    assert prepare(data, tokenizer_dir, tmp_path / "out", max_rejected=0.01) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.documents.input, manifest.documents.rejected) == (200, 2)
    assert sorted(manifest.rejected.values()) == [1, 1]
    listed = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, listed)
    assert (first["file"], first["line"], first["record"]) == (str(data), 100, "{")
    assert first["reason"].startswith("not JSON")
    assert (second["line"], second["reason"]) == (102, "target is empty")
    assert "2 malformed records left out, see rejected.jsonl" in capsys.readouterr().out


def test_too_many_bad_records_end_the_command(tmp_path, tokenizer_dir, write_lines, capsys):
    lines = [GOOD] * 60 + ["{"] * 2 + [{**GOOD, "target": 1}] * 3
    data = write_lines(lines)
    assert prepare(data, tokenizer_dir, tmp_path / "out") == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: 5 of 65 records are malformed, --max_rejected 0.01 allows 0")
    assert f"3 x target must be a string, found int ({data}:63)" in printed
    assert not (tmp_path / "out").exists()
    listing = tmp_path / "out-rejected.log"
    assert str(listing) in printed
    assert [json.loads(line)["line"] for line in listing.open(encoding="utf-8")] == [
        61,
        62,
        63,
        64,
        65,
    ]
    # What was tokenised serves the run that the message recommends.
    flags = {"max_rejected": 0.1, "resume": True}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    assert read_manifest(tmp_path / "out").documents.accepted == 60
    assert leftovers(tmp_path) == []
    assert not listing.exists()


BAD_INPUTS = {
    "cut.jsonl.gz": gzip.compress(json.dumps(GOOD).encode() * 1000)[:-30],
    "latin.jsonl": '{"source": "", "target": "é", "category": "c"}\n'.encode("latin-1"),
    "half.jsonl": json.dumps(GOOD).encode()[:-9],
    "nul.jsonl": b"\0" * 5000,
    "long.jsonl": json.dumps({**GOOD, "target": "a" * (20 << 20)}).encode(),
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "no.parquet": b"PAR1",
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_files_give_one_line_and_no_output(tmp_path, tokenizer_dir, capsys, name):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(BAD_INPUTS[name])
    assert prepare(path.parent, tokenizer_dir, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if not line.startswith("tokenizing")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert name in errors[0] or "no document" in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_directory_without_data(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "in").mkdir()
    assert prepare(tmp_path / "in", tokenizer_dir, tmp_path / "out") == 2
    assert "in: no .jsonl, .txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_validation_is_apart_and_training_does_not_open_it(
    tokenizer, tokenizer_dir, english, write_lines, tmp_path
):
    lines = [{"source": "", "target": text, "category": "en"} for text in english]
    lines += [{**line, "category": "again"} for line in lines[:20]]
    output = tmp_path / "out"
    flags = {"validation_fraction": 0.2, "packing": "none", "max_length": 50_000}
    assert prepare(write_lines(lines), tokenizer_dir, output, **flags) == 0
    held_out = stretches_of([output / "validation"])
    trained = stretches_of(training_parts(output))
    assert not {ids for _, ids in held_out} & {ids for _, ids in trained}
    expected = collections.Counter(
        (category, tuple(ids)) for category, ids, _ in expected_documents(tokenizer, lines)
    )
    assert held_out + trained == expected
    for category, least in (("en", 8), ("again", 4)):
        assert least <= sum(n for (name, _), n in held_out.items() if name == category) < 20
    manifest = read_manifest(output)
    assert manifest.validation is not None
    rows = open_parts([output], tokenizer_dir, 50_000)
    assert len(rows) == sum(part.rows for part in manifest.parts.values())
    validation = open_parts([output / "validation"], tokenizer_dir, 50_000)
    assert len(validation) == manifest.validation.rows == held_out.total()


def test_a_mix_comes_out_as_stated(prepared, tokenizer_dir, tmp_path, capsys):
    output = tmp_path / "out"
    mix = {"mix": "zh=0.5,en=0.5", "num_spliced_dataset_bins": 2}
    assert prepare(prepared / "data.jsonl", tokenizer_dir, output, **mix) == 0
    manifest = read_manifest(output)
    tokens = {
        name: sum(part.category_tokens[name] for part in manifest.parts.values())
        for name in manifest.categories
    }
    assert tokens["zh"] == pytest.approx(tokens["en"], rel=0.1)
    assert manifest.categories["zh"].epochs > 1 > manifest.categories["en"].epochs
    assert manifest.categories["zh"].documents == 32
    assert "mix: zh 5" in capsys.readouterr().out
    assert prepare(prepared / "data.jsonl", tokenizer_dir, tmp_path / "o", mix="zh=1") == 2
    assert "--mix names zh, the input has en, zh" in capsys.readouterr().err
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_duplicates_are_left_out_and_listed(tmp_path, tokenizer_dir, write_lines, english, kind):
    lines = [{"source": "", "target": text, "category": "en"} for text in english[:10]]
    changed = {**lines[2], "target": lines[2]["target"].replace("the", "these", 1)}
    data = write_lines([*lines, "", lines[3], changed])
    assert prepare(data, tokenizer_dir, tmp_path / "out", deduplicate=kind) == 0
    manifest = read_manifest(tmp_path / "out")
    found = 1 if kind == "exact" else 2
    assert manifest.filtered == {"duplicate": found}
    assert manifest.documents.accepted == manifest.documents.input - found
    listed = (tmp_path / "out" / "excluded" / "duplicate.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in listed.splitlines()]
    assert [entry["line"] for entry in entries] == [12, 13][:found]
    assert entries[0]["record"] == lines[3]
    assert manifest.categories["en"].documents == 12 - found


def test_cleaning_stages_are_counted_and_listed(tmp_path, tokenizer_dir, write_lines, english):
    lines = [{"source": "", "target": text, "category": "en"} for text in english[:5]]
    lines.insert(2, {"source": "", "target": "short", "category": "en"})
    lines.append({"source": "", "target": "ＡＢＣ " + english[6], "category": "en"})
    data = write_lines(lines)
    flags = {"min_characters": 10, "normalize": "nfc_width"}
    assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.filtered == {"length": 1}
    assert manifest.notes == {"normalized": 1}
    (entry,) = map(json.loads, (tmp_path / "out" / "excluded" / "length.jsonl").open())
    assert (entry["line"], entry["record"]["target"]) == (3, "short")
    assert entry["reason"]


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
        ({"validation_fraction": 1}, "--validation_fraction must be at least 0 and below 1"),
        ({"max_rejected": 2}, "--max_rejected must be between 0 and 1"),
        ({"num_workers": 0}, "--num_workers must be at least 1"),
        ({"mix": "zh=2"}, "--mix: 'zh=2' is not CATEGORY=SHARE"),
        ({"shard": "3/2"}, "--shard 3/2"),
        ({"shard": "two"}, "--shard two is not of the form 1/4"),
        ({"shard": "1/2", "overwrite": "true"}, "--shard and --overwrite"),
    ],
)
def test_unusable_flags(tmp_path, tokenizer_dir, write_lines, capsys, flags, reason):
    data = write_lines([GOOD], "in/d.jsonl")
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
    data = write_lines([GOOD])
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
    assert leftovers(tmp_path) == []
    assert list(tmp_path.glob("out*")) == []
