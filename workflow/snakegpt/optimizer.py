"""AdamW with weight decay where it belongs, and the learning rate as a plain function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine from `peak` to `minimum` that ends at `decay_steps`."""

    peak: float
    minimum: float
    warmup_steps: int
    decay_steps: int

    def at(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates (the first one is step 0).

        source  nanoGPT's get_lr
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if step >= self.decay_steps:
            return self.minimum
        done = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        return self.minimum + 0.5 * (1 + math.cos(math.pi * done)) * (self.peak - self.minimum)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings, which decay, and biases and norms, which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, *, weight_decay: float, beta1: float, beta2: float
) -> torch.optim.AdamW:
    """AdamW over a model's parameters, as one fused kernel on CPU and CUDA; see `set_learning_rate`."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=1e-8, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next `optimizer.step()`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
