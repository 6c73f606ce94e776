"""Writing tensors: what was true when they were handed over, its checksums, and any error."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from colossal_llama.training import file_writer
from colossal_llama.training.file_writer import FileWriter, HostCopies, checksum


def tensors() -> dict[str, torch.Tensor]:
    """Views, shared memory, strides, empty tensors and every dtype of a checkpoint."""
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": whole.clone(),
        "view": whole[1:3],
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(5).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }


def finished(writer: FileWriter) -> FileWriter:
    if writer.late:
        writer.start()
    writer.finish()
    return writer


class NoMemory(HostCopies):
    def take(self, tensors: Any, path: Path) -> dict[str, torch.Tensor]:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")


def test_no_error_leaves_it_while_others_wait(tmp_path: Path) -> None:
    writer = FileWriter(late=True, copies=NoMemory())
    for name in ("a", "b"):
        writer.write(tensors(), tmp_path / name)
    finished(writer)
    assert "not enough memory" in str(writer.error)
    assert writer.failed == tmp_path / "a"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("late", [False, True])
def test_files_hold_what_was_handed_over(tmp_path: Path, late: bool) -> None:
    """Whatever happens to the tensors afterwards: training goes on with them."""
    writer, given = FileWriter(late=late), tensors()
    wanted = {name: tensor.detach().clone() for name, tensor in given.items()}
    writer.write(given, tmp_path / "a")
    for tensor in given.values():
        tensor.detach().fill_(7)
    given.clear()
    writer.write({"other": torch.ones(2)}, tmp_path / "b")
    assert finished(writer).error is None
    found = load_file(tmp_path / "a")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert load_file(tmp_path / "b")["other"].tolist() == [1, 1]


@pytest.mark.parametrize("late", [False, True])
def test_checksums_are_those_of_the_files(tmp_path: Path, late: bool) -> None:
    writer = FileWriter(late=late)
    for name in ("a", "b"):
        writer.write(tensors(), tmp_path / name)
    finished(writer)
    assert writer.checksums == {
        path: xxhash.xxh3_128(path.read_bytes()).hexdigest()
        for path in (tmp_path / "a", tmp_path / "b")
    }


@pytest.mark.parametrize("size", [0, 1, 2**24 - 1, 2**24, 2**24 + 1])
def test_checksum_of_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path.write_bytes(content)
    assert checksum(path) == xxhash.xxh3_128(content).hexdigest()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "raised", [OSError(errno.ENOSPC, "full"), RuntimeError("share memory"), MemoryError()]
)
def test_an_error_is_kept_and_ends_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool, raised: Exception
) -> None:
    """Any error: a checkpoint that lacks a file must not be taken for complete."""

    def write(content: Any, path: Path) -> str:
        if path.name == "b":
            raise raised
        path.touch()
        return "sum"

    monkeypatch.setattr(file_writer, "save_file", write)
    writer = FileWriter(late=late)
    for name in ("a", "b", "c"):
        writer.write({"x": torch.ones(1)}, tmp_path / name)
    assert finished(writer).error is raised
    assert writer.failed == tmp_path / "b"
    assert writer.is_done
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert writer.checksums.keys() == {tmp_path / "a"}


@pytest.mark.parametrize("late", [False, True])
def test_a_folder_that_is_gone_is_an_error_of_the_writer(tmp_path: Path, late: bool) -> None:
    writer = FileWriter(late=late)
    writer.write({"x": torch.ones(1)}, tmp_path / "gone" / "a")
    assert "No such file" in str(finished(writer).error)


def test_late_means_that_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    original = file_writer.save_file

    def slow(*arguments: Any) -> str:
        assert go_on.wait(30)
        return original(*arguments)

    monkeypatch.setattr(file_writer, "save_file", slow)
    writer = FileWriter(late=True)
    writer.write({"x": torch.ones(1)}, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    writer.start()
    assert not writer.is_done
    go_on.set()
    writer.finish()
    assert writer.is_done
    assert (tmp_path / "a").exists()


def test_not_late_is_at_once(tmp_path: Path) -> None:
    writer = FileWriter()
    writer.write({"x": torch.ones(1)}, tmp_path / "a")
    assert (tmp_path / "a").exists()
    assert writer.is_done


def test_memory_of_copies_is_used_again(tmp_path: Path) -> None:
    copies, given = HostCopies(), tensors()
    first = copies.take(given, tmp_path / "step-1" / "optimizer" / "a")
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    given["half"], given["bf16"] = torch.ones(6).half(), torch.ones(5)  # now of another kind
    again = copies.take(given, tmp_path / "step-2" / "optimizer" / "a")
    assert all(torch.equal(again[name], tensor) for name, tensor in given.items())
    moved = {name for name, tensor in again.items() if tensor.data_ptr() != addresses[name]}
    assert moved == {"half", "bf16"}
    other = copies.take(given, tmp_path / "step-2" / "rng" / "a")
    assert other["whole"].data_ptr() != again["whole"].data_ptr()
