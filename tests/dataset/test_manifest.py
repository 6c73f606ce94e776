"""The check at the door: another tokenizer, another size, files that are not what was written."""

from __future__ import annotations

import json
import shutil

import pytest

from colossal_llama import command
from colossal_llama.dataset.loader import open_parts, part_directories
from colossal_llama.dataset.manifest import MANIFEST_FILE, check_part, read_manifest
from colossal_llama.dataset.prepare_pretrain import (
    PretrainDatasetOptions,
    prepare_pretrain_dataset,
)
from colossal_llama.dataset.writer import ARROW_FILE
from colossal_llama.errors import DataError


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer_dir, english):
    directory = tmp_path_factory.mktemp("original")
    data = directory / "data.jsonl"
    lines = [{"source": "", "target": text, "category": "en"} for text in english[:8]]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    argv = [f"--data_input_dirs={data}", f"--tokenizer_dir={tokenizer_dir}"]
    argv += [f"--data_arrow_output_dir={directory / 'out'}", "--max_length=128"]
    argv += ["--num_spliced_dataset_bins=2"]
    assert command.run(PretrainDatasetOptions, prepare_pretrain_dataset, argv) == 0
    return directory / "out"


@pytest.fixture
def output(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


def other_tokenizer(tokenizer_dir, target, change):
    shutil.copytree(tokenizer_dir, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return target


def test_whole_part_passes(output, tokenizer_dir):
    for part in ("part-00000", "part-00001"):
        manifest = check_part(output / part, tokenizer_dir, checksums=True)
        assert manifest == read_manifest(output)


def test_tokenizer_of_another_size_is_named_with_both_sizes(output, tokenizer_dir, tmp_path):
    def grow(content):
        content["model"]["vocab"]["新"] = len(content["model"]["vocab"])

    other = other_tokenizer(tokenizer_dir, tmp_path / "grown", grow)
    size = read_manifest(output).tokenizer.vocabulary_size
    for check in (
        lambda: check_part(output / "part-00000", other),
        lambda: open_parts([output], other, 128),
    ):
        with pytest.raises(DataError, match=f"{size} ids.*grown has {size + 1}"):
            check()


def test_other_tokenizer_of_the_same_size_is_refused(output, tokenizer_dir, tmp_path):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]

    other = other_tokenizer(tokenizer_dir, tmp_path / "swapped", swap)
    with pytest.raises(
        DataError, match=r"out was prepared with tokenizer \w{12}, .*swapped is \w{12}"
    ):
        open_parts([output / "part-00001"], other, 128)


def test_damaged_files_are_found(output, tokenizer_dir):
    path = output / "part-00001" / ARROW_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    for check in (
        lambda: check_part(path.parent, tokenizer_dir),
        lambda: open_parts([output], tokenizer_dir, 128),
    ):
        with pytest.raises(
            DataError, match=f"{len(content) - 8} bytes, the manifest says {len(content)}"
        ):
            check()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    check_part(path.parent, tokenizer_dir)
    with pytest.raises(DataError, match="SHA-256"):
        check_part(path.parent, tokenizer_dir, checksums=True)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        check_part(path.parent, tokenizer_dir)


def test_unlisted_and_orphaned_parts(output, tokenizer_dir, tmp_path):
    shutil.copytree(output / "part-00000", output / "part-00007")
    with pytest.raises(DataError, match="not a part that"):
        check_part(output / "part-00007", tokenizer_dir)
    shutil.move(output / "part-00000", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="not a prepared dataset"):
        check_part(tmp_path / "elsewhere", tokenizer_dir)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", ":1: not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 1}', "schema version 1, this program reads 2"),
        ('{"schema_version": 2}', "not a dataset manifest"),
        ('{"schema_version": 2, "categories": [], "parts": {}}', "not a dataset manifest"),
    ],
)
def test_manifest_that_cannot_be_read(output, content, reason):
    (output / MANIFEST_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        read_manifest(output)


def test_rows_longer_than_the_run_takes(output, tokenizer_dir):
    assert len(open_parts([output], tokenizer_dir, 128))
    with pytest.raises(DataError, match="rows of 128 tokens, --max_length is 100"):
        open_parts([output], tokenizer_dir, 100)


def test_parts_are_taken_in_the_order_given(output, tokenizer_dir, monkeypatch):
    names = [path.name for parts in part_directories([output]) for path in parts]
    assert names == ["part-00000", "part-00001"]
    swapped = [output / "part-00001", output / "part-00000"]
    rows = open_parts(swapped, tokenizer_dir, 128)
    entries = [read_manifest(output).parts[part.name] for part in swapped]
    assert rows.rows_per_part == [entry.rows for entry in entries]
    assert rows.fingerprints == [entry.files[ARROW_FILE].sha256 for entry in entries]
    for paths, reason in [
        ([output, output / "part-00000"], "given twice"),
        ([output / "nothing"], "no such directory"),
    ]:
        with pytest.raises(DataError, match=reason):
            open_parts(paths, tokenizer_dir, 128)
    monkeypatch.chdir(output / "part-00000")
    assert len(open_parts([type(output)(".")], tokenizer_dir, 128)) == entries[1].rows


def test_kinds_and_templates_are_not_mixed(output, tokenizer_dir, tmp_path):
    for field, value, reason in [
        ("kind", "sft", "one kind at a time"),
        ("chat_template", "x", "different chat templates"),
    ]:
        other = shutil.copytree(output, tmp_path / field)
        manifest = read_manifest(other)
        setattr(manifest, field, value)
        manifest.write(other)
        with pytest.raises(DataError, match=reason):
            open_parts([output, other], tokenizer_dir, 128)
