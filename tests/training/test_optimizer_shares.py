"""However weights were divided among processes, others put their own shares together from that."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from colossal_llama.errors import DataError
from colossal_llama.training.optimizer_shares import (
    Share,
    carry_over,
    read_pieces,
    write_shares,
)
from colossal_llama.training.optimizer_state import MOMENTS, optimizer_tensors
from colossal_llama.training.tensor_file import save_file

SIZES = {"embedding": (7, 5), "layer": (4, 4), "norm": (5,), "scale": (1,)}
KINDS = ("master", *MOMENTS)
Division = list[list[Share]]  # of each process
Weights = dict[str, dict[str, torch.Tensor]]  # by kind and name, flat


class Optimizer:
    """What a plugin's optimizer looks like: an inner one whose parameters are shares of weights."""

    def __init__(self, shares: list[torch.Tensor]) -> None:
        self.optim = torch.optim.AdamW([torch.nn.Parameter(share) for share in shares])


def random_weights() -> Weights:
    return {
        kind: {name: torch.randn(torch.Size(size).numel()) for name, size in SIZES.items()}
        for kind in KINDS
    }


def zero(processes: int) -> tuple[Division, dict[Share, int]]:
    """Equal shares of each weight, the last one with padding, as ZeRO has them."""
    division: Division = [[] for _ in range(processes)]
    lengths = {}
    for name, size in SIZES.items():
        length = -(-torch.Size(size).numel() // processes)
        for rank in range(processes):
            share = Share(name, rank * length)
            division[rank].append(share)
            lengths[share] = length
    return division, lengths


def chunks(processes: int) -> tuple[Division, dict[Share, int]]:
    """Cuts anywhere, and some processes without any share of a weight, as Gemini has them."""
    division: Division = [[] for _ in range(processes)]
    lengths = {}
    for name, size in random.sample(list(SIZES.items()), len(SIZES)):
        total = torch.Size(size).numel()
        cuts = sorted({0, total, *(random.randrange(total) for _ in range(processes - 1))})
        ranks = random.sample(range(processes), len(cuts) - 1)
        for rank, begin, end in zip(ranks, cuts, cuts[1:], strict=False):
            division[rank].append(Share(name, begin))
            lengths[Share(name, begin)] = end - begin
    return division, lengths


DIVISIONS = [(zero, 1), (zero, 2), (zero, 3), (zero, 8), (chunks, 2), (chunks, 5)]


def values_of(whole: torch.Tensor, begin: int, length: int) -> torch.Tensor:
    """A share's values; what is beyond the weight is zero."""
    found = torch.zeros(length)
    found[: max(len(whole) - begin, 0)] = whole[begin : begin + length]
    return found


def write(directory: Path, weights: Weights, division: Division, lengths: dict[Share, int]) -> None:
    for rank, shares in enumerate(division):
        own = {
            kind: [values_of(weights[kind][s.weight], s.begin, lengths[s]) for s in shares]
            for kind in KINDS
        }
        optimizer = Optimizer(own["master"])
        for number, parameter in enumerate(optimizer.optim.param_groups[0]["params"]):
            moments = {kind: own[kind][number] for kind in MOMENTS}
            optimizer.optim.state[parameter] = {**moments, "step": 9}
        path = directory / f"rank-{rank:05d}.safetensors"
        save_file(optimizer_tensors(optimizer), path)
        write_shares(shares, path.with_suffix(".json"))


@pytest.mark.parametrize("before", DIVISIONS)
@pytest.mark.parametrize("after", DIVISIONS)
def test_any_division_becomes_any_other(tmp_path: Path, before: tuple, after: tuple) -> None:
    random.seed(f"{before[0].__name__} {before[1]} {after}")
    weights = random_weights()
    write(tmp_path, weights, *before[0](before[1]))
    pieces = read_pieces(tmp_path)
    assert pieces.keys() == SIZES.keys()
    division, lengths = after[0](after[1])
    for shares in filter(None, division):
        optimizer = Optimizer([torch.zeros(lengths[share]) for share in shares])
        carry_over(pieces, shares, optimizer)
        parameters = optimizer.optim.param_groups[0]["params"]
        for share, parameter in zip(shares, parameters, strict=True):
            state = optimizer.optim.state[parameter]
            assert state["step"] == 9
            for kind, found in {"master": parameter.data, **state}.items():
                if kind != "step":
                    whole = weights[kind][share.weight]
                    assert found.equal(values_of(whole, share.begin, lengths[share])), kind


def test_shapes_may_be_those_of_the_weights(tmp_path: Path) -> None:
    """As without ZeRO; rows that only one side has added to an embedding are no part of it."""
    weights = random_weights()
    write(tmp_path, weights, *zero(3))
    optimizer = Optimizer([torch.full((9, 5), 7.0)])
    carry_over(read_pieces(tmp_path), [Share("embedding", 0)], optimizer)
    (parameter,) = optimizer.optim.param_groups[0]["params"]
    state = optimizer.optim.state[parameter]
    for kind, found, beyond in (("master", parameter, 7.0), ("exp_avg", state["exp_avg"], 0.0)):
        assert found[:7].equal(weights[kind]["embedding"].view(7, 5))
        # One element of padding made 36 of 35.
        assert found[7, 1:].eq(beyond).all()
        assert found[8].eq(beyond).all()
    for path in tmp_path.iterdir():
        path.unlink()
    path = tmp_path / "rank-00000.safetensors"
    save_file(optimizer_tensors(optimizer), path)
    write_shares([Share("embedding", 0)], path.with_suffix(".json"))
    half = Optimizer([torch.zeros(15)])
    carry_over(read_pieces(tmp_path), [Share("embedding", 20)], half)
    assert half.optim.param_groups[0]["params"][0].equal(weights["master"]["embedding"][20:])


def test_an_optimizer_without_moments(tmp_path: Path) -> None:
    """All its updates were left out."""
    path = tmp_path / "rank-00000.safetensors"
    save_file(optimizer_tensors(Optimizer([torch.ones(3)])), path)
    write_shares([Share("norm", 0)], path.with_suffix(".json"))
    optimizer = Optimizer([torch.zeros(2)])
    carry_over(read_pieces(tmp_path), [Share("norm", 1)], optimizer)
    (parameter,) = optimizer.optim.param_groups[0]["params"]
    assert parameter.eq(1).all()
    assert not optimizer.optim.state[parameter]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write(tmp_path, random_weights(), *zero(3))
    (tmp_path / "rank-00001.safetensors").unlink()
    with pytest.raises(DataError, match="a part of embedding is missing"):
        carry_over(read_pieces(tmp_path), [Share("embedding", 0)], Optimizer([torch.zeros(35)]))


@pytest.mark.parametrize("text", ["{", "3", "[[1]]", '{"norm": 1}', '[["norm", "x"]]', "[null]"])
def test_a_damaged_list_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, random_weights(), *zero(1))
    (tmp_path / "rank-00000.json").write_text(text)
    with pytest.raises(DataError, match=r"rank-00000\.json"):
        read_pieces(tmp_path)
