"""The network: causal, of the stated size, starting at ln(vocabulary), the same by either kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import snakegpt.model
import torch
from snakegpt.model import (
    GPT,
    AttentionKernel,
    KeyValueCache,
    Shape,
    choose_kernel,
    flops_per_token,
    initialise,
    n_parameters,
    padded_vocabulary,
)
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

SHAPE = Shape(vocabulary=40, layers=2, heads=2, channels=16, context=12)
MODERN = replace(SHAPE, architecture="modern", bias=False, softcap=15.0)
UNTIED = replace(MODERN, tied=False, softcap=None)
EVERY = pytest.mark.parametrize("shape", [SHAPE, MODERN, UNTIED], ids=["gpt2", "modern", "untied"])
GPT2 = Shape(vocabulary=50257, layers=12, heads=12, channels=768, context=1024)


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


def drawn(shape: Shape, kernel: AttentionKernel = "sdpa", loss: str = "plain") -> GPT:
    """A model of which nothing is zero, unlike one that is about to be trained."""
    model = GPT(shape, kernel, loss)
    draws = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=draws)
    return model.eval()


@EVERY
def test_a_position_does_not_see_what_follows(shape):
    model = drawn(shape)
    before, after = ids(), ids()
    after[:, 7:] = (after[:, 7:] + 1) % 40
    difference = (model(before) - model(after)).abs().amax(dim=(0, 2))
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


@EVERY
def test_logits_and_losses_have_their_shapes(shape):
    model = drawn(shape)
    assert model(ids()).shape == (2, 12, 40)
    losses = model(ids(), ids())
    assert losses.shape == (2, 12)
    by_hand = -model(ids()).log_softmax(-1).gather(-1, ids().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses, by_hand)


@EVERY
def test_an_untrained_model_is_as_surprised_as_by_chance(shape):
    model = initialise(GPT(shape), 0).eval()
    assert model(ids(64), ids(64).flip(1)).mean().item() == pytest.approx(math.log(40), abs=0.05)


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, bias=False), MODERN, UNTIED])
def test_the_parameter_count_is_that_of_the_model(shape):
    model = GPT(shape)
    assert n_parameters(shape) == sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in (*model.blocks.parameters(), *model.final_norm.parameters()))
    assert n_parameters(shape, embeddings=False) == inside


@EVERY
def test_arithmetic_is_what_torch_counts(shape):
    """But for biases and norms, which count as the products they are not."""
    model = drawn(shape, "math").train()
    with FlopCounterMode(display=False) as counter:
        model(ids(1), ids(1)).mean().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert (flops_per_token(shape) - 6 * vectors) * 12 == counter.get_total_flops()


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


@EVERY
@pytest.mark.parametrize("masked", [False, True])
def test_both_kernels_compute_the_same(shape, masked):
    documents = torch.tensor([[0] * 4 + [1] * 8, [0] * 11 + [1]]) if masked else None
    fused, written_out = drawn(shape, "sdpa"), drawn(shape, "math")
    one, other = (model(ids(), documents_BT=documents) for model in (fused, written_out))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("kernel", ["sdpa", "math"])
def test_the_cache_changes_nothing(shape, kernel):
    model = drawn(shape, kernel)
    whole = model(ids())
    cache = KeyValueCache(shape, 2)
    pieces = [model(piece, cache=cache) for piece in ids().split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
def test_masked_documents_are_as_if_alone(kernel):
    """Rotary positions see distances only, so a document in a window is what it is by itself."""
    model, x = drawn(MODERN, kernel), ids(1)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    together = model(x, documents_BT=documents)
    alone = torch.cat([model(piece) for piece in x.split([5, 4, 3], dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, model(x), atol=1e-3)


def test_a_masked_document_is_the_same_whatever_stands_before_it():
    model, before, after = drawn(SHAPE), ids(1), ids(1)
    after[:, :6] = (after[:, :6] + 1) % 40
    documents = torch.tensor([[0] * 6 + [1] * 6])
    one, other = (model(x, documents_BT=documents) for x in (before, after))
    assert torch.equal(one[:, 6:], other[:, 6:]) and not torch.equal(one[:, :6], other[:, :6])


@EVERY
def test_chunked_losses_change_no_gradient(shape):
    gradients = []
    for loss in ("plain", "chunked"):
        model = drawn(shape, loss=loss)
        model(ids(), ids()).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_a_compiled_model_has_the_same_gradients(loss):
    """Traced and differentiated ahead of time, as for inductor; without its compiler, which is slow."""
    gradients = []
    for compiled in (False, True):
        model = drawn(MODERN, loss=loss)
        network = torch.compile(model, backend="aot_eager") if compiled else model
        network(ids(), ids(), documents_BT=ids() // 10).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_forbids_what_the_mask_forbids(monkeypatch):
    """By its own slow way: its kernel is for GPUs, and so is its backward pass."""
    monkeypatch.setattr(snakegpt.model, "flex", lambda: flex_attention)
    documents = torch.tensor([[0] * 4 + [1] * 8, [0] * 11 + [1]])
    with torch.no_grad():
        blocks, mask = (
            drawn(MODERN, kernel)(ids(), documents_BT=documents) for kernel in ("flex", "sdpa")
        )
    torch.testing.assert_close(blocks, mask, atol=1e-5, rtol=1e-5)


def test_softly_capped_logits_stay_below_the_cap():
    model = drawn(replace(MODERN, softcap=0.5))
    plain = drawn(replace(MODERN, softcap=None))
    assert plain(ids()).abs().max() > 1 and model(ids()).abs().max() < 0.5
    torch.testing.assert_close(model(ids()), 0.5 * torch.tanh(plain(ids()) / 0.5))


def test_modern_starts_by_adding_nothing():
    weights = initialise(GPT(UNTIED), 0).state_dict()
    assert not weights["head.weight"].any()
    assert not any(w.any() for name, w in weights.items() if name.endswith("projection.weight"))
    assert float(weights["blocks.0.attention.qkv.weight"].std()) == pytest.approx(1 / 4, rel=0.1)


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


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_gradients_agree_with_finite_differences(architecture, monkeypatch):
    shape = Shape(vocabulary=7, layers=1, heads=1, channels=4, context=3)
    if architecture == "modern":
        shape = replace(shape, architecture="modern", bias=False, tied=False, softcap=2.0)
        # Everything in float64, where differences of 1e-5 are seen.
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())
    model = drawn(shape, "math").double()
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
    assert choose_kernel("cuda", torch.bfloat16, 64, masks_documents=True) == "flex"
    assert choose_kernel("cpu", torch.float32, 64, masks_documents=True) == "sdpa"
