"""Which updates are not taken: after a gradient that is no number, or a loss that leaps.

The verdict is reached on the device, from numbers that are the same on all ranks, and the optimisers
read it there: the host learns of it when it next looks, at steps that depend on the recipe alone. So
what is skipped, and where training goes back, is a function of the recipe and the tokens, whatever was
killed and resumed on the way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from snakegpt.settings import Training

# torch.amp.GradScaler's: float16 overflows above 65,504, and what is below 2^-24 is lost.
FIRST_SCALE, GROWTH_STEPS = 65_536.0, 2_000


class Skipped(NamedTuple):
    """An update that was not taken."""

    step: int
    loss: float
    gradient_norm: float


class Judge:
    """The verdicts of a run, and the loss scale that float16 needs, which answers to them.

    scaled  whether losses are multiplied before the backward pass: in float16
    """

    def __init__(self, recipe: Training, device: str, *, scaled: bool) -> None:
        self.limit = recipe.skip_spikes_above
        self.in_a_row = 0  # skipped updates up to the last one looked at
        self._unseen: list[tuple[int, Tensor]] = []
        self._recent = torch.zeros(recipe.spike_window, device=device)
        self._n_recent = torch.zeros(1, dtype=torch.int64, device=device)
        self.scale = torch.tensor(FIRST_SCALE, device=device) if scaled else None
        self._since_skip = torch.zeros((), dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What must be saved of it; load into these in place."""
        tensors = {
            "judge.recent": self._recent,
            "judge.n_recent": self._n_recent,
            "judge.since_skip": self._since_skip,
        }
        return tensors if self.scale is None else {**tensors, "judge.scale": self.scale}

    def resume(self, in_a_row: int) -> None:
        """Forget what was not looked at; so many updates up to here were skipped in a row."""
        self._unseen.clear()
        self.in_a_row = in_a_row

    @torch.no_grad()
    def refuses(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the update that follows `step` updates is to be skipped, as a boolean on the device.

        loss  of the step; the mean over all ranks if spikes are looked for
        norm  of the gradient, the same on all ranks: one number that is none makes it none
        """
        refused = ~norm.isfinite()
        if self.limit is not None:
            refused = refused | ~loss.isfinite() | self._is_spike(loss, self.limit)
            place = self._n_recent % len(self._recent)  # not by [], which would wait for the device
            kept = torch.where(refused, self._recent.index_select(0, place), loss)
            self._recent.index_copy_(0, place, kept)
            self._n_recent += ~refused
        if self.scale is not None:
            self._since_skip.copy_(torch.where(refused, 0, self._since_skip + 1))
            grows = (self._since_skip > 0) & (self._since_skip % GROWTH_STEPS == 0)
            self.scale *= torch.where(refused, 0.5, torch.where(grows, 2.0, 1.0))
        facts = torch.stack([refused.float(), loss.detach().float(), norm.float()])
        self._unseen.append((step, facts))
        return refused

    def _is_spike(self, loss: Tensor, limit: float) -> Tensor:
        """z-score against the recent losses that were taken; none before the window is full.

        source  OLMo-core's SkipStepOptimizer
        """
        spread, mean = torch.std_mean(self._recent)
        full = (self._n_recent >= len(self._recent)).squeeze()
        return full & (loss > mean + limit * spread)

    def look(self) -> list[Skipped]:
        """Updates skipped since the last look. Waits for the device."""
        if not self._unseen:
            return []
        skipped = []
        facts = torch.stack([facts for _, facts in self._unseen]).tolist()
        for (step, _), (refused, loss, norm) in zip(self._unseen, facts, strict=True):
            if refused:
                skipped.append(Skipped(step, loss, norm))
            self.in_a_row = self.in_a_row + 1 if refused else 0
        self._unseen.clear()
        return skipped


def as_json(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
