"""What is seen of a training run: metrics.jsonl, the progress line, TensorBoard and Weights & Biases.

docs/metrics.md has every field with its unit. Nothing here changes what is trained, and figures that
nobody knows are null: the share of a datasheet's peak on a GPU that is in no datasheet of ours, say.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from snakegpt.counters import CpuCounters, gpu_counters, peak_memory_bytes
from snakegpt.durable import write_text_atomically
from snakegpt.errors import UserError
from snakegpt.gpus import gpu_named
from snakegpt.parts import STEPS, Window
from snakegpt.progress import Progress, quantity
from snakegpt.training_state import Metrics

SHOWN_S = 5.0  # of updates, whose mean rate people see: single ones scatter
COUNTERS_INTERVAL_S = 10.0  # reading them takes a few milliseconds a GPU


@dataclass(frozen=True)
class Work:
    """What a run does, for its rates.

    device_name         as torch reports it
    micro_batches       of a rank in a step
    matmul_flops_per_s  of all ranks together, measured at once when training started
    """

    label: str
    steps: int
    batch_tokens: int
    flops_per_token: int
    device: str
    device_name: str
    precision: str
    ranks: int
    micro_batches: int
    matmul_flops_per_s: float

    @property
    def peak_flops_per_s(self) -> float | None:
        """The datasheet's peak of all ranks together; None for a device in no datasheet of ours."""
        gpu = gpu_named(self.device_name)
        peak = gpu.peak_flops_per_s(self.precision) if gpu else None
        return None if peak is None else peak * self.ranks


@dataclass(frozen=True)
class Audience:
    """Who is told, and how often: execution settings of the same names."""

    log_interval_s: float = 5.0
    profile_step: int | None = None
    tensorboard: str | None = None
    wandb: str | None = None


class Writer(Protocol):
    """A place beside metrics.jsonl where numbers go."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by name, as `train/loss`."""

    def close(self) -> None:
        """No more come."""


class Recorder:
    """Writes a run's metrics as it goes; the leading rank has one."""

    def __init__(
        self,
        path: Path,
        resumed_step: int | None,
        work: Work,
        audience: Audience,
        *,
        done: int = 0,
        busy_s: float = 0.0,
        best: str = "",
    ) -> None:
        """
        resumed_step  step of the state that training goes on from; lines of later steps are dropped
        done, busy_s  updates done, and the time spent in them
        best          what is known of the validation loss, for the progress line
        """
        self.work, self._metrics = work, Metrics(path, resumed_step)
        self._since = (busy_s, done)
        self._recent = deque([self._since])  # what `SHOWN_S` reaches back to comes first
        self._validation = best
        self._progress = Progress(
            work.label, work.steps, "steps", done=done, interval_s=audience.log_interval_s
        )
        self._cpu, self._gpus = CpuCounters(), gpu_counters(work.device, work.ranks)
        self._counted_at = time.monotonic()
        self._window: Window | None = None
        self._window_opens = None
        if audience.profile_step is not None:
            self._window_opens = done + audience.profile_step
        self._writers = _writers(path, resumed_step, work.label, audience)

    # ---- what happened ----

    def write(self, event: str, **facts: Any) -> None:
        """Add a line, at once; numbers of a step go to the other writers too."""
        self._metrics.write(event, **facts)
        step = facts.get("step")
        if step is None or event in ("start", "resume"):
            return
        for index, gpu in enumerate(facts.pop("gpus", ())):
            facts |= {f"gpu{index}_{name}": value for name, value in gpu.items()}
        numbers = {f"{event}/{name}": value for name, value in facts.items() if _is_number(value)}
        numbers.pop(f"{event}/step")
        for writer in self._writers:
            writer.add(step, numbers)

    def describe(self) -> dict[str, Any]:
        """What the rates are relative to, for the lines that say how training runs."""
        gpu = gpu_named(self.work.device_name)
        return {
            "datasheet": gpu and gpu.name,
            "peak_flops_per_s": self.work.peak_flops_per_s,
            "matmul_flops_per_s": round(self.work.matmul_flops_per_s),
            "flops_per_token": self.work.flops_per_token,
        }

    def trained(
        self,
        step: int,
        *,
        loss: float,
        gradient_norm: float,
        learning_rates: Mapping[str, float],
        busy_s: float,
    ) -> None:
        """Record an update; its rates are those since the one that was recorded before.

        learning_rates  by field: `learning_rate`, and `muon_learning_rate` where Muon moves something
        busy_s          spent in updates up to now, by the run as a whole
        """
        work = self.work
        since_s, since_step = self._since
        self._since = (busy_s, step)
        rate = work.batch_tokens * (step - since_step) / max(busy_s - since_s, 1e-9)
        mfu, of_matmul = self._shares(rate)
        self.write(
            "train",
            step=step,
            loss=loss,
            gradient_norm=gradient_norm if math.isfinite(gradient_norm) else None,
            **learning_rates,
            tokens=step * work.batch_tokens,
            elapsed_s=round(busy_s, 3),
            rate_tokens_per_s=round(rate, 1),
            mfu=None if mfu is None else round(mfu, 4),
            matmul_share=None if of_matmul is None else round(of_matmul, 4),
        )
        facts = [f"loss {loss:.3f}", self._validation, *self._shown_rates(busy_s, step)]
        self._progress.update(step, *filter(None, facts))
        if time.monotonic() - self._counted_at >= COUNTERS_INTERVAL_S or step == work.steps:
            self._count(step)

    def _shown_rates(self, busy_s: float, step: int) -> list[str]:
        """Tokens a second over the last seconds, and the share of a peak that this is."""
        recent, work = self._recent, self.work
        while len(recent) > 1 and busy_s - recent[1][0] >= SHOWN_S:
            recent.popleft()
        since_s, since_step = recent[0]
        recent.append((busy_s, step))
        rate = work.batch_tokens * (step - since_step) / max(busy_s - since_s, 1e-9)
        mfu, of_matmul = self._shares(rate)
        share = ""
        if mfu is not None:
            share = f"MFU {mfu:.1%}"
        elif of_matmul is not None:
            share = f"{of_matmul:.0%} of matmul"
        return [quantity(rate, " tokens/s"), share]

    def _shares(self, rate: float) -> tuple[float | None, float | None]:
        """What tokens a second are of the datasheet's peak, and of the product measured here."""
        reached, peak = rate * self.work.flops_per_token, self.work.peak_flops_per_s
        of_matmul = reached / self.work.matmul_flops_per_s
        return (
            None if peak is None else reached / peak,
            of_matmul if of_matmul <= 1 else None,  # something else ran while it was measured
        )

    def validated(self, step: int, loss: float) -> None:
        """Record a validation loss, nats."""
        self._validation = f"val {loss:.3f}"
        self.write("validation", step=step, loss=loss)

    def _count(self, step: int) -> None:
        self._counted_at = time.monotonic()
        facts: dict[str, Any] = self._cpu.read()
        facts["peak_memory_bytes"] = peak_memory_bytes(self.work.device)
        if self._gpus is not None:
            facts["gpus"] = self._gpus.read()
        self.write("counters", step=step, **facts)

    # ---- a close look ----

    def around(self, step: int) -> AbstractContextManager[None]:
        """Around the update that follows `step` updates: profiled if it is one of the window's."""
        if self._window_opens == step and step + STEPS <= self.work.steps:
            self._window = Window(self.work.device, self.work.micro_batches, self.work.ranks)
        if self._window is None or not self._window.open:
            return nullcontext()
        return self._closely(self._window, step)

    @contextlib.contextmanager
    def _closely(self, window: Window, step: int) -> Iterator[None]:
        with window.step():
            yield
        if not window.open:
            seconds = {
                f"{name}_s": None if value is None else round(value, 6)
                for name, value in window.seconds.items()
            }
            self.write("parts", step=step + 1, steps=window.n_steps, **seconds)

    def close(self) -> None:
        """No more is written; also called where training ends early, perhaps within a window."""
        if self._window is not None:
            self._window.close()
        self._metrics.close()
        for writer in self._writers:
            writer.close()
        self._writers = []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- other writers -----------------------------------------------------------------------------


def require_writers(tensorboard: str | None, wandb: str | None) -> None:
    """Look for the packages that settings ask for, before anything is spent.

    raises  UserError with the command that installs a missing one
    """
    for setting, value in (("tensorboard", tensorboard), ("wandb", wandb)):
        if value is not None and importlib.util.find_spec(setting) is None:
            raise UserError(
                f"execution.{setting} = {value}, but the package {setting} is not installed.\n"
                f"  install it (python -m pip install {setting}), or set execution.{setting} to null:"
                " metrics.jsonl has everything"
            )


def _writers(path: Path, resumed_step: int | None, label: str, audience: Audience) -> list[Writer]:
    name = label.split()[-1].replace("/", "-")
    found: list[Writer] = []
    if audience.tensorboard is not None:
        found.append(TensorBoard(Path(audience.tensorboard) / name, resumed_step))
    if audience.wandb is not None:
        found.append(WeightsAndBiases(audience.wandb, name, path.with_name("wandb_id")))
    return found


class TensorBoard:
    """Event files in a folder of the run's own; what a resumed run comes to again replaces what stood there."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=(resumed_step or 0) + 1)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a W&B project; its own environment variables (WANDB_MODE, WANDB_DIR, ...) count."""

    def __init__(self, project: str, name: str, id_file: Path) -> None:
        """id_file: remembers the run, so that training that goes on goes on there"""
        import wandb

        if not id_file.exists():
            write_text_atomically(id_file, uuid.uuid4().hex)
        known = id_file.read_text(encoding="utf-8")
        try:
            self._run: Any = wandb.init(project=project, name=name, id=known, resume="allow")
        except Exception as error:  # its own classes, requests', ...: all mean that it cannot begin
            raise UserError(
                f"Weights & Biases does not begin a run of {project}: {error}\n"
                "  log in (wandb login), set WANDB_MODE=offline, or set execution.wandb to null"
            ) from None

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        # Its steps may only grow, and ours are told several times, and again after going back.
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()
