"""NEFTune: noise of the right size, on tokens only, the same wherever a row is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colossal_llama.training.neftune import NoisyEmbeddings

WIDTH = 16
LENGTHS = [3, 40, 17, 40, 8, 25]


class Model(nn.Module):
    """Gives its embeddings back: all that the noise touches."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(100, WIDTH).to(dtype)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.embeddings(input_ids)


def batch(samples: list[int], width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of ``LENGTHS``, padded to the longest or to ``width``."""
    lengths = torch.tensor([LENGTHS[sample] for sample in samples])
    positions = torch.arange(width or int(lengths.max())).expand(len(samples), -1)
    ids = positions + torch.tensor(samples)[:, None]
    return {"input_ids": ids, "attention_mask": (positions < lengths[:, None]).long()}


def lengths_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["attention_mask"].sum(dim=1)


def noise_of(
    micro_batches: list[dict[str, torch.Tensor]],
    first: int = 0,
    alpha: float = 5.0,
    seed: int = 1,
) -> list[torch.Tensor]:
    """For every row of a step that begins with sample ``first``: its noise, [length, WIDTH]."""
    model = Model()
    plain = model.embeddings.weight.detach().clone()
    noisy = NoisyEmbeddings(model, alpha, seed)
    noisy.start_step(first)
    found = []
    for inputs in micro_batches:
        lengths = lengths_of(inputs)
        noisy.expect(lengths)
        noise = model(**inputs).detach() - plain[inputs["input_ids"]]
        padding = inputs["attention_mask"] == 0
        assert not noise[padding].any(), "padding got noise"
        found += [row[:length] for row, length in zip(noise, lengths.tolist(), strict=True)]
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    # The noise is measured by subtraction, which rounds.
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("alpha", [1.0, 5.0, 15.0])
def test_noise_is_uniform_up_to_its_bound(alpha: float) -> None:
    for length in (1, 10, 500):
        noise = NoisyEmbeddings(Model(), alpha, seed=3).row_noise(7, length, WIDTH)
        bound = alpha / (length * WIDTH) ** 0.5
        assert noise.shape == (length, WIDTH)
        assert noise.abs().max() <= bound
        if length == 500:
            # A uniform variable's mean is 0 and its deviation its bound divided by sqrt(3).
            assert float(noise.mean()) == pytest.approx(0, abs=0.03 * bound)
            assert float(noise.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


def test_each_row_has_the_bound_of_its_own_length() -> None:
    """The padded length, the longest of the batch, would make short rows' noise too small."""
    for row, length in zip(noise_of([batch([0, 1, 2, 3, 4, 5])]), LENGTHS, strict=True):
        bound = 5.0 / (length * WIDTH) ** 0.5
        assert 0.9 * bound < float(row.abs().max()) <= bound + 1e-6


def test_padding_and_micro_batches_change_nothing() -> None:
    whole = noise_of([batch([0, 1, 2, 3, 4, 5])])
    assert same(whole, noise_of([batch([0, 1, 2, 3, 4, 5], width=64)]))
    assert same(whole, noise_of([batch([0, 1]), batch([2, 3]), batch([4, 5])]))
    assert same(whole, noise_of([batch([sample]) for sample in range(6)]))


def test_ranks_that_divide_a_step_add_the_noise_of_one_process() -> None:
    whole = noise_of([batch([0, 1, 2, 3, 4, 5])])
    halves = noise_of([batch([0, 1, 2])], first=0) + noise_of([batch([3, 4, 5])], first=3)
    assert same(whole, halves)


def test_samples_and_seeds_differ_and_repeat() -> None:
    first = noise_of([batch([1, 3])])
    assert not same(first[:1], first[1:]), "two samples of one length have the same noise"
    for seed in (2, -1, 1 + 2**32, 1 + 2**63):
        assert not same(first, noise_of([batch([1, 3])], seed=seed)), seed
    assert not same(first, noise_of([batch([1, 3])], first=2))
    assert same(first, noise_of([batch([1, 3])]))


def test_noise_does_not_disturb_other_random_numbers() -> None:
    states = []
    for alpha in (5.0, None):
        torch.manual_seed(0)
        model = Model()
        if alpha:
            NoisyEmbeddings(model, alpha, seed=1).expect(lengths_of(batch([0, 1])))
        model(**batch([0, 1]))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_evaluation_has_no_noise() -> None:
    model, inputs = Model().eval(), batch([0, 1])
    NoisyEmbeddings(model, 5.0, seed=1).expect(lengths_of(inputs))
    assert torch.equal(model(**inputs), model.embeddings.weight[inputs["input_ids"]])


def test_weights_and_what_is_saved_stay_as_they_are() -> None:
    model, clean = Model(torch.bfloat16), Model(torch.bfloat16)
    NoisyEmbeddings(model, 5.0, seed=1).expect(lengths_of(batch([0, 1])))
    assert model(**batch([0, 1])).dtype == torch.bfloat16
    assert model.state_dict().keys() == clean.state_dict().keys()
    assert torch.equal(model.embeddings.weight, clean.embeddings.weight)


def test_noise_reaches_the_gradients_of_the_embeddings() -> None:
    model = Model()
    NoisyEmbeddings(model, 5.0, seed=1).expect(lengths_of(batch([0])))
    model(**batch([0])).square().sum().backward()
    assert model.embeddings.weight.grad is not None
    used = model.embeddings.weight.grad.abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == [0, 1, 2]


def test_a_llama_gets_the_noise() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    inputs = batch([0, 1])
    clean = llama(**inputs).logits
    noisy = NoisyEmbeddings(llama, 5.0, seed=1)
    noisy.expect(lengths_of(inputs))
    noisy.start_step(0)
    first = llama(**inputs).logits
    assert not torch.allclose(clean, first)
    # As a pipeline hands it on: among the model's own arguments.
    noisy.expect(torch.tensor([]))
    noisy.start_step(0)
    assert torch.equal(first, llama(**inputs, length=lengths_of(inputs)).logits)
    assert torch.equal(clean, llama.eval()(**inputs).logits)
