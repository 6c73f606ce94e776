"""Of which weight each process's optimizer has which part, so that other processes find it again.

Beside each file of optimizer state lies a list of what is in it. A run that goes on with another
number of processes, or another plugin, puts its own parts together from all files: master weights
and moments are those of the checkpoint, to the bit. Tensor parallelism divides weights in ways that
these lists do not tell, so its parts are weights of their own here, for the same size of it only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.training.optimizer_state import MOMENTS, load_loss_scale, masters


class Share(NamedTuple):
    """A part of a weight: the elements from ``begin`` on, of all in one row."""

    weight: str
    begin: int


class Piece(NamedTuple):
    """Where a checkpoint has a part of a weight: the file's tensors ``number``.master and so on."""

    begin: int
    path: Path
    number: int


# The parts of each weight, by its name.
Pieces = Mapping[str, Sequence[Piece]]


def share_of(optimizer: Any, weight: torch.nn.Parameter) -> tuple[torch.Tensor, int] | None:
    """This process's fp32 share of ``weight``, and the index in ``weight`` where it begins.

    The share is the inner optimizer's parameter; None where this process has none of ``weight``.
    """
    if hasattr(optimizer, "id_to_fake_params"):  # Gemini; its tensors are filled before a step
        for number, fake in optimizer.id_to_fake_params.items():
            if optimizer.id_to_real_params[number] is weight:
                return fake, optimizer.get_offsets(number)[1]
        return None
    if hasattr(optimizer, "working_to_master_param"):  # ZeRO
        master = optimizer.working_to_master_param.get(id(weight))
        if master is None:
            return None
        return master, optimizer.pid_to_bucket_store[id(weight)].local_rank * master.numel()
    if hasattr(optimizer, "working_to_master_map"):  # half precision without ZeRO
        master = optimizer.working_to_master_map.get(weight)
        return None if master is None else (master, 0)
    return weight, 0


def named_shares(model: Any, optimizer: Any, tensor_group: Any = None) -> list[Share]:
    """What the tensors of a boosted optimizer are parts of, in the order of ``masters``.

    Args:
        tensor_group: the processes among which weights are divided by tensor parallelism.
    """
    part = ""
    if tensor_group is not None:
        part = f" ({dist.get_rank(tensor_group)} of {dist.get_world_size(tensor_group)})"
    names = {}
    for name, weight in model.unwrap().named_parameters():
        share = share_of(optimizer, weight) if weight.requires_grad else None
        if share is not None:
            parameter, begin = share
            # The last stage of a pipeline has a copy of what elsewhere is one weight.
            if name == "lm_head.weight" and model.unwrap().config.tie_word_embeddings:
                name = "model.embed_tokens.weight"
            names[id(parameter)] = Share(f"{name}{part}", int(begin))
    return [names[id(parameter)] for parameter, _ in masters(optimizer)]


def write_shares(shares: Sequence[Share], path: Path) -> None:
    """Writes the list of what is in the file of optimizer state that ``path`` lies beside.

    Raises:
        OSError: it could not be written.
    """
    storage.write_json(path, [list(share) for share in shares], atomically=False)


def read_pieces(directory: Path) -> Pieces:
    """All parts that the files of optimizer state in ``directory`` have.

    Raises:
        DataError: a list is missing, or is none.
    """
    found: dict[str, list[Piece]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        listing = path.with_suffix(".json")
        try:
            shares = [Share(str(name), int(begin)) for name, begin in storage.read_json(listing)]
        except (TypeError, ValueError):
            raise DataError(f"{listing}: not a list of weights and places in them") from None
        for number, share in enumerate(shares):
            found.setdefault(share.weight, []).append(Piece(share.begin, path, number))
    return found


@torch.no_grad()
def carry_over(pieces: Pieces, shares: Sequence[Share], optimizer: Any) -> None:
    """Puts this process's master weights and moments together from the parts of a checkpoint.

    Raises:
        DataError: a part is missing.
        OSError, SafetensorError: a file cannot be read.
    """
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for path in {piece.path for parts in pieces.values() for piece in parts}:
            files[path] = stack.enter_context(safe_open(path, framework="pt"))
        for share, (parameter, master) in zip(shares, masters(optimizer), strict=True):
            parts = pieces[share.weight]
            _fill(master.view(-1), share, parts, "master", files)
            state = optimizer.optim.state[parameter]
            first = files[parts[0].path]
            names = set(first.keys())
            for moment in MOMENTS:
                if f"{parts[0].number}.{moment}" in names:
                    state[moment] = torch.zeros_like(master)
                    _fill(state[moment].view(-1), share, parts, moment, files)
            if f"{parts[0].number}.step" in names:
                state["step"] = int(first.get_tensor(f"{parts[0].number}.step"))
        for file in files.values():
            load_loss_scale(optimizer, file)


def _fill(
    into: torch.Tensor, share: Share, parts: Sequence[Piece], kind: str, files: Mapping[Path, Any]
) -> None:
    """Copies what ``parts`` have of the elements that ``into``, [elements], stands for.

    What comes after all parts stays: rows that a plugin has added to an embedding.
    """
    wanted = range(share.begin, share.begin + into.numel())
    done = wanted.start
    for begin, values in _values(parts, kind, files, wanted):
        if begin > done:
            raise DataError(f"{parts[0].path.parent}: a part of {share.weight} is missing")
        into[begin - wanted.start : begin - wanted.start + values.numel()].copy_(values)
        done = max(done, begin + values.numel())


def _values(
    parts: Sequence[Piece], kind: str, files: Mapping[Path, Any], wanted: range
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first element, elements) within ``wanted``, in this order."""
    for part in sorted(parts):
        stored = files[part.path].get_slice(f"{part.number}.{kind}")
        shape = stored.get_shape()
        size = torch.Size(shape).numel()
        begin, end = max(wanted.start, part.begin), min(wanted.stop, part.begin + size)
        if begin < end:
            # Flat ones are read as far as needed.
            flat = stored if len(shape) == 1 else stored[:].view(-1)
            yield begin, flat[begin - part.begin : end - part.begin]
