"""The training loop: batches in, weights and metrics out; stopped at any moment, it goes on where it was.

The bytes of the weights depend on the recipe, the tokens and the modules named in train_model's SCIENCE.
What is here decides them too, and counts through that stage's REVISION, which a golden test guards.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snakegpt.batches import TokenStream, TrainingBatches, documents_in, sequential_batches
from snakegpt.distributed import Group, StopRequest
from snakegpt.durable import write_atomically
from snakegpt.errors import Interrupted, UserError
from snakegpt.huggingface_format import save_weights
from snakegpt.losses import LossKernel
from snakegpt.model import GPT, AttentionKernel, Shape, initialise, n_parameters
from snakegpt.optimizer import clip_gradients, make_optimizers, schedule_of, set_learning_rate
from snakegpt.prefetch import ahead_of
from snakegpt.progress import Progress, quantity, say
from snakegpt.settings import Training
from snakegpt.training_state import Metrics, StateFolder


@dataclass(frozen=True)
class Launch:
    """How it is trained: resolved execution settings, none of them science.

    micro_rows  rows that a rank takes through the network at once
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


class Trainer:
    """One rank's view of a run."""

    def __init__(
        self,
        shape: Shape,
        recipe: Training,
        train: TokenStream,
        validation: TokenStream,
        launch: Launch,
        group: Group,
        state_folder: Path,
        tokenizer_fingerprint: str,
        end_of_text: int = 0,
    ) -> None:
        self.shape, self.recipe, self.launch, self.group = shape, recipe, launch, group
        self.validation, self.fingerprint = validation, tokenizer_fingerprint
        self.end_of_text = end_of_text
        rows = recipe.batch_tokens // shape.context
        self.batches = TrainingBatches(train, shape.context, rows, recipe.seed)
        self.accumulation = rows // group.ranks // launch.micro_rows
        self.model = initialise(GPT(shape, launch.kernel, launch.loss), recipe.seed).to(
            launch.device
        )
        everyone = dist.group.WORLD if group.ranks > 1 else None
        self.optimizers = make_optimizers(self.model, recipe, everyone)
        self.schedule = schedule_of(recipe)
        self.network = self._wrapped()
        self.states = StateFolder(state_folder, launch.label if group.leads else None)
        self.step = 0  # updates done
        self.micro_batches = self._batches_from_here()
        self.busy_s = 0.0  # in updates: without validation, saving and start-up
        self.best_step, self.best_loss = 0, math.inf

    def _wrapped(self) -> nn.Module:
        """The model as the loop calls it: compiled, and averaging gradients over the ranks."""
        network: nn.Module = self.model
        if self.launch.compiled:
            network = torch.compile(network)  # type: ignore[assignment]
        if self.group.ranks > 1:
            network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        return network

    def _batches_from_here(self) -> Iterator[tuple[Tensor, Tensor]]:
        micro_rows, group = self.launch.micro_rows, self.group
        return self.batches.from_step(self.step, micro_rows, group.rank, group.ranks)

    # ---- the loop ----

    def run(self, out: Path) -> None:
        """Train to the last step and write weights, best weights and metrics to `out`.

        raises  Interrupted after a stop signal, with the state saved; UserError if the loss diverges
        """
        stop = StopRequest()
        resumed = self._resume()
        with ahead_of(self._batches_from_here(), self.launch.device) as self.micro_batches:
            self._train(stop, resumed, out)

    def _train(self, stop: StopRequest, resumed: int | None, out: Path) -> None:
        metrics = Metrics(self.states.metrics, resumed) if self.group.leads else None
        if metrics:
            self._describe(metrics, resumed)
        recipe, label = self.recipe, self.launch.label
        every = max(1, recipe.steps // 1000)  # a thousand points make a full chart
        interval_s = self.launch.log_interval_s
        progress = Progress(label, recipe.steps, "steps", done=self.step, interval_s=interval_s)
        saved_at = time.monotonic()
        validation = f"val {self.best_loss:.3f}" if self.best_step else ""
        since_s, since_steps = self.busy_s, self.step
        while self.step < recipe.steps:
            started = time.monotonic()
            loss, norm = self._update()
            last = self.step == recipe.steps
            logs = last or self.step % every == 0
            mean_loss = self._mean_over_ranks(loss) if logs else math.nan  # waits for the device
            self.busy_s += time.monotonic() - started
            if logs:
                self._require_finite(mean_loss)
                rate = recipe.batch_tokens * (self.step - since_steps) / (self.busy_s - since_s)
                since_s, since_steps = self.busy_s, self.step
                if metrics:
                    metrics.write(
                        "train",
                        step=self.step,
                        loss=mean_loss,
                        learning_rate=recipe.learning_rate * self.schedule.at(self.step - 1),
                        gradient_norm=float(norm),
                        tokens=self.step * recipe.batch_tokens,
                        elapsed_s=round(self.busy_s, 3),
                        rate_tokens_per_s=round(rate, 1),
                    )
                    facts = [f"loss {mean_loss:.3f}", validation, quantity(rate, " tokens/s")]
                    progress.update(self.step, *filter(None, facts))
            if last or self.step % recipe.validation_interval == 0:
                val_loss = self.validate()
                validation = f"val {val_loss:.3f}"
                self._keep_if_best(val_loss)
                if metrics:
                    metrics.write("validation", step=self.step, loss=val_loss)
            due = time.monotonic() - saved_at >= self.launch.save_interval_s
            stopping = self._any_rank(stop.came)
            if due or stopping or last:
                if self.group.leads:
                    self._require_finite(float(norm))
                    self.save()
                saved_at = time.monotonic()
            if stopping and not last:
                raise Interrupted(f"{label} saved its state at step {self.step:,}")
        if metrics:
            self._finish(metrics, out)

    def _update(self) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns this rank's mean loss and the gradient's norm, on the device."""
        step, launch = self.step, self.launch
        # Dropout is a function of (seed, step, rank): nothing of it needs saving.
        torch.manual_seed(_mixed(self.recipe.seed, step, self.group.rank))
        set_learning_rate(self.optimizers, self.schedule.at(step))
        self.model.zero_grad(set_to_none=True)
        self.network.train()
        total = torch.zeros((), device=launch.device)
        for index in range(self.accumulation):
            ids_BT, targets_BT = next(self.micro_batches)
            with self._gradients_stay_local(index < self.accumulation - 1):
                loss = self._losses(self.network, ids_BT, targets_BT).mean() / self.accumulation
                loss.backward()
            total += loss.detach()
        norm = clip_gradients(self.model.parameters(), self.recipe.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return total, norm

    def _losses(self, network: nn.Module, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        ids_BT, targets_BT = (
            x.to(self.launch.device, non_blocking=True) for x in (ids_BT, targets_BT)
        )
        mixed = self.launch.dtype != torch.float32
        documents_BT = None
        if self.recipe.document_masking and self.model.training:
            documents_BT, _ = documents_in(ids_BT, self.end_of_text)
        with torch.autocast(self.launch.device, self.launch.dtype, enabled=mixed):
            losses_BT: Tensor = network(ids_BT, targets_BT, documents_BT=documents_BT)
        return losses_BT

    def _gradients_stay_local(self, yes: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients with the last micro-batch of a step only."""
        if yes and isinstance(self.network, DistributedDataParallel):
            local: contextlib.AbstractContextManager[None] = self.network.no_sync()
            return local
        return contextlib.nullcontext()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the first `validation_tokens` of the validation split, nats; no dropout."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        batches = sequential_batches(
            self.validation,
            self.shape.context,
            self.launch.micro_rows,
            n_targets=self.recipe.validation_tokens,
            rank=self.group.rank,
            ranks=self.group.ranks,
        )
        for ids_BT, targets_BT in batches:
            # The bare model: ranks may have different numbers of batches.
            losses_BT = self._losses(self.model, ids_BT, targets_BT)
            totals[0] += float(losses_BT.sum(dtype=torch.float64))
            totals[1] += losses_BT.numel()
        loss, count = self.group.sum(totals).tolist()
        return float(loss / count)

    # ---- what is kept ----

    def save(self) -> None:
        """Write the state that a later run resumes from."""
        self.states.save(
            self.step,
            {
                "step": self.step,
                "shape": asdict(self.shape),
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "best_step": self.best_step,
                "best_loss": self.best_loss,
                "busy_s": self.busy_s,
            },
        )

    def _resume(self) -> int | None:
        """Load the newest whole state; returns its step, or None if there is none."""
        state = self.states.load()
        if state is None:
            if self.group.leads:
                self.states.require_space(n_parameters(self.shape))
            return None
        if state["shape"] != asdict(self.shape):
            raise UserError(
                f"the state in {self.states.folder} is of another model; remove the folder."
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.busy_s = state["step"], state["busy_s"]
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        if self.group.leads:
            say(f"{self.launch.label}  resumes at step {self.step:,} of {self.recipe.steps:,}")
        return self.step

    def _keep_if_best(self, loss: float) -> None:
        if loss >= self.best_loss and self.best_step:
            return
        self.best_step, self.best_loss = self.step, loss
        if self.group.leads:
            write_atomically(
                self.states.best_weights(self.step),
                lambda path: save_weights(path, self.model, self.fingerprint),
            )

    def _finish(self, metrics: Metrics, out: Path) -> None:
        metrics.write(
            "end",
            step=self.step,
            elapsed_s=round(self.busy_s, 3),
            rate_tokens_per_s=round(
                self.step * self.recipe.batch_tokens / max(self.busy_s, 1e-9), 1
            ),
            peak_memory_bytes=_peak_memory_bytes(self.launch.device),
            best_step=self.best_step,
            best_loss=self.best_loss,
        )
        metrics.close()
        save_weights(out / "weights.safetensors", self.model, self.fingerprint)
        shutil.copyfile(self.states.best_weights(self.best_step), out / "best.safetensors")
        shutil.copyfile(self.states.metrics, out / "metrics.jsonl")

    # ---- what is said ----

    def _describe(self, metrics: Metrics, resumed: int | None) -> None:
        launch = self.launch
        facts: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if launch.device == "cuda" else launch.device,
            "ranks": self.group.ranks,
            "rows_per_rank": launch.micro_rows,
            "accumulation": self.accumulation,
            "precision": str(launch.dtype).removeprefix("torch."),
            "attention": launch.kernel,
            "compiled": launch.compiled,
            "threads": launch.threads,
            "n_parameters": n_parameters(self.shape),
            "torch": torch.__version__,
            "host_cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        }
        if resumed is None:
            metrics.write("start", **facts)
        else:
            metrics.write("resume", step=resumed, **facts)
        say(
            f"{launch.label}  {quantity(facts['n_parameters'])} parameters, {self.group.ranks} x"
            f" {facts['device']}, {facts['precision']}, {launch.micro_rows} rows x"
            f" {self.accumulation} accumulated, attention {launch.kernel},"
            f" {launch.threads} threads a rank{', compiled' if launch.compiled else ''}"
        )

    def _require_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.step:,}: training has diverged.\n"
                "  lower training.learning_rate, raise training.warmup_steps or set"
                " training.gradient_clip; a changed setting starts from the first step"
            )

    # ---- ranks agree ----

    def _mean_over_ranks(self, value: Tensor) -> float:
        return float(self.group.sum(value.clone()) / self.group.ranks)

    def _any_rank(self, condition: bool) -> bool:
        return bool(self.group.sum(torch.tensor(int(condition))))


def _mixed(*numbers: int) -> int:
    """A 63-bit number from several; equal for equal ones, unrelated otherwise."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _peak_memory_bytes(device: str) -> int:
    """Most memory this rank ever held, on its GPU or else as a process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
