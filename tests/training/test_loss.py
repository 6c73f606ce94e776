"""The loss of every token: torch's cross-entropy, however tokens and vocabulary are divided."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_llama.training import loss as loss_module
from colossal_llama.training.loss import TokenLoss, next_tokens
from tests.training.stand_ins import run_processes

BATCH, LENGTH, VOCABULARY, WIDTH = 3, 7, 11, 5


def some_labels() -> torch.Tensor:
    """One row with all kinds of places, one without loss, one with all."""
    torch.manual_seed(3)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels[0, [0, 2, 5]] = -100
    labels[1] = -100
    return labels


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The definition, token by token, in float64."""
    losses = torch.zeros(labels.shape, dtype=torch.float64)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            wanted = int(labels[row, place + 1])
            if wanted != -100:
                losses[row, place] = -logits[row, place].double().log_softmax(0)[wanted]
    return losses


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.half, 1e-6)],
)
def test_is_the_cross_entropy_of_the_next_token(dtype: torch.dtype, tolerance: float) -> None:
    """In float32 whatever the logits are in: their rounding is the model's, not the loss's."""
    labels = some_labels()
    logits = torch.randn(BATCH, LENGTH, VOCABULARY).mul(5).to(dtype)
    losses = TokenLoss(VOCABULARY)(logits, labels)
    assert losses.dtype == torch.float32
    assert losses.shape == labels.shape
    torch.testing.assert_close(
        losses.double(), reference(logits, labels), rtol=tolerance, atol=tolerance
    )


def test_zero_where_there_is_no_loss() -> None:
    labels = some_labels()
    losses = TokenLoss(VOCABULARY)(torch.randn(BATCH, LENGTH, VOCABULARY), labels)
    assert torch.equal(losses > 0, next_tokens(labels) != -100)
    assert not losses[1].any()
    assert not losses[:, -1].any()


def test_next_tokens_follow() -> None:
    labels = torch.tensor([[5, 6, -100, 7]])
    assert next_tokens(labels).tolist() == [[6, -100, 7, -100]]
    assert next_tokens(labels[:, :1]).tolist() == [[-100]]


def test_rows_without_loss_have_no_gradient() -> None:
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, requires_grad=True)
    TokenLoss(VOCABULARY)(logits, some_labels()).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(dim=2) > 0, next_tokens(some_labels()) != -100)


def test_gradients_are_those_of_the_function() -> None:
    """In float32 inside, so differences are not taken too small."""
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, dtype=torch.float64, requires_grad=True)
    function = partial(TokenLoss(VOCABULARY), labels=some_labels())
    assert torch.autograd.gradcheck(function, logits, eps=1e-2, atol=1e-3, rtol=1e-2)


def a_head(dtype: torch.dtype = torch.float32, rows: int = VOCABULARY) -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(WIDTH, rows, bias=False).to(dtype)


def fused_and_plain(
    dtype: torch.dtype, labels: torch.Tensor, weights: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """Losses, gradient of the hidden states and of the head; fused, then with whole logits."""
    found = []
    for fused in (True, False):
        head = a_head(dtype)
        torch.manual_seed(5)
        hidden = torch.randn(*labels.shape, WIDTH).to(dtype).requires_grad_()
        if fused:
            losses = TokenLoss(VOCABULARY, head=head)(hidden, labels)
        else:
            losses = TokenLoss(VOCABULARY)(head(hidden), labels)
        (losses * weights).sum().backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        found.append((losses.detach(), hidden.grad, head.weight.grad))
    return found


@pytest.mark.parametrize("tokens_at_a_time", [1, 2, 5, 20, 21, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.half, 2e-3)]
)
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tokens_at_a_time: int, dtype: torch.dtype, tolerance: float
) -> None:
    """But for the head's gradient: in half precision its parts are added up in another order."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", tokens_at_a_time * VOCABULARY)
    weights = torch.rand(BATCH, LENGTH)
    fused, plain = fused_and_plain(dtype, some_labels(), weights)
    for name, ours, theirs in zip(("loss", "hidden", "head"), fused, plain, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_gradients_of_chunks_are_those_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 4 * VOCABULARY)
    labels = some_labels()
    hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)

    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return TokenLoss(VOCABULARY, head=SimpleNamespace(weight=weight))(hidden, labels)

    assert torch.autograd.gradcheck(function, (hidden, weight), eps=1e-2, atol=2e-3, rtol=1e-2)


def test_chunks_leave_out_rows_that_are_padding() -> None:
    """A plugin makes the vocabulary divide; the added rows are nobody's tokens."""
    labels, hidden = some_labels(), torch.randn(BATCH, LENGTH, WIDTH)
    padded, head = a_head(rows=VOCABULARY + 5), a_head()
    with torch.no_grad():
        padded.weight[:VOCABULARY] = head.weight
    losses = TokenLoss(VOCABULARY, head=padded)(hidden, labels)
    torch.testing.assert_close(losses, TokenLoss(VOCABULARY)(head(hidden), labels))


def most_held(function: Any) -> int:
    """Bytes of the memory that ``function`` has allocated at its peak."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    held = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, width = 512, 2000, 8
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 32 * vocabulary)
    labels = torch.randint(vocabulary, (1, tokens))
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    logits = 4 * tokens * vocabulary  # bytes in float32

    def plain() -> None:
        TokenLoss(vocabulary)(head(hidden), labels).sum().backward()

    def fused() -> None:
        TokenLoss(vocabulary, head=head)(hidden, labels).sum().backward()

    assert most_held(plain) > 2 * logits
    assert most_held(fused) < logits / 3


def test_gemini_s_own_tensors_are_taken_for_plain_ones() -> None:
    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, *arguments: Any) -> Any:
            raise AssertionError(f"{function} of a tensor that reimplements it")

    logits = torch.randn(BATCH, LENGTH, VOCABULARY)
    with torch._C.DisableTorchFunctionSubclass():
        odd = logits.as_subclass(Odd)
    assert torch.equal(
        TokenLoss(VOCABULARY)(odd, some_labels()), TokenLoss(VOCABULARY)(logits, some_labels())
    )


@pytest.fixture(scope="module", params=[2, 3])
def divided(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two and three processes find with a part of the vocabulary or of the tokens each."""
    return run_processes("loss_worker", request.param, tmp_path_factory.mktemp("loss"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", ["uneven", "last is empty", "first is empty"])
def test_divided_vocabulary(divided: list[Any], shards: str, dtype: str) -> None:
    for found in divided:
        # Losses are alike on all processes, gradients are of each one's own logits.
        assert found[f"{shards} {dtype} loss"] < 1e-5
        assert found[f"{shards} {dtype} gradient"] < (1e-6 if dtype == "float32" else 5e-3)


def test_divided_vocabulary_passes_gradcheck(divided: list[Any]) -> None:
    assert all(found["gradcheck"] for found in divided)


def test_losses_are_alike_on_all_processes(divided: list[Any]) -> None:
    assert all(found["losses"] == divided[0]["losses"] for found in divided)


def test_logits_of_any_size(divided: list[Any]) -> None:
    """The maximum over all processes is taken off before exponentials are taken."""
    assert all(found["huge"] < 1e-5 for found in divided)


def test_divided_sequence(divided: list[Any]) -> None:
    """The label of a slice's last token is the first of the next slice."""
    assert all(found["sequence"] == 0 for found in divided)
    assert all(found["sequence fused"] < 1e-5 for found in divided)
