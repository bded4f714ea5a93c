"""One optimiser step after another, and the validation loss between them: what all ranks do together.

Only the tokens of a step are given. How many rows go through the network at once follows from memory,
and is made smaller where it proves too much: the same sum in more parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snakegpt.batches import TokenStream, documents_in, sequential_batches
from snakegpt.distributed import Group, Strategy, gpu_micro_batches
from snakegpt.errors import UserError
from snakegpt.fitting import (
    compute_twice,
    largest_that_fits,
    no_room,
    smaller,
    why_it_does_not_compile,
)
from snakegpt.losses import LossKernel, mean_loss, mean_loss_of_compiled
from snakegpt.model import GPT, AttentionKernel, Shape, initialise, n_parameters
from snakegpt.optimizer import schedule_of, set_learning_rate
from snakegpt.parts import part
from snakegpt.placement import Passes
from snakegpt.prefetch import ahead_of
from snakegpt.progress import say
from snakegpt.settings import Execution, Training
from snakegpt.stability import Judge
from snakegpt.strategies import compiled, make_strategy
from snakegpt.tokens import TokenSet, training_batches

HEADROOM = 0.92  # of a GPU's free memory: allocators need some room between blocks


@dataclass(frozen=True)
class Launch:
    """How a run is trained: resolved execution settings, none of them science.

    micro_rows  rows that a rank takes through the network at once; an estimate where it is `probed`
    probed      whether to find on the device what fits
    threads     of this rank
    """

    label: str
    device: str
    dtype: torch.dtype
    kernel: AttentionKernel
    loss: LossKernel
    compiled: bool
    micro_rows: int
    threads: int
    log_interval_s: float
    save_interval_s: float
    probed: bool = False
    strategy: Strategy = "ddp"
    deterministic: bool = False
    activation_checkpointing: bool = False
    keep_states: int = 2
    profile_step: int | None = None
    tensorboard: str | None = None
    wandb: str | None = None

    @classmethod
    def of(
        cls, label: str, device: str, execution: Execution, passes: Passes, **resolved: Any
    ) -> Launch:
        """What the settings say, for a device and what was chosen for it; `resolved` adds or replaces."""
        facts: dict[str, Any] = {
            "dtype": passes.dtype,
            "kernel": passes.kernel,
            "loss": passes.loss,
            "compiled": device == "cuda" if execution.compiled == "auto" else execution.compiled,
            "micro_rows": passes.micro_rows,
            "threads": torch.get_num_threads(),
            "log_interval_s": execution.log_interval_s,
            "save_interval_s": execution.save_interval_s,
            "activation_checkpointing": execution.activation_checkpointing,
        }
        return cls(label, device, **{**facts, **resolved})


class TooLarge(Exception):
    """A micro-batch did not fit, on this rank of several: the others do not know yet."""


class Updates:
    """The weights of a run and what moves them, as one rank sees it.

    beat      told of each trial of what fits, for a watchdog
    judge     which updates are not taken
    strategy  what the ranks share
    """

    def __init__(
        self,
        shape: Shape,
        recipe: Training,
        train: list[TokenSet],
        validation: list[TokenSet],
        launch: Launch,
        group: Group,
        end_of_text: int,
        *,
        beat: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.end_of_text, self._beat = end_of_text, beat
        self.shape, self.recipe, self.launch, self.group = shape, recipe, launch, group
        self.validation, self.micro_rows = validation, launch.micro_rows
        rows = recipe.batch_tokens // shape.context
        self.batches = training_batches(train, shape.context, rows, recipe.seed)
        self.share = rows // group.ranks
        self.schedule = schedule_of(recipe)
        self.model = initialise(GPT(shape, launch.kernel, launch.loss), recipe.seed)
        self.model.to(launch.device)
        self.computes_twice = False
        if launch.activation_checkpointing:
            self._compute_twice()
        self.compiled = launch.compiled and self._compiles()
        if launch.probed and launch.strategy != "fsdp":
            self._probe()
        self.strategy = make_strategy(
            launch.strategy,
            self.model,
            recipe,
            group,
            compiled=self.compiled,
            deterministic=launch.deterministic,
        )
        self.judge = Judge(recipe, launch.device, scaled=launch.dtype == torch.float16)
        self._ahead = contextlib.ExitStack()
        self._micro_batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._losses_of_step: list[Tensor] = []

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.share // self.micro_rows

    # ---- steps ----

    def start(self, place: int) -> None:
        """The next batch is the one at this place of the order; what was made ahead is dropped."""
        self.stop()
        made = self.batches.from_step(place, self.micro_rows, self.group.rank, self.group.ranks)
        self._micro_batches = self._ahead.enter_context(ahead_of(made, self.launch.device))

    def stop(self) -> None:
        """No more batches are wanted."""
        self._ahead.close()

    def update(self, step: int, place: int) -> Tensor:
        """Take the update that follows `step` updates, with the batch at `place`.

        returns  the norm of the gradient, on the device
        raises   TooLarge, UserError if not even one row fits
        """
        while not self._fits(place):
            if self.group.ranks > 1:
                raise TooLarge
            self.shrink()
            self.start(place)
        with part("optimizer"):
            return self._move(step)

    def _move(self, step: int) -> Tensor:
        """Take the step that the gradients say, if it is not refused; returns the gradient's norm."""
        set_learning_rate(self.strategy.optimizers, self.schedule.at(step))
        if self.judge.scale is not None:
            self.strategy.unscale(self.judge.scale)
        norm = self.strategy.clip(self.recipe.gradient_clip)
        # All ranks must see one loss where it decides; else this rank's own says enough.
        own = torch.stack(self._losses_of_step).mean()
        loss = own if self.judge.limit is None else self.mean_loss()
        self.strategy.step(self.judge.refuses(step + 1, loss, norm))
        return norm

    def _fits(self, place: int) -> bool:
        """Compute the gradients of a step; False if memory ended. What was held is free again then."""
        try:
            self._gradients(place)
        except RuntimeError as error:
            if not no_room(error):
                raise
            return False
        return True

    def _gradients(self, place: int) -> None:
        """Gradients of the mean loss of a step, summed over micro-batches and ranks."""
        # Of the model: what ddp wraps around it has a flag of its own, which validation leaves alone.
        if not self.model.training:
            self.model.train()
        counts = self.strategy.begin(self.accumulation)
        self._losses_of_step = []
        for index in range(self.accumulation):
            with part("data"):
                ids_BT, targets_BT = next(self._micro_batches)
            if self.shape.dropout:
                # A function of the batch's rows, whichever rank has them: nothing of it needs saving.
                row = self.group.rank * self.share + index * self.micro_rows
                torch.manual_seed(mixed(self.recipe.seed, place, row))
            with self.strategy.exchanging(index == self.accumulation - 1):
                with part("forward"):
                    loss = self._losses(self.strategy.network, ids_BT, targets_BT, "mean")
                    weighed = loss * counts
                with part("backward"):
                    (weighed if self.judge.scale is None else weighed * self.judge.scale).backward()
            self.strategy.added()
            self._losses_of_step.append(loss.detach())
        self.strategy.finish()

    def learning_rates(self, step: int) -> dict[str, float]:
        """The rates of the update that follows `step` updates, by name."""
        factor, recipe = self.schedule.at(step), self.recipe
        rates = {"learning_rate": recipe.learning_rate * factor}
        if recipe.muon_learning_rate is not None:
            rates["muon_learning_rate"] = recipe.muon_learning_rate * factor
        return rates

    def mean_loss(self) -> Tensor:
        """Mean loss of the last step over all ranks, nats, on the device. All ranks ask."""
        return self.strategy.mean_loss(self._losses_of_step)

    def _losses(
        self,
        network: nn.Module,
        ids_BT: Tensor,
        targets_BT: Tensor,
        reduction: Literal["none", "mean"],
    ) -> Tensor:
        ids_BT, targets_BT = (
            x.to(self.launch.device, non_blocking=True) for x in (ids_BT, targets_BT)
        )
        mixed = self.launch.dtype != torch.float32
        documents_BT = None
        if self.recipe.document_masking and self.model.training:
            documents_BT, _ = documents_in(ids_BT, self.end_of_text)
        with torch.autocast(self.launch.device, self.launch.dtype, enabled=mixed):
            losses: Tensor = network(
                ids_BT, targets_BT, documents_BT=documents_BT, reduction=reduction
            )
        return losses

    @torch.no_grad()
    def validate(self, beat: Callable[[str], None] = lambda what: None) -> float:
        """Mean loss over the first `validation_tokens` of the validation split, nats; no dropout.

        Of a mixture the corpora's means, by their shares of the training rows; each has that share of
        the validation tokens. The sums of the batches are added in one order, whichever ranks had them.
        """
        self.model.eval()
        whole, limit = sum(part.weight for part in self.validation), self.recipe.validation_tokens
        loss = 0.0
        for weight, stream in self.validation:
            share = weight / whole
            n_targets = None if limit is None else max(1, round(limit * share))
            loss += share * self._mean_loss(stream, n_targets, beat)
        return loss

    def _mean_loss(
        self, stream: TokenStream, n_targets: int | None, beat: Callable[[str], None]
    ) -> float:
        context = self.shape.context
        total = max(0, len(stream) - 1)
        total = total if n_targets is None else min(total, n_targets)
        n_batches = -(-(total // context) // self.micro_rows) + (total % context > 0)
        sums = torch.zeros(n_batches, dtype=torch.float64)
        batches = sequential_batches(
            stream,
            context,
            self.micro_rows,
            n_targets=n_targets,
            rank=self.group.rank,
            ranks=self.group.ranks,
        )
        rounds = self.strategy.rounds(n_batches)
        for index, (ids_BT, targets_BT) in zip(range(rounds), _endless(batches), strict=False):
            # The bare model, which exchanges nothing unless it is sharded.
            losses_BT = self._losses(self.model, ids_BT, targets_BT, "none")
            place = index * self.group.ranks + self.group.rank
            if place < n_batches:
                sums[place] = float(losses_BT.sum(dtype=torch.float64))
            beat(f"validation batch {index}")
        return math.fsum(self.group.sum(sums).tolist()) / total

    # ---- what fits ----

    def shrink(self) -> int:
        """Take fewer rows at once from here on; where there is one, compute activations twice.

        raises  UserError if there is nothing left to try
        """
        rows = smaller(self.micro_rows, self.share)
        if self.launch.deterministic:
            raise UserError(
                f"{self.micro_rows} rows at once do not fit this device's memory, and another number"
                " would change the order of additions (execution.deterministic).\n"
                f"  set execution.rows_per_rank to {rows or 1}, or execution.activation_checkpointing"
            )
        if rows is None and self.computes_twice:
            raise UserError(
                f"one row of {self.shape.context:,} tokens does not fit this device's memory beside"
                f" {n_parameters(self.shape):,} parameters and their optimiser.\n"
                "  lower model.context or the model's size, share it out (execution.strategy = fsdp),"
                " or take a larger device"
            )
        if rows is None:
            self._compute_twice()
            self._tell("one row does not fit: activations are computed twice from here on")
            return 1
        self._tell(f"{self.micro_rows} rows at once do not fit: {rows} from here on")
        self.micro_rows = rows
        if self.launch.device == "cuda":
            torch.cuda.empty_cache()
        return rows

    def _compute_twice(self) -> None:
        compute_twice(self.model.blocks)
        self.computes_twice = True

    def _tell(self, text: str) -> None:
        if self.group.leads:
            say(f"{self.launch.label}  {text}")

    def _trial(self, rows: int, network: nn.Module) -> None:
        """A forward and a backward pass of some rows of the first token."""
        ids_BT = torch.zeros(rows, self.shape.context, dtype=torch.int64)
        self.model.train()
        self._beat(f"a trial of {rows} rows")  # compiling a large model takes minutes
        try:
            self._losses(network, ids_BT, ids_BT, "mean").backward()
        finally:
            self.model.zero_grad(set_to_none=True)

    def _compiles(self) -> bool:
        self.model.mean_loss = mean_loss_of_compiled(self.model.loss)
        network = compiled(self.model)
        reason = why_it_does_not_compile(lambda: self._trial(self.micro_rows, network))
        if reason is not None:
            say(f"{self.launch.label}  does not compile here, and trains without: {reason}")
        works = not int(self.group.sum(torch.tensor(int(reason is not None))))
        if not works:
            self.model.mean_loss = mean_loss  # the other one would need the compiler again
        return works

    def _probe(self) -> None:
        """Set the micro-batch to the largest of use that fits on every rank, with all that stays beside it."""
        network = compiled(self.model) if self.compiled else self.model

        def peak_bytes(rows: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._trial(rows, network)
            return torch.cuda.max_memory_allocated()

        held = torch.cuda.memory_allocated()
        # Two moments; ddp's buckets share the gradients' memory.
        budget = held + HEADROOM * torch.cuda.mem_get_info()[0] - 8 * n_parameters(self.shape)
        sizes = gpu_micro_batches(self.share, self.shape.context)
        mine = largest_that_fits(peak_bytes, sizes, self.micro_rows, budget, held)
        self.micro_rows = self.group.least(mine)
        # What a trial held is given back, and is no peak of the training's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _endless(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, and then the last one again and again, or one token where there is none."""
    last = (torch.zeros(1, 1, dtype=torch.int64),) * 2
    for batch in batches:
        last = batch
        yield batch
    while True:
        yield last


def mixed(*numbers: int) -> int:
    """A 63-bit number from several; equal for equal ones, unrelated otherwise."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
