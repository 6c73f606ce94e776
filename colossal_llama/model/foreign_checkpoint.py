"""The tensors of a checkpoint, whatever files they lie in; read one at a time.

A pickle is opened with torch's restricted unpickler, so that no code in it can run, and mapped
instead of read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.model.safetensors_files import read_index

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Where training scripts put the weights among other state.
_NESTS = ("model", "state_dict", "model_state_dict", "module")
# Files of a checkpoint directory that hold no weights.
_OTHER = re.compile(r"optim|scheduler|training_args|rng|scaler|random_states", re.IGNORECASE)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], torch.Tensor]


def locate(path: Path) -> Path:
    """The file of weights, or the directory of such files, that ``path`` means.

    A training's save directory means its newest checkpoint, a checkpoint its ``modeling``.

    Raises:
        DataError: there is nothing at ``path``.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if (path / "latest").is_file():
        name = (path / "latest").read_text(encoding="utf-8").strip()
        if not (path / name).is_dir():
            raise DataError(f"{path / 'latest'}: it names {name!r}, which is not there")
        path = path / name
    return path / "modeling" if (path / "modeling").is_dir() else path


def read_checkpoint(place: Path) -> dict[str, StoredTensor]:
    """The tensors in a file, or in all files of a directory, by their names there.

    Raises:
        DataError: a file is missing, damaged or would run code; a name is in two files.
    """
    found: dict[str, StoredTensor] = {}
    files, named = _files(place) if place.is_dir() else ([place], {})
    for file in files:
        tensors = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        for name, tensor in tensors.items():
            if name in found:
                raise DataError(
                    f"{file}: {name} is also in {found[name].file.name}; the files belong to "
                    "different checkpoints; name one file"
                )
            found[name] = tensor
    for name, file_name in named.items():
        if name not in found:
            raise DataError(f"{place / file_name}: {name} is missing, but the index names it here")
    return found


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a directory's weights; with an index also which tensor it says lies where."""
    names = sorted(path.name for path in directory.iterdir() if not _OTHER.search(path.name))
    indices = [name for name in names if name.endswith(".index.json")]
    indices = [name for name in indices if "safetensors" in name] or indices
    if len(indices) > 1:
        raise DataError(f"{directory}: two checkpoints: {' and '.join(indices)}; move one away")
    if indices:
        named = read_index(directory / indices[0])["weight_map"]
        return [directory / name for name in sorted(set(named.values()))], named
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if whole in names:
            return [directory / whole], {}
    shards = [name for name in names if name.endswith(".safetensors")]
    shards = shards or [name for name in names if re.match(r"pytorch_model.*\.bin$", name)]
    if shards:
        return [directory / name for name in shards], {}
    pickles = [name for name in names if name.endswith(PICKLES)]
    if len(pickles) == 1:
        return [directory / pickles[0]], {}
    if pickles:
        some = ", ".join(pickles[:4])
        raise DataError(f"{directory}: several checkpoints ({some}); name one file")
    raise DataError(f"{directory}: no weights here: no .safetensors, {', '.join(PICKLES)} file")


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        shard = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file, but the checkpoint's index names it") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a complete safetensors file: {error}") from None

    def stored(name: str) -> StoredTensor:
        part = shard.get_slice(name)
        shape = tuple(part.get_shape())
        dtype = (part[:0] if shape else shard.get_tensor(name)).dtype
        return StoredTensor(shape, dtype, file, lambda: shard.get_tensor(name))

    return {name: stored(name) for name in shard.keys()}  # noqa: SIM118


def _read_pickle(file: Path) -> dict[str, StoredTensor]:
    import pickle
    import zipfile

    import torch

    if file.suffix not in PICKLES:
        raise DataError(f"{file}: expected a .safetensors or a {', '.join(PICKLES)} file")
    try:
        # Only the zip format, torch's since 1.6, can be mapped.
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except FileNotFoundError:
        raise DataError(f"{file}: no such file, but the checkpoint's index names it") from None
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file}: refused, for it holds more than tensors and plain values "
            f"({_reason(error)}); where you trust it, load it and save the state dict alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise DataError(f"{file}: not a complete checkpoint file: {_reason(error)}") from None
    return {
        str(name): _mapped(value, f"{file}: {name}", file)
        for name, value in _state_dict(content, file).items()
        if isinstance(value, torch.Tensor)
    }


def _mapped(value: torch.Tensor, where: str, file: Path) -> StoredTensor:
    import torch

    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        kind = "has no numbers" if value.is_meta else "is sparse or quantised"
        raise DataError(f"{where} {kind}; save the model with ordinary tensors")
    return StoredTensor(tuple(value.shape), value.dtype, file, lambda: value)


def _reason(error: Exception) -> str:
    """What torch says is wrong, without its advice how to run the pickle all the same."""
    if isinstance(error, LookupError) or not str(error):  # says a key, or nothing
        return type(error).__name__
    text = re.split(r"WeightsUnpickler error:|trusted source\.", str(error))[-1].strip()
    return re.split(r" was not an allowed|\. |\.?\n", text)[0].strip()


def _state_dict(content: Any, file: Path) -> dict[str, Any]:
    """The mapping from names to tensors in what a training script saved."""
    import torch

    while isinstance(content, dict):
        inner = [content[key] for key in _NESTS if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise DataError(
            f"{file}: no tensors by name in it or under {', '.join(_NESTS)}; it holds {keys}"
        )
    return content
