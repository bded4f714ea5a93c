"""What moves the weights: the optimisers, who decays, and the learning rate as a plain function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snakegpt.settings import ScheduleKind, Training

# ---- the learning rate -----------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step as a share of its peak; a parameter group's peak is its own.

    kind            cosine | linear | warmup_stable_decay, of what follows the warm-up
    floor           share of the peak that is left from `decay_steps` on
    warmup_steps    of a straight rise from 0
    decay_steps     step at which the decay ends
    cooldown_steps  warmup_stable_decay: length of the straight decay that ends there; before it, the peak
    """

    kind: ScheduleKind
    floor: float
    warmup_steps: int
    decay_steps: int
    cooldown_steps: int = 0

    def at(self, step: int) -> float:
        """Share of the peak for the update that follows `step` updates (the first one is step 0).

        source  nanoGPT's get_lr for the cosine; Hu et al. 2024 (MiniCPM) and Haegele et al. 2024 for the
                stable phase, after which a straight decay does as well as a cosine of known length
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step >= self.decay_steps:
            return self.floor
        begin = self.warmup_steps
        if self.kind == "warmup_stable_decay":
            begin = max(begin, self.decay_steps - self.cooldown_steps)
        done = max(0, step - begin) / (self.decay_steps - begin)
        above = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.floor + above * (1 - self.floor)


def schedule_of(training: Training) -> Schedule:
    """The schedule that settings describe."""
    end = training.decay_steps or training.steps
    return Schedule(
        kind=training.schedule,
        floor=training.min_learning_rate / training.learning_rate,
        warmup_steps=training.warmup_steps,
        decay_steps=end,
        cooldown_steps=round((training.cooldown_fraction or 0) * end),
    )


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """The rate of the next `step()` of each: every group's own peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]


# ---- the optimisers --------------------------------------------------------------------------


def make_optimizers(model: nn.Module, recipe: Training) -> list[torch.optim.Optimizer]:
    """The optimisers that together move every parameter once; see `set_learning_rate`.

    AdamW is one fused kernel on CPU and CUDA. Matrices and embeddings decay, biases and norms do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [_adamw(parameters, recipe)]


def _adamw(parameters: Sequence[nn.Parameter], recipe: Training) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group | {"peak": recipe.learning_rate} for group in groups if group["params"]],
        lr=0.0,
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
