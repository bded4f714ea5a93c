"""The chunked cross-entropy against the plain one and against finite differences."""

from __future__ import annotations

import pytest
import torch
from snakegpt import losses
from snakegpt.losses import choose_loss, token_losses

N, C, V = 11, 6, 50


@pytest.fixture(autouse=True)
def chunks_of_three_tokens(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 3 * V)


def losses_and_gradients(kernel, softcap, weights=None):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=draws, requires_grad=True)
    head = torch.randn(V, C, generator=draws, requires_grad=True)
    targets = torch.randint(V, (N,), generator=draws)
    found = token_losses(x, head, targets, softcap, kernel)
    (found.mean() if weights is None else (found * weights).sum()).backward()
    return found.detach(), x.grad, head.grad


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_change_nothing(softcap, weighted):
    weights = torch.linspace(-1, 3, N) if weighted else None
    plain = losses_and_gradients("plain", softcap, weights)
    chunked = losses_and_gradients("chunked", softcap, weights)
    for wanted, found in zip(plain, chunked, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_loss_by_hand():
    found, *_ = losses_and_gradients("chunked", 2.0)
    draws = torch.Generator().manual_seed(0)
    x, head = torch.randn(N, C, generator=draws), torch.randn(V, C, generator=draws)
    targets = torch.randint(V, (N,), generator=draws)
    probability = (2 * torch.tanh(x @ head.T / 2)).softmax(dim=1)
    torch.testing.assert_close(found, -probability[range(N), targets].log())


def test_bfloat16_products_are_those_of_the_plain_way():
    with torch.autocast("cpu", torch.bfloat16):
        plain = losses_and_gradients("plain", None)
        chunked = losses_and_gradients("chunked", None)
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
        losses_and_gradients("chunked", 2.0)
    assert largest == V * C  # and a chunk has V x 3


def test_small_vocabularies_are_plain_and_large_ones_chunked():
    assert choose_loss(65, 768, torch.float32) == "plain"
    assert choose_loss(50_304, 2048, torch.bfloat16) == "chunked"
    assert choose_loss(50_304, 2048, torch.float16) == "plain"
