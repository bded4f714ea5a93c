"""The chunked cross-entropy against the plain one and against finite differences."""

from __future__ import annotations

import pytest
import torch
from snakegpt import losses
from snakegpt.losses import choose_loss, mean_loss, token_losses

N, C, V = 11, 6, 50


@pytest.fixture(autouse=True)
def chunks_of_three_tokens(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 3 * V)


def loss_and_gradients(kernel, softcap):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=draws, requires_grad=True)
    head = torch.randn(V, C, generator=draws, requires_grad=True)
    targets = torch.randint(V, (N,), generator=draws)
    found = mean_loss(x, head, targets, softcap, kernel)
    (3 * found).backward()
    return found.detach(), x.grad, head.grad


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_change_nothing(softcap):
    plain, chunked = (loss_and_gradients(kernel, softcap) for kernel in ("plain", "chunked"))
    for wanted, found in zip(plain, chunked, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiler_is_given_computes_the_same(softcap, dtype):
    scores = 4 * torch.randn(N, V, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = torch.arange(N)
    wanted = losses._losses_and_slopes(scores.clone(), targets, softcap, True)
    for one, other in zip(losses._fusible(scores, targets, softcap, True), wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_losses_of_single_tokens_have_the_gradients_of_the_plain_way(softcap):
    weights, targets = torch.linspace(-1, 3, N), torch.arange(N)
    x, head = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    plain, chunked = (
        torch.autograd.grad(
            (token_losses(x, head, targets, softcap, kernel) * weights).sum(), [x, head]
        )
        for kernel in ("plain", "chunked")
    )
    for wanted, found in zip(plain, chunked, strict=True):
        assert found.abs().sum() > 0
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_loss_by_hand():
    found, *_ = loss_and_gradients("chunked", 2.0)
    draws = torch.Generator().manual_seed(0)
    x, head = torch.randn(N, C, generator=draws), torch.randn(V, C, generator=draws)
    targets = torch.randint(V, (N,), generator=draws)
    probability = (2 * torch.tanh(x @ head.T / 2)).softmax(dim=1)
    torch.testing.assert_close(found, -probability[range(N), targets].log().mean())


def test_bfloat16_products_are_those_of_the_plain_way():
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_and_gradients("plain", None)
        chunked = loss_and_gradients("chunked", None)
    for wanted, found in zip(plain, chunked, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_without_gradients_none_are_made():
    with torch.no_grad():
        found = token_losses(
            torch.ones(N, C), torch.ones(V, C), torch.zeros(N).long(), None, "chunked"
        )
    torch.testing.assert_close(found, torch.full((N,), float(torch.tensor(V).log())))


def test_the_logits_are_never_held_whole():
    """By the largest tensor that is made: no more elements than a chunk of logits or the head."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                largest = max(largest, made.numel())
            return made

    with Watch():
        loss_and_gradients("chunked", 2.0)
    assert largest == V * C  # and a chunk has V x 3


def test_small_vocabularies_are_plain_and_large_ones_chunked():
    assert choose_loss(65, 768, torch.float32) == "plain"
    assert choose_loss(50_304, 2048, torch.bfloat16) == "chunked"
    assert choose_loss(50_304, 2048, torch.float16) == "plain"
