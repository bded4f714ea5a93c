"""The training loop: batches in, weights and metrics out; stopped at any moment, it goes on where it was.

The bytes of the weights depend on the recipe, the tokens and the modules named in train_model's SCIENCE.
What is here decides them too, and counts through that stage's REVISION, which a golden test guards.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snakegpt.continuation import Finished, fill, leave
from snakegpt.counters import peak_memory_bytes
from snakegpt.distributed import Group, StopRequest
from snakegpt.durable import write_atomically, write_text_atomically
from snakegpt.errors import Interrupted, UserError
from snakegpt.hardware import device_name, measure_matmul
from snakegpt.huggingface_format import save_weights
from snakegpt.metrics import Audience, Recorder, Work
from snakegpt.model import Shape, flops_per_token, n_parameters
from snakegpt.outcomes import StartAgain
from snakegpt.progress import quantity, say
from snakegpt.settings import Training, science
from snakegpt.stability import as_json
from snakegpt.starting import Start
from snakegpt.tokens import TokenSet
from snakegpt.training_state import Saved, StateFolder
from snakegpt.updates import Launch, TooLarge, Updates
from snakegpt.watchdog import Watchdog

MATMUL_LIMIT_S = 0.2  # of the matrix products that the rates are compared with


class Unstable(Exception):
    """Too many updates in a row were skipped, or the weights are no numbers any more."""


class Trainer:
    """One rank's view of a run."""

    def __init__(
        self,
        shape: Shape,
        recipe: Training,
        train: list[TokenSet],
        validation: list[TokenSet],
        launch: Launch,
        group: Group,
        state_folder: Path,
        tokenizer_fingerprint: str,
        *,
        end_of_text: int = 0,
        inputs: Mapping[str, Any] | None = None,
        before: Finished | Start | None = None,
        started_from: str | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """
        inputs        digests of what is trained on, which a saved state must share
        before        a run to go on from, or weights to start from; None: new weights
        started_from  what people call it
        watchdog      told of each step
        """
        self.shape, self.recipe, self.launch, self.group = shape, recipe, launch, group
        self.fingerprint, self.before = tokenizer_fingerprint, before
        self.watchdog = watchdog or Watchdog(None)
        self.started_from = before and {
            "name": started_from,
            "sha256": before.note["weights_sha256"],
        }
        run = {
            "model": asdict(shape),
            "training": science(recipe),
            "tokenizer": tokenizer_fingerprint,
            **(inputs or {}),
            "continued": before.note if before else None,
        }
        self.states = StateFolder(state_folder, launch.label, group, run, kept=launch.keep_states)
        # Looked for first: to make the network ready may take minutes.
        self.saved = self.states.newest()
        if group.leads and self.saved is None:
            self.states.require_space(n_parameters(shape))
        self.updates = Updates(
            shape,
            recipe,
            train,
            validation,
            self._with_what_fitted(),
            group,
            end_of_text,
            beat=self.watchdog.beat,
        )
        self.step = 0  # updates done, or skipped
        self.skipped_batches = 0  # of the order, where training went back
        self.metrics: Recorder | None = None
        self.rollbacks = 0
        self.matmul_flops_per_s: float | None = None  # of all ranks together
        self.busy_s = 0.0  # in updates: without validation, saving and start-up
        self.best_step, self.best_loss = 0, math.inf

    # ---- the loop ----

    def run(self, out: Path) -> None:
        """Train to the last step and write weights, best weights, optimiser and metrics to `out`.

        raises  Interrupted after a stop signal, with the state saved; StartAgain if a micro-batch did not
                fit on one of several ranks; UserError if training diverges
        """
        stop = StopRequest()
        saved = self.saved
        if saved is None and isinstance(self.before, Finished):
            self._continue(self.before)
        if saved is None and isinstance(self.before, Start):
            self._start(self.before)
        if self.group.leads:
            self.states.drop_after(saved.step if saved else -1)  # damaged ones
        while True:
            try:
                self._train(saved, stop, out)
                return
            except Unstable as reason:
                saved = self._go_back(str(reason))
            except TooLarge:
                raise StartAgain(self._ask_for_less()) from None
            finally:
                self.updates.stop()
                if self.metrics:
                    self.metrics.close()

    def _train(self, saved: Saved | None, stop: StopRequest, out: Path) -> None:
        if saved:
            self._resume(saved)
        updates = self.updates
        updates.start(self.step + self.skipped_batches)
        metrics = self.metrics = self._recorder(saved)
        if metrics:
            self._describe(metrics, saved)
        if saved is None and isinstance(self.before, Start):
            val_loss = updates.validate(self.watchdog.beat)  # what training is to improve on
            if metrics:
                metrics.validated(0, val_loss)
        recipe, label = self.recipe, self.launch.label
        every = max(1, recipe.steps // 1000)  # a thousand points make a full chart
        saved_at = time.monotonic()
        while self.step < recipe.steps:
            started = time.monotonic()
            with metrics.around(self.step) if metrics else contextlib.nullcontext():
                norm = updates.update(self.step, self.step + self.skipped_batches)
            self.step += 1
            last = self.step == recipe.steps
            logs = last or self.step % every == 0
            mean_loss = float(updates.mean_loss()) if logs else math.nan  # waits for the device
            self.busy_s += time.monotonic() - started
            self.watchdog.beat(f"step {self.step}")
            validates = last or self.step % recipe.validation_interval == 0
            good = False
            if logs or validates or self.step == 1:
                self._note_skipped(metrics)
            if logs and metrics and math.isfinite(mean_loss):
                metrics.trained(
                    self.step,
                    loss=mean_loss,
                    gradient_norm=float(norm),
                    learning_rates=updates.learning_rates(self.step - 1),
                    busy_s=self.busy_s,
                )
            if logs or validates or self.step == 1:
                self._require_steady()
            if validates:
                val_loss = updates.validate(self.watchdog.beat)
                if not math.isfinite(val_loss):
                    raise Unstable(f"the validation loss is {val_loss}")
                self._keep_if_best(val_loss)
                good = updates.judge.in_a_row == 0 and recipe.rollbacks > 0
                if metrics:
                    metrics.validated(self.step, val_loss)
            due = time.monotonic() - saved_at >= self.launch.save_interval_s
            stopping, due = self._agreed(stop.came, due and self.group.leads)
            if due or stopping or last or good:
                self._note_skipped(metrics)
                self._save(good=good)
                saved_at = time.monotonic()
            if stopping and not last:
                self.states.wait()
                raise Interrupted(f"{label} saved its state at step {self.step:,}")
        self.states.wait()
        self.watchdog.beat("the last step and its state")  # large files take a slow disk minutes
        whole = updates.strategy.whole_model()
        if metrics and whole:
            self._finish(metrics)
            save_weights(out / "weights.safetensors", whole, self.fingerprint)
            self.watchdog.beat("writing the weights")
            shutil.copyfile(self.states.best_weights(self.best_step), out / "best.safetensors")
            shutil.copyfile(self.states.metrics, out / "metrics.jsonl")
            leave(out, self.states.at(self.step), recipe, self.fingerprint)

    # ---- what is not taken, and going back ----

    def _note_skipped(self, metrics: Recorder | None) -> None:
        for step, loss, norm in self.updates.judge.look():
            if metrics:
                facts = {"loss": as_json(loss), "gradient_norm": as_json(norm)}
                metrics.write("skipped", step=step, **facts)
                say(
                    f"{self.launch.label}  skipped the update of step {step:,}:"
                    f" loss {loss:.4g}, gradient norm {norm:.4g}"
                )

    def _require_steady(self) -> None:
        judge = self.updates.judge
        if self.step == 1 and judge.in_a_row and judge.scale is None:
            raise UserError(
                "the loss or its gradient is no finite number at the very first step.\n"
                "  nothing has been learnt yet that could have diverged: look at the tokens, at"
                " model's sizes, at training.precision, and at weights that are continued from"
            )
        if judge.in_a_row >= self.recipe.rollback_after:
            raise Unstable(f"{judge.in_a_row} updates in a row were skipped")

    def _go_back(self, reason: str) -> Saved:
        """Drop what came after the last good state, and have training go on there with other data."""
        saved = self.states.newest_good()
        if saved is None or self.rollbacks >= self.recipe.rollbacks:
            tried = f", after going back {self.rollbacks} times" if self.rollbacks else ""
            raise UserError(
                f"training has diverged at step {self.step:,}: {reason}{tried}.\n"
                "  lower training.learning_rate, raise training.warmup_steps or set"
                " training.gradient_clip; a changed setting starts from the first step"
            )
        changes = {
            "skipped_batches": self.skipped_batches + self.step - saved.step,
            "rollbacks": self.rollbacks + 1,
        }
        if self.group.leads:
            self.states.go_back(saved, **changes)
            say(
                f"{self.launch.label}  {reason}: goes back from step {self.step:,} to"
                f" {saved.step:,} and leaves out the data in between"
            )
        note = {**saved.note, **changes, "from_step": self.step, "reason": reason}
        return saved._replace(note=note)

    def _ask_for_less(self) -> str:
        """Note, for the next attempt, that this micro-batch was too large."""
        was, rows = self.updates.micro_rows, self.updates.shrink()
        fitted = {"micro_rows": rows, "activation_checkpointing": self.updates.computes_twice}
        write_text_atomically(self._fitted, json.dumps(fitted))
        return f"{self.launch.label}  {was} rows at once did not fit on rank {self.group.rank}"

    @property
    def _fitted(self) -> Path:
        return self.states.folder / "fitted.json"

    def _with_what_fitted(self) -> Launch:
        """The launch with what an attempt before this one left, for want of memory."""
        if not self._fitted.exists() or self.launch.deterministic:
            return self.launch
        fitted = json.loads(self._fitted.read_text(encoding="utf-8"))
        rows, share = fitted["micro_rows"], self.recipe.batch_tokens // self.shape.context
        if rows > self.launch.micro_rows or share // self.group.ranks % rows:
            return self.launch  # of another number of ranks
        twice = fitted["activation_checkpointing"] or self.launch.activation_checkpointing
        if self.group.leads:
            say(f"{self.launch.label}  {rows} rows at once, as an attempt before this one found")
        changes = {"micro_rows": rows, "probed": False, "activation_checkpointing": twice}
        return Launch(**{**self.launch.__dict__, **changes})

    # ---- what is kept ----

    def _save(self, *, good: bool) -> None:
        """Write, while training goes on, what a later run resumes from."""
        self.states.save(
            {**self.updates.strategy.tensors(), **self.updates.judge.tensors()},
            {
                "step": self.step,
                "good": good,
                "best_step": self.best_step,
                "best_loss": as_json(self.best_loss),
                "busy_s": self.busy_s,
                "in_a_row": self.updates.judge.in_a_row,
                "skipped_batches": self.skipped_batches,
                "rollbacks": self.rollbacks,
            },
        )

    def _resume(self, saved: Saved) -> None:
        strategy, judge = self.updates.strategy, self.updates.judge
        room: dict[str, Tensor] = {**strategy.room_for(saved.sizes()), **judge.tensors()}
        self.states.load(saved, room)
        strategy.take(room)
        judge.resume(saved.note["in_a_row"])
        self._continue_with(saved.note)
        self.best_step = saved.note["best_step"] if self.states.best_is_whole(saved) else 0
        self.best_loss = math.inf if not self.best_step else saved.note["best_loss"]
        self.busy_s = saved.note["busy_s"]
        if self.group.leads:
            say(f"{self.launch.label}  resumes at step {self.step:,} of {self.recipe.steps:,}")

    def _continue(self, before: Finished) -> None:
        """Take what a finished run left."""
        strategy, judge, whole = self.updates.strategy, self.updates.judge, before.tensors()
        room = {
            **strategy.room_for({name: tensor.shape for name, tensor in whole.items()}),
            **judge.tensors(),
        }
        fill(room, whole)
        strategy.take(room)
        judge.resume(before.note["in_a_row"])
        self._continue_with(before.note)
        if self.group.leads:
            say(f"{self.launch.label}  continues a run of {self.step:,} steps")

    def _start(self, before: Start) -> None:
        """Take the weights that somebody trained; optimiser, schedule and order of data are new.

        Here, and not where new weights are made, since each rank takes its part whatever the strategy.
        """
        fill(self.updates.strategy.room_for({}), before.tensors())
        if self.group.leads:
            name = (self.started_from and self.started_from["name"]) or before.weights
            say(f"{self.launch.label}  starts from the weights of {name}")

    def _continue_with(self, note: Mapping[str, Any]) -> None:
        self.step, self.skipped_batches = note["step"], note["skipped_batches"]
        self.rollbacks = note["rollbacks"]

    def _keep_if_best(self, loss: float) -> None:
        if loss >= self.best_loss and self.best_step:
            return
        self.best_step, self.best_loss = self.step, loss
        whole = self.updates.strategy.whole_model()
        if self.group.leads and whole:
            write_atomically(
                self.states.best_weights(self.step),
                lambda path: save_weights(path, whole, self.fingerprint),
            )

    # ---- what is said ----

    def _finish(self, metrics: Recorder) -> None:
        done_before = self.before.note["step"] if isinstance(self.before, Finished) else 0
        steps = self.step - done_before
        metrics.write(
            "end",
            step=self.step,
            elapsed_s=round(self.busy_s, 3),
            rate_tokens_per_s=round(steps * self.recipe.batch_tokens / max(self.busy_s, 1e-9), 1),
            peak_memory_bytes=peak_memory_bytes(self.launch.device),
            best_step=self.best_step,
            best_loss=self.best_loss,
        )
        metrics.close()

    def _recorder(self, saved: Saved | None) -> Recorder | None:
        """What is seen, on the leading rank. All ranks call: their devices are measured at once."""
        launch, updates = self.launch, self.updates
        precision = str(launch.dtype).removeprefix("torch.")
        if self.matmul_flops_per_s is None:
            mine = measure_matmul(launch.device, precision, limit_s=MATMUL_LIMIT_S)
            everyone = self.group.sum(torch.tensor(mine, dtype=torch.float64))
            self.matmul_flops_per_s = float(everyone)
        if not self.group.leads:
            return None
        work = Work(
            label=launch.label,
            steps=self.recipe.steps,
            batch_tokens=self.recipe.batch_tokens,
            flops_per_token=flops_per_token(self.shape),
            device=launch.device,
            device_name=device_name(launch.device),
            precision=precision,
            ranks=self.group.ranks,
            micro_batches=updates.accumulation,
            matmul_flops_per_s=self.matmul_flops_per_s,
        )
        return Recorder(
            self.states.metrics,
            saved and saved.step,
            work,
            Audience(launch.log_interval_s, launch.profile_step, launch.tensorboard, launch.wandb),
            done=self.step,
            busy_s=self.busy_s,
            best=f"val {self.best_loss:.3f}" if self.best_step else "",
        )

    def _describe(self, metrics: Recorder, saved: Saved | None) -> None:
        if saved and "from_step" in saved.note:
            metrics.write(
                "rolled_back",
                step=saved.step,
                from_step=saved.note["from_step"],
                reason=saved.note["reason"],
                rollbacks=self.rollbacks,
            )
            return
        launch, updates = self.launch, self.updates
        facts: dict[str, Any] = {
            "device": device_name(launch.device),
            "ranks": self.group.ranks,
            "strategy": launch.strategy if self.group.ranks > 1 else None,
            "deterministic": launch.deterministic,
            "rows_per_rank": updates.micro_rows,
            "accumulation": updates.accumulation,
            "precision": str(launch.dtype).removeprefix("torch."),
            "attention": launch.kernel,
            "compiled": updates.compiled,
            "threads": launch.threads,
            "n_parameters": n_parameters(self.shape),
            "torch": torch.__version__,
            **metrics.describe(),
            "started_from": self.started_from,
            "host_cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        }
        if saved is None:
            metrics.write("start", **facts)
        else:
            metrics.write("resume", step=saved.step, **facts)
        shared = f" {launch.strategy}," if self.group.ranks > 1 else ""
        say(
            f"{launch.label}  {quantity(facts['n_parameters'])} parameters, {self.group.ranks} x"
            f" {facts['device']},{shared} {facts['precision']}, {updates.micro_rows} rows x"
            f" {updates.accumulation} accumulated, attention {launch.kernel},"
            f" {launch.threads} threads a rank{', compiled' if updates.compiled else ''}"
        )

    # ---- ranks agree ----

    def _agreed(self, *conditions: bool) -> tuple[bool, ...]:
        """Whether each holds on any rank."""
        return tuple(
            map(bool, self.group.sum(torch.tensor(conditions, dtype=torch.int32)).tolist())
        )
