"""Old rows of embeddings have no gradient and do not decay; the plugins are in integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colossal_llama.training import new_rows
from colossal_llama.training.new_rows import NewRows
from tests.training.test_parameters import model

OLD = 20  # of 50


def gradients(llama: Any) -> list[torch.Tensor]:
    llama.zero_grad()
    ids = torch.arange(10, 40)[None]
    llama(input_ids=ids, labels=ids).loss.backward()
    return [w.grad.clone() for w in new_rows.embedding_weights(llama)]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_old_rows_are_zero_and_those_of_new_ones_unchanged(tied: bool) -> None:
    llama = model(tied=tied)
    before = gradients(llama)
    NewRows(OLD, 0.1).mask(llama)
    for whole, masked in zip(before, gradients(llama), strict=True):
        assert whole[:OLD].any()
        assert not masked[:OLD].any()
        assert torch.equal(masked[OLD:], whole[OLD:])


def test_old_rows_hide_what_is_not_finite() -> None:
    gradient = torch.full((4, 2), torch.nan)
    gradient[3] = 1
    masked = new_rows._without_first_rows(3, gradient)
    assert masked.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert gradient.isnan().any(), "autograd's own is left as it is"


@pytest.mark.parametrize(
    ("rank", "first"), [(0, 50 * 8), (1, 10 * 8), (2, 0)], ids=["old", "both", "new"]
)
def test_rows_divided_among_processes(
    monkeypatch: pytest.MonkeyPatch, rank: int, first: int
) -> None:
    monkeypatch.setattr(new_rows.dist, "get_rank", lambda group: rank)
    llama = model()
    before = gradients(llama)
    rows = NewRows(60, 0.1)  # of 150, of which this process has 50
    rows.mask(llama, tensor_group=object())
    assert [place for _, place in rows._first] == [first, first]
    for whole, masked in zip(before, gradients(llama), strict=True):
        assert not masked[: first // 8].any()
        assert torch.equal(masked[first // 8 :], whole[first // 8 :])


def test_new_rows_decay_and_old_ones_stay_bit_for_bit() -> None:
    llama = model()
    rows = NewRows(OLD, 0.5)
    rows.mask(llama)
    inner = torch.optim.AdamW(llama.parameters(), lr=0.1, weight_decay=0.0)
    rows.decay_in(SimpleNamespace(optim=inner))
    gradients(llama)
    weights = new_rows.embedding_weights(llama)
    before = [weight.detach().clone() for weight in weights]
    plain = [weight.detach().clone().requires_grad_() for weight in weights]
    reference = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.5)
    for copy, weight in zip(plain, weights, strict=True):
        copy.grad = weight.grad.clone()
    inner.step()
    reference.step()
    for old, weight, wanted in zip(before, weights, plain, strict=True):
        assert torch.equal(weight[:OLD], old[:OLD])
        torch.testing.assert_close(weight[OLD:], wanted[OLD:])
        assert not inner.state[weight]["exp_avg"][:OLD].any()


def test_a_share_that_zero_cuts_out_of_the_middle_decays_in_part() -> None:
    weight = torch.nn.Parameter(torch.ones(10, 4))
    for rank, kept in ((0, 20), (1, 4)):  # the first new element is 24
        master = torch.ones(20)
        optimizer = SimpleNamespace(
            optim=torch.optim.SGD([master], lr=0.5),
            working_to_master_param={id(weight): master},
            pid_to_bucket_store={id(weight): SimpleNamespace(local_rank=rank)},
        )
        rows = NewRows(6, 0.5)
        rows._first.append((weight, 24))
        rows.decay_in(optimizer)
        optimizer.optim.step()
        assert (master[:kept] == 1).all()
        assert (master[kept:] == 0.75).all()


def test_a_frozen_embedding_is_left_alone() -> None:
    llama = model()
    llama.lm_head.weight.requires_grad = False
    rows = NewRows(OLD, 0.1)
    rows.mask(llama)
    rows.decay_in(SimpleNamespace(optim=torch.optim.AdamW(llama.parameters())))
    assert len(rows._shares) == 1
