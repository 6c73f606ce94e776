"""What each strategy promises about the rows it makes, against plain computations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from colossal_llama.errors import DataError
from colossal_llama.model import strategies
from colossal_llama.model.new_pieces import NewPieces, script_of
from colossal_llama.model.strategies import STRATEGIES, new_rows

HIDDEN = 16
LATIN, HAN, GREEK = (
    [chr(start + at) for at in range(count)]
    for start, count in ((0x100, 120), (0x4E00, 90), (0x391, 10))
)
OLD_TEXTS = [None, None, *LATIN, *HAN, *GREEK, "1", "，"]


@pytest.fixture
def rows() -> torch.Tensor:
    """Old rows whose length depends on the script: 1 for Latin, 3 for Han, 10 for Greek."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(len(OLD_TEXTS), HIDDEN, generator=generator) + 0.3
    lengths = {"LATIN": 1.0, "CJK": 3.0, "GREEK": 10.0, None: 1.0}
    wanted = torch.tensor([lengths[script_of(text)] for text in OLD_TEXTS])
    return found / found.norm(dim=1, keepdim=True) * wanted[:, None]


def pieces(bags: Sequence[Sequence[int]], texts: Sequence[str | None]) -> NewPieces:
    return NewPieces([list(bag) for bag in bags], list(texts), OLD_TEXTS)


def many(count: int) -> NewPieces:
    """Pieces whose bags have five to one ids, and no text."""
    bags = [[(at * 7 + step) % len(OLD_TEXTS) for step in range(5 - at % 5)] for at in range(count)]
    return pieces(bags, [None] * count)


def run(name: str, new: NewPieces, rows: torch.Tensor, seed: str = "1") -> torch.Tensor:
    return torch.cat(list(new_rows(name, new, 0.02, seed, rows)))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("limit", [1, 7, 4096])
def test_every_strategy_makes_every_row_whatever_the_blocks(
    name: str, limit: int, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant in ("_ROWS", "_IDS"):
        monkeypatch.setattr(strategies, constant, limit)
    blocks = list(new_rows(name, many(50), 0.02, "1", rows))
    assert sum(map(len, blocks)) == 50
    assert all(block.dtype == torch.float32 for block in blocks)
    assert all(0 < len(block) <= max(limit, 1) for block in blocks)
    assert not list(new_rows(name, pieces([], []), 0.02, "1", rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1, 13, 4096])
def test_mean_is_the_mean(
    dtype: torch.dtype, limit: int, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "_IDS", limit)
    stored, new = rows.to(dtype), many(60)
    new.bags[20] = []  # padding
    new.bags[21] = [3] * 40  # longer than a block
    found = run("mean", new, stored)
    for row, bag in zip(found, new.bags, strict=True):
        chosen = [stored[key].double() for key in bag] or [row.double() for row in stored]
        torch.testing.assert_close(
            row.double(), sum(chosen) / len(chosen), rtol=1e-5, atol=1e-6, check_dtype=False
        )


def test_only_padding(rows: torch.Tensor) -> None:
    found = run("mean", pieces([[], []], [None, None]), rows)
    torch.testing.assert_close(found, rows.mean(0).expand(2, -1))


def test_mean_norm_has_the_direction_of_the_mean_and_the_norm_of_its_script(
    rows: torch.Tensor,
) -> None:
    han, latin = OLD_TEXTS.index(HAN[0]), OLD_TEXTS.index(LATIN[0])
    cases = {
        "一丁": ([han, han + 1], 3.0),
        "āb": ([latin, latin + 1], 1.0),
        "一b丁": ([han, latin, han + 1], 3.0),  # most letters are Han
        "αβ": ([2, 3], 1.0),  # ten Greek rows are too few: the median of all
        "한": ([4, 5, 6], 1.0),  # a script that the source does not know
        "！": ([7, 8], 1.0),
    }
    new = pieces([bag for bag, _ in cases.values()], list(cases))
    means, found = run("mean", new, rows), run("mean_norm", new, rows)
    everything = rows[2:].norm(dim=1).median().item()
    assert everything == pytest.approx(1.0)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([n for _, n in cases.values()]))
    cosine = torch.nn.functional.cosine_similarity(means, found)
    torch.testing.assert_close(cosine, torch.ones(len(cases)))
    assert means[0].norm() < 2.9  # it was shorter


def test_mean_norm_leaves_padding_and_zeros_alone(rows: torch.Tensor) -> None:
    rows[5] = 0
    new = pieces([[], [5]], [None, "한"])
    found = run("mean_norm", new, rows)
    torch.testing.assert_close(found[0], rows.mean(0))
    assert not found[1].any()


def test_multivariate_has_mean_and_covariance_of_the_old_rows(rows: torch.Tensor) -> None:
    count = 20_000
    new = pieces([[1]] * count, [None] * count)
    found = run("multivariate", new, rows).double()
    stored = rows.double()
    center = stored.mean(0)
    covariance = (stored - center).T @ (stored - center) / len(rows)
    scale = strategies.COVARIANCE_SHARE
    spread = (found - found.mean(0)).T @ (found - found.mean(0)) / count
    deviation = covariance.diagonal().max().sqrt() * scale**0.5
    assert (found.mean(0) - center).abs().max() < 5 * deviation / count**0.5
    error = (spread / scale - covariance).abs().max() / covariance.diagonal().max()
    assert error < 0.05
    assert covariance.abs().triu(1).max() / covariance.diagonal().max() > 0.1  # not just a diagonal


@pytest.mark.parametrize("rank", [0, 1, 8, 64])
def test_the_factor_is_one_of_the_covariance_singular_or_not(rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    deviation = torch.randn(rank, 64, generator=generator)
    covariance = deviation.T @ deviation
    factor = strategies._cholesky(covariance)
    error = (factor @ factor.T - covariance).abs().max()
    assert error <= 1e-3 * covariance.diagonal().max() + 1e-30


@pytest.mark.parametrize("kind", ["fewer rows than columns", "all alike", "zeros"])
def test_multivariate_of_a_singular_covariance(kind: str) -> None:
    chosen = {
        "fewer rows than columns": torch.randn(5, 64, generator=torch.Generator().manual_seed(1)),
        "all alike": torch.ones(40, 64),
        "zeros": torch.zeros(40, 64),
    }[kind]
    new = NewPieces([[0]] * 30, [None] * 30, [None] * len(chosen))
    found = run("multivariate", new, chosen)
    assert torch.isfinite(found).all()
    assert (found - chosen.mean(0)).abs().max() < 0.1


def test_multivariate_names_numbers_that_are_not_finite(rows: torch.Tensor) -> None:
    rows[3, 4] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        run("multivariate", many(5), rows)


def test_random_is_normal_around_zero(rows: torch.Tensor) -> None:
    found = run("random", many(5000), rows)
    assert abs(found.mean()) < 1e-3
    assert found.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", ["multivariate", "random"])
def test_the_seed_decides(name: str, rows: torch.Tensor) -> None:
    first, again, other = (run(name, many(50), rows, seed) for seed in ("1", "1", "2"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 50  # every row is a sample of its own


@pytest.mark.parametrize("name", ["mean", "mean_norm"])
def test_means_ignore_the_seed(name: str, rows: torch.Tensor) -> None:
    assert torch.equal(run(name, many(50), rows, "1"), run(name, many(50), rows, "2"))


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("你好", "CJK"),
        (" señor", "LATIN"),
        ("Ж", "CYRILLIC"),
        ("のは", "HIRAGANA"),
        ("한국", "HANGUL"),
        ("好的ok！", "CJK"),
        ("123，", None),
        ("", None),
        (None, None),
        ("\ue000", None),
    ],
)
def test_scripts(text: str | None, script: str | None) -> None:
    assert script_of(text) == script


def test_old_rows_are_not_changed(rows: torch.Tensor) -> None:
    before = rows.clone()
    for name in STRATEGIES:
        run(name, many(30), rows)
    assert torch.equal(rows, before)


def test_a_strategy_is_a_function_and_a_row(
    rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy: Callable[..., object] = lambda old: iter([old.rows[: len(old.pieces.bags)] * 2])  # noqa: E731
    monkeypatch.setitem(STRATEGIES, "double", strategy)  # type: ignore[arg-type]
    assert torch.equal(run("double", many(4), rows), rows[:4] * 2)
