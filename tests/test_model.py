"""The network: causal, of the stated size, starting at ln(vocabulary), the same by either kernel."""

from __future__ import annotations

import math

import pytest
import torch
from snakegpt.model import (
    GPT,
    KeyValueCache,
    Shape,
    choose_kernel,
    flops_per_token,
    initialise,
    n_parameters,
    padded_vocabulary,
)

SHAPE = Shape(vocabulary=40, layers=2, heads=2, channels=16, context=12)
GPT2 = Shape(vocabulary=50257, layers=12, heads=12, channels=768, context=1024)


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


def test_a_position_does_not_see_what_follows():
    model = initialise(GPT(SHAPE), 0).eval()
    before, after = ids(), ids()
    after[:, 7:] = (after[:, 7:] + 1) % 40
    difference = (model(before) - model(after)).abs().amax(dim=(0, 2))
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


def test_logits_and_losses_have_their_shapes():
    model = GPT(SHAPE)
    assert model(ids()).shape == (2, 12, 40)
    losses = model(ids(), ids())
    assert losses.shape == (2, 12)
    by_hand = -model(ids()).log_softmax(-1).gather(-1, ids().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses, by_hand)


def test_an_untrained_model_is_as_surprised_as_by_chance():
    model = initialise(GPT(SHAPE), 0).eval()
    assert model(ids(64), ids(64).flip(1)).mean().item() == pytest.approx(math.log(40), abs=0.05)


@pytest.mark.parametrize("bias", [True, False])
def test_the_parameter_count_is_that_of_the_model(bias):
    shape = Shape(vocabulary=40, layers=3, heads=2, channels=16, context=12, bias=bias)
    assert n_parameters(shape) == sum(p.numel() for p in GPT(shape).parameters())


def test_gpt2_has_its_published_size():
    assert n_parameters(GPT2) == 124_439_808
    assert n_parameters(GPT2, embeddings=False) == 124_439_808 - (50257 + 1024) * 768
    # 854.65 MFLOP a token at vocabulary 50,304, as nanoGPT's formula gives it without biases.
    shape = Shape(vocabulary=50304, layers=12, heads=12, channels=768, context=1024, bias=False)
    assert flops_per_token(shape) == pytest.approx(854.65e6, rel=1e-3)


@pytest.mark.parametrize(
    ("n_vocab", "multiple", "padded"), [(50257, 64, 50304), (64, 64, 64), (65, 1, 65)]
)
def test_the_vocabulary_is_padded_up(n_vocab, multiple, padded):
    assert padded_vocabulary(n_vocab, multiple) == padded


def test_both_kernels_compute_the_same():
    fused = initialise(GPT(SHAPE, "sdpa"), 0).eval()
    written_out = initialise(GPT(SHAPE, "math"), 0).eval()
    torch.testing.assert_close(fused(ids()), written_out(ids()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
def test_the_cache_changes_nothing(kernel):
    model = initialise(GPT(SHAPE, kernel), 0).eval()
    whole = model(ids())
    cache = KeyValueCache(SHAPE, 2)
    pieces = [model(piece, cache=cache) for piece in ids().split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-6, rtol=1e-5)


def test_first_weights_are_a_function_of_the_seed():
    one, same, other = (initialise(GPT(SHAPE), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])


def test_residual_projections_start_smaller():
    shape = Shape(vocabulary=100, layers=8, heads=4, channels=128, context=8)
    weights = initialise(GPT(shape), 0).state_dict()
    assert float(weights["blocks.3.mlp.expansion.weight"].std()) == pytest.approx(0.02, rel=0.02)
    smaller = float(weights["blocks.3.mlp.projection.weight"].std())
    assert smaller == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 x 8 layers) = 4


def test_gradients_agree_with_finite_differences():
    shape = Shape(vocabulary=7, layers=1, heads=1, channels=4, context=3)
    model = initialise(GPT(shape, "math"), 0).double()
    x, y = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])

    def loss() -> torch.Tensor:  # in float64, unlike the model's own
        return torch.nn.functional.cross_entropy(model(x)[0], y[0])

    loss().backward()
    weight = model.blocks[0].attention.qkv.weight
    for row, column in ((0, 0), (5, 2), (11, 3)):
        with torch.no_grad():
            weight[row, column] += 1e-5
            above = float(loss())
            weight[row, column] -= 2e-5
            below = float(loss())
            weight[row, column] += 1e-5
        assert float(weight.grad[row, column]) == pytest.approx(
            (above - below) / 2e-5, rel=1e-4, abs=1e-9
        )


def test_short_bfloat16_attention_on_cpu_is_written_out():
    assert choose_kernel("cpu", torch.bfloat16, 256) == "math"
    assert choose_kernel("cpu", torch.bfloat16, 1024) == "sdpa"
    assert choose_kernel("cpu", torch.float32, 64) == "sdpa"
    assert choose_kernel("cuda", torch.bfloat16, 64) == "sdpa"
