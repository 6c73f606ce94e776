"""The files are those that safetensors writes, and their checksum is known without reading them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_with_safetensors

from colossal_llama.training.tensor_file import checksum, save_file

TENSORS = {
    "double": torch.arange(3.0, dtype=torch.float64),
    "float": torch.arange(24.0).reshape(2, 3, 4),
    "half": torch.arange(5.0).half(),
    "bf16": torch.arange(5.0).bfloat16(),
    "long": torch.tensor(7),
    "int": torch.arange(3, dtype=torch.int32),
    "short": torch.arange(3, dtype=torch.int16),
    "byte": torch.arange(7, dtype=torch.uint8),
    "signed": torch.arange(3, dtype=torch.int8),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 3),
    'name "with" ü\n': torch.ones(2),
}


def test_safetensors_reads_every_type(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("names", [[], ["float"], ["long", "float", "bf16", "empty", "byte"]])
def test_bytes_are_those_of_safetensors(tmp_path: Path, names: list[str]) -> None:
    """As long as no two types are equally wide: these may stand in either order."""
    tensors = {name: TENSORS[name] for name in names}
    save_file(tensors, tmp_path / "ours")
    save_with_safetensors(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    large = {"large": torch.randn(2**19 + 3)}  # of more than a piece
    assert save_file(large, tmp_path / "file") == checksum(tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["large"], large["large"])


def test_views_strides_shared_memory_and_parameters(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": whole,
        "view": whole[1:3],
        "transposed": whole.t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    save_file(tensors, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_error_names_the_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        save_file({"x": torch.ones(5)}, tmp_path / "file")
    assert raised.value.filename == str(tmp_path / "file")
