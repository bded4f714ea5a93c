"""What an interrupted training resumes from: written aside, fsynced, renamed, with a digest.

A state is two files, `state_<step>.pt` and then `state_<step>.json`, which says how long the first is
and what its sha256 is, and whose presence makes the state count. The last two are kept: a single
flipped byte would load without complaint (torch and safetensors check none), so every state is hashed
before it is used, and a damaged one is passed over for the one before, aloud.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from snakegpt.durable import write_atomically, write_text_atomically
from snakegpt.errors import UserError
from snakegpt.identity import file_digest
from snakegpt.progress import quantity, say

KEPT = 2


class StateFolder:
    """The states of one run in a folder of their own, and the best weights they speak of."""

    def __init__(self, folder: Path, label: str | None) -> None:
        """label: what damage is reported under; None for ranks that leave the talking to another."""
        self.folder, self.label = folder, label
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def metrics(self) -> Path:
        """The metrics of the run so far; see `Metrics`."""
        return self.folder / "metrics.jsonl"

    def best_weights(self, step: int) -> Path:
        """Where the weights stand that were best when validated after `step` updates."""
        return self.folder / f"best_{step:09d}.safetensors"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save tensors, numbers, strings and containers of them, and drop what is no longer needed.

        state["best_step"] names the best weights to keep.
        """
        file = self.folder / f"state_{step:09d}.pt"
        write_atomically(file, lambda path: torch.save(state, path))
        note = {
            "step": step,
            "best_step": state["best_step"],
            "bytes": file.stat().st_size,
            "sha256": file_digest(file),
        }
        text = json.dumps(note, indent=2, sort_keys=True) + "\n"
        write_text_atomically(file.with_suffix(".json"), text)
        self._prune()

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole; None if there is none."""
        for note_file in sorted(self.folder.glob("state_*.json"), reverse=True):
            file = note_file.with_suffix(".pt")
            damage = _damage(file, note_file)
            if damage is None:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                return state
            if self.label:
                say(f"{self.label}  {file.name} is damaged ({damage}): trying the state before it")
        return None

    def require_space(self, n_parameters: int) -> None:
        """UserError unless the folder's disk holds the states that training will keep there.

        A state is weights and two moments in float32; one is written before the oldest is dropped, and
        each kept one may have best weights of its own.
        """
        weights = 4 * n_parameters
        needed = (KEPT + 1) * (3 + 1) * weights
        used = sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        free = shutil.disk_usage(self.folder).free + used
        if free < needed:
            raise UserError(
                f"training keeps up to {quantity(needed, 'B')} of states in {self.folder},"
                f" where {quantity(free, 'B')} are free.\n"
                "  free some space, or move the store to a larger disk (`store:` in the settings)"
            )

    def _prune(self) -> None:
        notes = sorted(self.folder.glob("state_*.json"))
        for note in notes[:-KEPT]:
            note.unlink()
            note.with_suffix(".pt").unlink(missing_ok=True)
        kept = set()
        for note in notes[-KEPT:]:
            with contextlib.suppress(ValueError, KeyError):  # a damaged note speaks of nothing
                kept.add(self.best_weights(json.loads(note.read_text("utf-8"))["best_step"]))
        for file in set(self.folder.glob("best_*.safetensors")) - kept:
            file.unlink()


class Metrics:
    """metrics.jsonl: one JSON object a line, as training goes; a resumed run goes on after its step."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        """Open for appending; lines of steps after the resumed one never happened and are dropped."""
        kept = [] if resumed_step is None else list(_lines_up_to(path, resumed_step))
        text = "".join(f"{line}\n" for line in kept)
        write_text_atomically(path, text)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Add a line, at once."""
        self._file.write(json.dumps({"event": event, **facts}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(path: Path, step: int) -> Iterable[str]:
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            fact = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            continue
        if fact["event"] != "end" and fact.get("step", 0) <= step:
            yield line


def _damage(file: Path, note_file: Path) -> str | None:
    try:
        note = json.loads(note_file.read_text("utf-8"))
        size = file.stat().st_size
        if size != note["bytes"]:
            return f"{size:,} bytes instead of {note['bytes']:,}"
        return None if file_digest(file) == note["sha256"] else "its sha256 is not the one noted"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
