"""Weight files rewritten in blocks: read back by the library that defines the format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from colossal_llama.errors import DataError
from colossal_llama.model import safetensors_files
from colossal_llama.model.safetensors_files import NewRows, find_weights, rewrite, size_after

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "ids": torch.arange(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "matrix": torch.randn(10, 6),
    "brain": torch.randn(11).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(2.5),
    "é": torch.randn(2, 2, dtype=torch.float64),
}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves tensors in one file, or with an index, one file for each."""

    def save(tensors: dict[str, torch.Tensor], *, sharded: bool = False) -> Path:
        directory = tmp_path / "source"
        directory.mkdir()
        if not sharded:
            save_file(tensors, directory / "model.safetensors", {"format": "pt", "by": "test"})
            return directory
        files = {name: f"file-{at}.safetensors" for at, name in enumerate(tensors)}
        for name, file in files.items():
            save_file({name: tensors[name]}, directory / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1, "total_parameters": 5}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return save


def written(
    source: Path, grown: dict[str, NewRows] | None = None, dtype: str | None = None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Rewrites ``source`` beside it; checks the promised size; loads the result."""
    target, done = source.parent / "target", list[int]()
    target.mkdir()
    weights = find_weights(source)
    rewrite(weights, target, grown or {}, dtype, done.append)
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    found = {}
    for path in target.glob("*.safetensors"):
        found |= load_file(path)
    total = sum(tensor.nbytes for tensor in found.values())
    assert size_after(weights, grown or {}, dtype) == total
    assert 0 <= sum(done) - total < 1000 * len(weights.files)  # headers of copied files besides
    return target, found


def grow(kept: int, *blocks: torch.Tensor) -> NewRows:
    return NewRows(kept, sum(map(len, blocks)), lambda rows: iter(blocks))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("block", [8, 2**23])
def test_rows_are_added_and_everything_else_stays(
    sharded: bool, block: int, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "_BLOCK", block)
    source, seen = save(TENSORS, sharded=sharded), list[torch.Tensor]()

    def blocks(rows: torch.Tensor) -> Iterator[torch.Tensor]:
        seen.append(rows.clone())
        yield from (torch.full((2, 6), 1.5), torch.full((1, 6), 2.5))

    target, found = written(source, {"matrix": NewRows(8, 3, blocks)})
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        if name != "matrix":
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert torch.equal(seen[0], TENSORS["matrix"][:8])
    assert torch.equal(found["matrix"][:8], TENSORS["matrix"][:8])
    assert found["matrix"][8:].tolist() == [[1.5] * 6, [1.5] * 6, [2.5] * 6]
    if sharded:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in found.values())}
        for path in source.glob("file-*"):
            same = path.read_bytes() == (target / path.name).read_bytes()
            assert same == ("matrix" not in load_file(path))
    else:
        with safe_open(target / "model.safetensors", framework="pt") as shard:
            assert shard.metadata() == {"format": "pt", "by": "test"}


def test_the_file_is_what_the_library_would_have_written(save: Save) -> None:
    """Also its alignment: other readers map tensors without a copy."""
    source = save(TENSORS)
    target, found = written(source, {"half": grow(1, torch.ones(2, 5))})
    save_file(found, source / "again.safetensors", {"format": "pt", "by": "test"})
    ours, theirs = (
        path.read_bytes() for path in (target / "model.safetensors", source / "again.safetensors")
    )
    length = int.from_bytes(ours[:8], "little")
    assert length % 8 == 0
    header = json.loads(ours[8 : 8 + length])
    for name, tensor in found.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    assert len(ours) - length == len(theirs) - int.from_bytes(theirs[:8], "little")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block", [8, 2**23])
def test_a_new_type_is_for_all_numbers(
    dtype: str, block: int, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "_BLOCK", block)
    added = torch.randn(4, 6)
    _, found = written(save(TENSORS), {"matrix": grow(10, added)}, dtype)
    wanted = {**TENSORS, "matrix": torch.cat([TENSORS["matrix"], added])}
    for name, tensor in wanted.items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_files_of_the_wanted_type_are_copied(save: Save) -> None:
    source = save(TENSORS, sharded=True)
    target, _ = written(source, {}, "float32")
    for path in source.glob("file-*"):
        (tensor,) = load_file(path).values()
        if tensor.dtype == torch.float32 or not tensor.is_floating_point():
            assert path.read_bytes() == (target / path.name).read_bytes()


def test_old_bits_are_copied_whatever_they_mean(save: Save) -> None:
    """NaNs with a payload, infinities, negative zero."""
    bits = torch.tensor([[0x7FC1, 0xFFFF], [0x7F80, 0x8000]], dtype=torch.int32).short()
    _, found = written(save({"x": bits.view(torch.bfloat16)}), {"x": grow(2, torch.ones(1, 2))})
    assert torch.equal(found["x"][:2].view(torch.int16), bits)


@pytest.mark.parametrize("where", ["old", "new"])
def test_what_a_type_cannot_hold_is_refused(where: str, save: Save) -> None:
    large = torch.full((2, 3), 1e6)
    old, new = (large, large[:0]) if where == "old" else (large * 0, large)
    source = save({"x": old})
    with pytest.raises(DataError, match=r"x: it holds 1e\+06, too large for float16"):
        written(source, {"x": grow(2, new)}, "float16")


def test_copying_without_help_of_the_kernel(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not between these two disks")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(safetensors_files, "_BLOCK", 16)
    source = save(TENSORS, sharded=True)
    target, found = written(source, {"matrix": grow(10, torch.ones(1, 6))})
    assert torch.equal(found["matrix"][:10], TENSORS["matrix"])
    for path in source.glob("file-*"):
        if "matrix" not in load_file(path):
            assert path.read_bytes() == (target / path.name).read_bytes()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/x.safetensors", "sub/x", "", 5])
def test_an_index_cannot_name_files_elsewhere(name: object, save: Save) -> None:
    source = save(TENSORS, sharded=True)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["half"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="not the name of a file beside it"):
        find_weights(source)


def test_an_index_that_names_a_tensor_that_is_not_there(save: Save) -> None:
    source = save(TENSORS, sharded=True)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lost"] = index["weight_map"]["half"]
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"file-0.safetensors: it has no tensor lost"):
        find_weights(source)


_PEAK = """
import sys
from pathlib import Path
import torch
from colossal_llama.model.safetensors_files import NewRows, find_weights, rewrite

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

source, target, dtype = sys.argv[1:]
before = peak()
rows = NewRows(10, 2, lambda rows: iter([torch.ones(2, 8)]))
rewrite(find_weights(Path(source)), Path(target), {"x": rows}, dtype or None, int)
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
@pytest.mark.parametrize("dtype", ["", "float16"])
def test_a_large_neighbour_is_not_loaded(dtype: str, save: Save, tmp_path: Path) -> None:
    """An embedding's file may hold gigabytes of other tensors."""
    mebibytes = 192
    source = save({"x": torch.ones(10, 8), "large": torch.zeros(mebibytes * 2**18)})
    (tmp_path / "target").mkdir()
    argv = [sys.executable, "-c", _PEAK, source, tmp_path / "target", dtype]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True)
    assert int(done.stdout) < mebibytes // 2
    assert load_file(tmp_path / "target" / "model.safetensors")["x"].shape == (12, 8)
