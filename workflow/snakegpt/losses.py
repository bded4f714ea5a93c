"""Cross-entropy of a linear head, written out or without ever holding the logits of a large vocabulary.

Axes: N tokens, C channels, V vocabulary, R tokens of one chunk.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossKernel = Literal["plain", "chunked"]

CHUNK_LOGITS = 1 << 23  # logits held at once: 32 MiB in float32
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

    Matrix products are of autocast's type where it is on; everything else is float32.
    """
    if kernel == "plain":
        return F.cross_entropy(logits(x_NC, head_VC, softcap).float(), target_N, reduction="none")
    return _chunked(x_NC, head_VC, target_N, softcap)


@torch.compiler.disable  # a loop over large products: nothing in it could be fused
def _chunked(x_NC: Tensor, head_VC: Tensor, target_N: Tensor, softcap: float | None) -> Tensor:
    device = x_NC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NC.dtype
    losses_N: Tensor = _ChunkedLosses.apply(x_NC, head_VC, target_N, softcap, dtype)
    return losses_N


def logits(x: Tensor, head_VC: Tensor, softcap: float | None) -> Tensor:
    """Scores of the vocabulary (..., V), softly held between -softcap and softcap (Gemma 2's)."""
    found = F.linear(x, head_VC)
    return found if softcap is None else torch.tanh(found.float() / softcap) * softcap


class _ChunkedLosses(torch.autograd.Function):
    """Losses a chunk of tokens at a time, with the gradients made in the same pass.

    A token's loss reaches only its own row of x, so that row's gradient is known but for a factor. The
    head's gradient is a sum over tokens: known but for a factor too if all losses count alike, as in a
    mean; if they do not, the chunks are gone through again.

    source  Liger Kernel's fused linear cross-entropy (Hsu et al. 2024) for making them in the forward pass
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        head_VC: Tensor,
        target_N: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        wants_x, wants_head, *_ = ctx.needs_input_grad
        losses_N = torch.empty(len(target_N), device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if wants_x else None
        grad_head_VC = torch.zeros_like(head_VC) if wants_head else None
        _pass(x_NC, head_VC, target_N, softcap, dtype, losses_N, grad_x_NC, grad_head_VC)
        ctx.softcap, ctx.dtype = softcap, dtype
        ctx.save_for_backward(x_NC, head_VC, target_N)
        # Not saved with them: autograd copies a gradient that somebody else still holds.
        ctx.gradients = grad_x_NC, grad_head_VC
        return losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor_N: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, head_VC, target_N = ctx.saved_tensors
        (grad_x_NC, grad_head_VC), ctx.gradients = ctx.gradients, None  # used up: once only
        if grad_x_NC is not None:
            grad_x_NC.mul_(factor_N.unsqueeze(1))
        if grad_head_VC is not None:
            if (
                factor_N.stride() == (0,) or len(factor_N) == 1
            ):  # one number, as a mean sends it back
                grad_head_VC.mul_(factor_N[0])
            else:
                grad_head_VC.zero_()
                losses_N = torch.empty_like(factor_N)
                how = (ctx.softcap, ctx.dtype)
                _pass(x_NC, head_VC, target_N, *how, losses_N, None, grad_head_VC, factor_N)
        return grad_x_NC, grad_head_VC, None, None, None


def _pass(
    x_NC: Tensor,
    head_VC: Tensor,
    target_N: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
    losses_N: Tensor,
    grad_x_NC: Tensor | None,
    grad_head_VC: Tensor | None,
    factor_N: Tensor | None = None,
) -> None:
    """Fill in losses and the wanted gradients, the head's with each token's loss times its factor."""
    head = head_VC.to(dtype)
    at_once = max(1, CHUNK_LOGITS // len(head_VC))
    with torch.autocast(x_NC.device.type, enabled=False):
        for start in range(0, len(target_N), at_once):
            here = slice(start, start + at_once)
            x_RC, target_R1 = x_NC[here].to(dtype), target_N[here].unsqueeze(1)
            score_RV = (x_RC @ head.T).float()
            if softcap is not None:
                score_RV.div_(softcap).tanh_().mul_(softcap)
            log_sum_R1 = score_RV.logsumexp(dim=1, keepdim=True)
            losses_N[here] = (log_sum_R1 - score_RV.gather(1, target_R1)).squeeze(1)
            if grad_x_NC is None and grad_head_VC is None:
                continue
            slope_RV = None if softcap is None else 1 - (score_RV / softcap).square_()
            # d loss / d logit is the probability, less one for the target.
            grad_RV = score_RV.sub_(log_sum_R1).exp_()
            grad_RV.scatter_add_(1, target_R1, grad_RV.new_full(target_R1.shape, -1.0))
            if slope_RV is not None:
                grad_RV.mul_(slope_RV)
            if factor_N is not None:
                grad_RV.mul_(factor_N[here].unsqueeze(1))
            grad = grad_RV.to(dtype)
            if grad_x_NC is not None:
                grad_x_NC[here] = grad @ head
            if grad_head_VC is not None and dtype == grad_head_VC.dtype:
                grad_head_VC.addmm_(grad.T, x_RC)
            elif grad_head_VC is not None:
                grad_head_VC.add_(grad.T @ x_RC)
