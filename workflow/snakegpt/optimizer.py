"""What moves the weights: the optimisers, who decays, and the learning rate as a plain function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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


def make_optimizers(
    model: nn.Module, recipe: Training, ranks: dist.ProcessGroup | None = None
) -> list[torch.optim.Optimizer]:
    """The optimisers that together move every parameter once; see `set_learning_rate`.

    AdamW moves everything, or Muon the matrices inside blocks and AdamW the rest. Matrices and
    embeddings decay, biases and norms do not.

    ranks  processes that hold the same gradients and share Muon's arithmetic; None: each does all of it
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if recipe.optimizer == "adamw":
        return [_adamw(list(parameters.values()), recipe)]
    inside = {n: p for n, p in parameters.items() if n.startswith("blocks.") and p.dim() == 2}
    fused = [p for name, p in inside.items() if name.endswith("qkv.weight")]
    single = [p for name, p in inside.items() if not name.endswith("qkv.weight")]
    muon = Muon(
        [
            {"params": matrices, "stacked": stacked, "peak": recipe.muon_learning_rate}
            for matrices, stacked in ((fused, 3), (single, 1))
        ],
        momentum=recipe.muon_momentum or 0.0,
        weight_decay=recipe.weight_decay,
        ranks=ranks,
    )
    rest = [p for name, p in parameters.items() if name not in inside]
    return [muon, _adamw(rest, recipe)]


def _adamw(parameters: Sequence[nn.Parameter], recipe: Training) -> torch.optim.AdamW:
    """One fused kernel on CPU and CUDA."""
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


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by a nearly orthogonal one before it is taken.

    What torch.optim.Muon computes, and in addition: the three matrices of a fused q k v are taken one by
    one (a group's `stacked`, by rows); matrices of one shape go through one product; ranks share them
    out; sharded ones are gathered; and on CPU all of it is float32, since torch's fixed bfloat16 took 17
    times as long where there are no instructions for it (16 matrices of 128 x 128: 301 ms against 18).

    source  Jordan et al. 2024, kellerjordan.github.io/posts/muon: Nesterov momentum, five iterations, and
            steps larger by sqrt(rows / columns) where a matrix is taller than wide
    """

    BATCH_ELEMENTS = (
        1 << 24
    )  # of one product at most: larger matrices gain nothing by going together

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "stacked": 1}
        super().__init__(groups, defaults)
        self.ranks = ranks
        # 1 on the device where the next step is to change nothing, as torch's fused AdamW looks at it.
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        by_shape = defaultdict[torch.Size, list[Tensor]](list)
        moves: list[tuple[Tensor, dict[str, Any], list[tuple[torch.Size, int]]]] = []
        skipped = self.found_inf
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                gradient, average = parameter.grad, state["momentum_buffer"]
                if skipped is not None:  # towards itself: unchanged, whatever the gradient is
                    gradient = torch.where(skipped.bool(), average, gradient)
                average.lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(average, group["momentum"])
                whole = ahead.full_tensor() if _is_sharded(ahead) else ahead
                places = []
                for matrix in whole.chunk(group["stacked"]):
                    places.append((matrix.shape, len(by_shape[matrix.shape])))
                    by_shape[matrix.shape].append(matrix)
                moves.append((parameter, group, places))
        straight = {shape: self._orthogonal(matrices) for shape, matrices in by_shape.items()}
        for parameter, group, places in moves:
            move = torch.cat([straight[shape][place] for shape, place in places])
            if _is_sharded(parameter):  # every rank has the whole: each takes its part
                move = _sharded_as(parameter, move)
            rows, columns = places[0][0]
            decay = group["lr"] * group["weight_decay"]
            if skipped is not None:
                move, decay = move * (1 - skipped), decay * (1 - skipped)
            parameter.mul_(1 - decay)
            parameter.add_(move, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """Each of some matrices of one shape made nearly orthogonal, some at once, by all ranks."""
        n = dist.get_world_size(self.ranks) if self.ranks else 1
        first = dist.get_rank(self.ranks) if self.ranks else 0
        share = -(-len(matrices) // n)
        mine = matrices[first * share : (first + 1) * share]
        at_once = max(1, self.BATCH_ELEMENTS // matrices[0].numel())
        done = [
            orthogonalised(torch.stack(mine[start : start + at_once]))
            for start in range(0, len(mine), at_once)
        ]
        if n == 1:
            return [matrix for batch in done for matrix in batch]
        empty = matrices[0].new_zeros(share - len(mine), *matrices[0].shape)
        sent = torch.cat([*done, empty])
        received = sent.new_empty(n * share, *matrices[0].shape)
        dist.all_gather_into_tensor(received, sent, group=self.ranks)
        return list(received[: len(matrices)])


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without its module, which takes longer to load than a small model to train."""
    return hasattr(tensor, "full_tensor")


def _sharded_as(like: Any, tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def orthogonalised(matrices_NRC: Tensor) -> Tensor:
    """Matrices with their singular values moved to between about 0.7 and 1.2, in float32.

    Newton-Schulz iteration: each of the five rounds applies s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5 to all
    singular values. bfloat16 on CUDA, as its author does; see `Muon` for CPU.
    """
    x = matrices_NRC.bfloat16() if matrices_NRC.is_cuda else matrices_NRC.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).float()


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
