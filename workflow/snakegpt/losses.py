"""Cross-entropy of a linear head, written out or without ever holding the logits of a large vocabulary.

torch 2.13's own `linear_cross_entropy` is not faster where it was measured (2,048 tokens of 50,304 ids, 768
channels, float32 on Zen 4: 10.6 s of CPU against 5.7 here, in 391 MB against 252; benchmarks/train.py), is
left alone by the compiler, and knows no soft cap.

Axes: N tokens, C channels, V vocabulary, R tokens of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LossKernel = Literal["plain", "chunked"]
MeanLoss = Callable[[Tensor, Tensor, Tensor, float | None, LossKernel], Tensor]

CHUNK_LOGITS = 1 << 23  # logits held at once: 32 MiB in float32
GPU_CHUNK_LOGITS = 1 << 29  # on a GPU: 10,000 tokens of GPT-2's, since fewer leave a large GPU idle
PLAIN_LOGITS = 1 << 25  # below it the plain way is quicker and takes little


def choose_loss(vocabulary: int, n_tokens: int, dtype: torch.dtype) -> LossKernel:
    """plain for few logits, chunked for many; `n_tokens` go through the network at once.

    float16 stays plain: chunks make gradients before a loss scale is known, and small ones would vanish.
    """
    few = vocabulary * n_tokens <= PLAIN_LOGITS
    return "plain" if few or dtype == torch.float16 else "chunked"


def token_losses(
    x_NC: Tensor, head_VC: Tensor, target_N: Tensor, softcap: float | None, kernel: LossKernel
) -> Tensor:
    """Cross-entropy of every target, nats (N,) float32, under softmax(cap(x head^T)).

    Matrix products are of autocast's type where it is on; everything else is float32. Gradients take the
    plain way, whatever the kernel: see `mean_loss`.
    """
    if kernel == "plain" or torch.is_grad_enabled():
        return F.cross_entropy(logits(x_NC, head_VC, softcap).float(), target_N, reduction="none")
    losses_N = torch.empty(len(target_N), device=x_NC.device)
    _chunked(x_NC, head_VC, target_N, _how(x_NC, softcap, compiled=False), losses_N)
    return losses_N


def mean_loss(
    x_NC: Tensor,
    head_VC: Tensor,
    target_N: Tensor,
    softcap: float | None,
    kernel: LossKernel,
    *,
    compiled: bool = False,
) -> Tensor:
    """Mean of `token_losses`, a scalar; the way to gradients that never holds the logits whole."""
    if kernel == "plain" or not torch.is_grad_enabled():
        return token_losses(x_NC, head_VC, target_N, softcap, kernel).mean()
    loss: Tensor = _ChunkedMean.apply(x_NC, head_VC, target_N, _how(x_NC, softcap, compiled))
    return loss


def mean_loss_of_compiled(kernel: LossKernel) -> MeanLoss:
    """What takes the place of `mean_loss` in a model that is compiled.

    The compiler leaves the loop over chunks alone, and makes one kernel of what is between its products.
    """
    if kernel == "plain":
        return mean_loss
    outside: MeanLoss = torch.compiler.disable(functools.partial(mean_loss, compiled=True))
    return outside


def logits(x: Tensor, head_VC: Tensor, softcap: float | None) -> Tensor:
    """Scores of the vocabulary (..., V), softly held between -softcap and softcap (Gemma 2's)."""
    found = F.linear(x, head_VC)
    return found if softcap is None else torch.tanh(found.float() / softcap) * softcap


class _How(NamedTuple):
    """How a chunk is gone through.

    dtype     of the matrix products
    compiled  whether what is between them is made one kernel
    """

    softcap: float | None
    dtype: torch.dtype
    compiled: bool


def _how(x_NC: Tensor, softcap: float | None, compiled: bool) -> _How:
    return _How(softcap, product_dtype(x_NC), compiled and x_NC.device.type == "cuda")


def product_dtype(x: Tensor) -> torch.dtype:
    """Type that autocast gives the matrix products of a tensor."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _ChunkedMean(torch.autograd.Function):
    """The mean loss a chunk of tokens at a time, with the gradients made in the same pass.

    All losses count alike in a mean, so both gradients are known but for one factor.

    source  Liger Kernel's fused linear cross-entropy (Hsu et al. 2024) for making them in the forward pass
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, head_VC: Tensor, target_N: Tensor, how: _How) -> Tensor:
        wants_x, wants_head, *_ = ctx.needs_input_grad
        losses_N = torch.empty(len(target_N), device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if wants_x else None
        grad_head_VC = torch.zeros_like(head_VC) if wants_head else None
        _chunked(x_NC, head_VC, target_N, how, losses_N, grad_x_NC, grad_head_VC)
        # Not saved as tensors are: autograd copies a gradient that somebody else still holds.
        ctx.gradients = [grad_x_NC, grad_head_VC]
        ctx.n_tokens = len(target_N)
        return losses_N.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None  # used up: once only
        factor = gradient / ctx.n_tokens
        return *(None if tensor is None else tensor.mul_(factor) for tensor in found), None, None


def _chunked(
    x_NC: Tensor,
    head_VC: Tensor,
    target_N: Tensor,
    how: _How,
    losses_N: Tensor,
    grad_x_NC: Tensor | None = None,
    grad_head_VC: Tensor | None = None,
) -> None:
    """Fill in losses and the wanted gradients of their sum."""
    head = head_VC.to(how.dtype)
    look = _compiled() if how.compiled else _losses_and_slopes
    wants = grad_x_NC is not None or grad_head_VC is not None
    with torch.autocast(x_NC.device.type, enabled=False):
        for here in chunks(len(target_N), len(head_VC), x_NC.device.type):
            x_RC = x_NC[here].to(how.dtype)
            losses_N[here], grad_RV = look(x_RC @ head.T, target_N[here], how.softcap, wants)
            if grad_RV is None:
                continue
            if grad_x_NC is not None:
                grad_x_NC[here] = grad_RV @ head
            if grad_head_VC is not None and how.dtype == grad_head_VC.dtype:
                grad_head_VC.addmm_(grad_RV.T, x_RC)
            elif grad_head_VC is not None:
                grad_head_VC.add_(grad_RV.T @ x_RC)


def chunk_logits(device: str) -> int:
    """Logits held at once on a device."""
    return GPU_CHUNK_LOGITS if device == "cuda" else CHUNK_LOGITS


def chunks(n_tokens: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Neighbouring tokens whose logits are held at once: nearly as many in every chunk."""
    most = max(1, chunk_logits(device) // vocabulary)
    size = -(-n_tokens // -(-n_tokens // most))
    return (slice(start, start + size) for start in range(0, n_tokens, size))


def _losses_and_slopes(
    score_RV: Tensor, target_R: Tensor, softcap: float | None, wants_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (R,) float32 and, if wanted, their derivatives by the scores, in the type of the scores.

    In place where it can be: on a CPU memory is what takes the time.
    """
    raw_RV, target_R1 = score_RV.float(), target_R.unsqueeze(1)
    if softcap is not None:
        raw_RV = raw_RV.div_(softcap).tanh_().mul_(softcap)
    log_sum_R1 = raw_RV.logsumexp(dim=1, keepdim=True)
    losses_R = (log_sum_R1 - raw_RV.gather(1, target_R1)).squeeze(1)
    if not wants_slopes:
        return losses_R, None
    slope_RV = None if softcap is None else 1 - (raw_RV / softcap).square_()
    # d loss / d logit is the probability, less one for the target.
    grad_RV = raw_RV.sub_(log_sum_R1).exp_()
    grad_RV.scatter_add_(1, target_R1, grad_RV.new_full(target_R1.shape, -1.0))
    if slope_RV is not None:
        grad_RV.mul_(slope_RV)
    return losses_R, grad_RV.to(score_RV.dtype)


def _fusible(
    score_RV: Tensor, target_R: Tensor, softcap: float | None, wants_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """What `_losses_and_slopes` computes, said so that a compiler makes two kernels of it."""
    raw_RV = score_RV.float()
    if softcap is not None:
        raw_RV = torch.tanh(raw_RV / softcap) * softcap
    log_sum_R1 = raw_RV.logsumexp(dim=1, keepdim=True)
    losses_R = (log_sum_R1 - raw_RV.gather(1, target_R.unsqueeze(1))).squeeze(1)
    if not wants_slopes:
        return losses_R, None
    is_target_RV = torch.arange(raw_RV.shape[1], device=raw_RV.device) == target_R.unsqueeze(1)
    grad_RV = (raw_RV - log_sum_R1).exp() - is_target_RV.float()
    if softcap is not None:
        grad_RV = grad_RV * (1 - (raw_RV / softcap).square())
    return losses_R, grad_RV.to(score_RV.dtype)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_fusible, dynamic=False)
