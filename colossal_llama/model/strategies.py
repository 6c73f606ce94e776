"""Ways to make the embedding rows of new pieces: one function each, and a row in ``STRATEGIES``.

Every strategy yields the new rows in blocks, in the order of the pieces' ids, in float32; who
writes them rounds them once to the weights' type. Old rows are only mapped into memory, so a
strategy that looks at them in blocks needs no more than a block of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.errors import DataError
from colossal_llama.model.new_pieces import NewPieces, script_of

if TYPE_CHECKING:
    import torch

# Most of one block: at hidden size 4096, 64 and 16 MiB of float32.
_IDS, _ROWS = 4096, 1024

# A script with fewer old rows has no norm of its own that could be trusted.
SCRIPT_ROWS = 50

# Hewitt's code samples with this share of the covariance ("Initializing New Word Embeddings for
# Pretrained Language Models", 2021): close to the mean, for which he bounds what new rows can take
# from old predictions.
COVARIANCE_SHARE = 1e-5


@dataclass(frozen=True)
class OldEmbedding:
    """What a strategy can make new rows from."""

    rows: torch.Tensor  # [old, hidden], in the file's type
    pieces: NewPieces
    initializer_range: float  # standard deviation that the model's own rows started with
    generator: torch.Generator  # the only source of randomness


Strategy = Callable[[OldEmbedding], "Iterator[torch.Tensor]"]


def mean(old: OldEmbedding) -> Iterator[torch.Tensor]:
    """The mean of the old rows that spelled the piece; for padding the mean of all.

    Colossal-LLaMA-2 did so; Hewitt (2021) argues for means.
    """
    import torch

    padding = None if all(old.pieces.bags) else _mean_row(old.rows)
    for bags in _blocks(old.pieces.bags):
        ids = torch.tensor([key for bag in bags for key in bag], dtype=torch.long)
        lengths = torch.tensor([len(bag) for bag in bags])
        # Pieces of one language share most of what spells them: every old row is fetched once.
        used, places = ids.unique(return_inverse=True)
        means = torch.nn.functional.embedding_bag(
            places, old.rows[used].float(), lengths.cumsum(0) - lengths, mode="mean"
        )
        if padding is not None:
            means[lengths == 0] = padding
        yield means


def mean_norm(old: OldEmbedding) -> Iterator[torch.Tensor]:
    """The mean, stretched to the median norm of the old rows of the piece's script.

    A mean of n rows that point in different directions is shorter than each of them, by about
    the square root of n. For a script with fewer than ``SCRIPT_ROWS`` old rows, and for pieces
    without letters, it is the median over all old rows that stand for text. Padding stays as it is.
    """
    import torch

    wanted = _median_norms(old)
    at = 0
    for means in mean(old):
        part = slice(at, at := at + len(means))
        norms = torch.tensor([wanted[script_of(text)] for text in old.pieces.texts[part]])
        scale = norms / means.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scale[[not bag for bag in old.pieces.bags[part]]] = 1
        yield means * scale[:, None]


def multivariate(old: OldEmbedding) -> Iterator[torch.Tensor]:
    """Samples of a normal distribution with the old rows' mean and a share of their covariance.

    As in Hewitt (2021); the share is ``COVARIANCE_SHARE``. The covariance is taken and factored
    in float32: two matrices [hidden, hidden].
    """
    import torch

    center = _mean_row(old.rows)
    hidden = len(center)
    covariance = torch.zeros(hidden, hidden)
    for at in range(0, len(old.rows), _ROWS):
        deviation = old.rows[at : at + _ROWS].float() - center
        covariance.addmm_(deviation.T, deviation)
    covariance /= len(old.rows)
    factor = _cholesky(covariance)
    del covariance
    factor *= COVARIANCE_SHARE**0.5
    for bags in _even(old.pieces.bags):
        noise = torch.randn(len(bags), hidden, generator=old.generator)
        yield torch.addmm(center, noise, factor.T)


def random(old: OldEmbedding) -> Iterator[torch.Tensor]:
    """What transformers gives new rows by itself, normal(0, initializer_range): to compare with."""
    import torch

    for bags in _even(old.pieces.bags):
        noise = torch.randn(len(bags), old.rows.shape[1], generator=old.generator)
        yield noise * old.initializer_range


STRATEGIES: dict[str, Strategy] = {
    "mean": mean,
    "mean_norm": mean_norm,
    "multivariate": multivariate,
    "random": random,
}


def new_rows(
    name: str,
    pieces: NewPieces,
    initializer_range: float,
    seed: str,
    rows: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """The blocks of the strategy ``name`` for the old ``rows``; ``seed`` is any text."""
    import torch

    number = int.from_bytes(hashlib.sha256(seed.encode("utf-8")).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    yield from STRATEGIES[name](OldEmbedding(rows, pieces, initializer_range, generator))


def _blocks(bags: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Consecutive bags, cut so that a block has few ids and few rows."""
    start = ids = 0
    for at, bag in enumerate(bags):
        if at > start and (ids + len(bag) > _IDS or at - start == _ROWS):
            yield bags[start:at]
            start, ids = at, 0
        ids += len(bag)
    if start < len(bags):
        yield bags[start:]


def _even(bags: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    for at in range(0, len(bags), _ROWS):
        yield bags[at : at + _ROWS]


def _mean_row(rows: torch.Tensor) -> torch.Tensor:
    """float32 [hidden]; the blocks' sums are added in float64."""
    import torch

    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for at in range(0, len(rows), _ROWS):
        total += rows[at : at + _ROWS].float().sum(0)
    return (total / len(rows)).float()


def _median_norms(old: OldEmbedding) -> dict[str | None, float]:
    """Script -> median norm of its old rows, for every script of a new piece."""
    import torch

    norms = torch.empty(len(old.rows))
    for at in range(0, len(old.rows), _ROWS):
        block = old.rows[at : at + _ROWS].float()
        torch.linalg.vector_norm(block, dim=1, out=norms[at : at + _ROWS])
    members: dict[str | None, list[int]] = {}
    for key, text in enumerate(old.pieces.old_texts):
        if text is not None:
            members.setdefault(script_of(text), []).append(key)
    everything = [key for keys in members.values() for key in keys] or list(range(len(norms)))
    chosen = {}
    for script in {script_of(text) for text in old.pieces.texts}:
        own = members.get(script, []) if script is not None else []
        chosen[script] = norms[own if len(own) >= SCRIPT_ROWS else everything].median().item()
    return chosen


def _cholesky(covariance: torch.Tensor) -> torch.Tensor:
    """A matrix L with L Lᵀ = ``covariance``, in its dtype.

    A covariance of fewer rows than columns is singular, and rounding can push one that is nearly
    so below zero. Then the smallest of 1e-6, 1e-5, ... of the mean variance that is enough is
    added to the diagonal.

    Raises:
        DataError: it is not finite.
    """
    import torch

    if not torch.isfinite(covariance).all():
        raise DataError("the source's embedding holds numbers that are not finite")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    jitter = 1e-6 * covariance.diagonal().mean()
    while failed:
        # Rows that are all alike have no variance, and the smallest number is enough for them.
        jitter = jitter.clamp_min(torch.finfo(torch.float32).tiny)
        shifted = covariance.clone()
        shifted.diagonal().add_(jitter)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        jitter = jitter * 10
    return factor
