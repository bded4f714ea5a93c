"""What an interrupted training resumes from: written aside, fsynced, renamed, with digests.

    state_<step>/            one saved state
        __<rank>_0.distcp    tensors, by torch.distributed.checkpoint: each rank writes what it holds
        .metadata            where in them each tensor's parts are
        note.json            the step and the other numbers, whose run it is, sha256 and size of each file
                             and of the best weights
    best_<step>.safetensors  the best weights that a state speaks of
    metrics.jsonl            see `Metrics`

Ranks and strategy may differ between saving and loading. A single flipped byte would load without
complaint (torch and safetensors check none), so a state is hashed before it is used, and a damaged one
is passed over for the one before, aloud; .metadata is a pickle, and is not opened before that either.

A state is copied at once and written by a thread while training goes on. That thread's ranks talk in a
process group of their own: in the training's, messages of both would meet and crash it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from snakegpt.distributed import Group
from snakegpt.durable import remove, sync, write_text_atomically
from snakegpt.errors import UserError
from snakegpt.identity import file_digest
from snakegpt.progress import quantity, say

NOTE = "note.json"


class Saved(NamedTuple):
    """A whole state on disk. `note` holds what `StateFolder.save` was given beside the tensors."""

    folder: Path
    note: dict[str, Any]

    @property
    def step(self) -> int:
        step: int = self.note["step"]
        return step

    # torch.distributed.checkpoint takes a second to load: where it is used, after the first steps.

    def sizes(self) -> dict[str, torch.Size]:
        """Name and whole size of every tensor in it."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        found = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        return {name: m.size for name, m in found.items() if isinstance(m, TensorStorageMetadata)}

    def whole(self) -> dict[str, Tensor]:
        """All of it, whole, whatever the ranks were."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        tensors = {name: torch.empty(size) for name, size in self.sizes().items()}
        load(tensors, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return tensors


class StateFolder:
    """The states of one run in a folder of their own, and the best weights they speak of."""

    def __init__(
        self, folder: Path, label: str, group: Group, run: Mapping[str, Any], *, kept: int = 2
    ) -> None:
        """All ranks make one.

        label  what damage is reported under
        run    settings and inputs that decide the run, as JSON values: a state of another is refused
        kept   newest states that stay; beside them the newest one to go back to stays
        """
        self.folder, self.label, self.group, self.kept = folder, label, group, kept
        self.run = json.loads(json.dumps(run))
        self._gloo = dist.new_group(backend="gloo") if group.ranks > 1 else None
        # One rank has no process group, and is told at each save that it has none.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[None] | None = None
        self._stager: Any = None
        if group.leads:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*"):  # what was being written when the run was killed
                remove(left)

    @property
    def metrics(self) -> Path:
        """The metrics of the run so far; see `Metrics`."""
        return self.folder / "metrics.jsonl"

    def best_weights(self, step: int) -> Path:
        """Where the weights stand that were best when validated after `step` updates."""
        return self.folder / f"best_{step:09d}.safetensors"

    # ---- saving ----

    def save(self, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Copy tensors, and let a thread write them while training goes on. All ranks call.

        note     JSON values. "step" names the state, "best_step" the best weights to keep, "good"
                 whether training may go back to it
        raises   what went wrong when the state before it was written
        """
        self.wait()
        if self._path(note["step"]).exists():  # a function of the step: it is this one
            return
        self._stager = self._stager or _stager()
        staged = self._stager.stage(tensors)
        self._writing = self._thread.submit(self._write, staged, note)

    def wait(self) -> None:
        """Until what was saved is on the disk; raises what went wrong there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _path(self, step: int) -> Path:
        return self.folder / f"state_{step:09d}"

    def _write(self, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        final = self._path(note["step"])
        aside = final.with_name(f".{final.name}")
        writer = FileSystemWriter(aside, single_file_per_rank=True, sync_files=True)
        try:
            save(
                tensors,
                storage_writer=writer,
                process_group=self._gloo,
                no_dist=self._gloo is None,
            )
            if self.group.leads:
                self._give_name(aside, final, note)
        except BaseException as failure:
            if self.group.leads:
                remove(aside)  # half a state, of which a full disk has no use
            if not isinstance(failure, CheckpointException):
                raise
            # Of any rank: what people can mend is in it.
            errors = [error for error, _ in failure.failures.values()]
            raise next((e for e in errors if isinstance(e, OSError)), failure) from None
        if self.group.leads:
            self._prune()

    def _give_name(self, aside: Path, final: Path, note: Mapping[str, Any]) -> None:
        """Note what a state's files hold and let it be one."""
        files = {file.name: _pin(file) for file in sorted(aside.iterdir())}
        best = self.best_weights(note["best_step"])
        pinned = {"best": _pin(best)} if best.exists() else {}
        _write_note(aside, {**note, **pinned, "run": self.run, "files": files})
        sync(aside)
        if self.metrics.exists():  # its lines up to this step, which no later run writes again
            sync(self.metrics)
        aside.rename(final)
        sync(self.folder)

    def _prune(self) -> None:
        states = sorted(self.folder.glob("state_*"))
        notes = {state: _note(state) for state in states}
        good = [state for state in states if notes[state].get("good")]
        kept = {*states[-self.kept :], *good[-1:]}
        for state in set(states) - kept:
            _discard(state)
        best = {self.best_weights(notes[state].get("best_step", 0)) for state in kept}
        # Later ones belong to a state that is still to come: training goes on meanwhile.
        newest = self.best_weights(int(states[-1].name.removeprefix("state_")))
        for file in set(self.folder.glob("best_*.safetensors")) - best:
            if file <= newest:
                file.unlink()

    # ---- loading ----

    def newest(self) -> Saved | None:
        """The newest state that is whole, the same on all ranks; None if there is none.

        raises  UserError if it is another run's
        """
        return self._agreed(self._newest_whole() if self.group.leads else None)

    def at(self, step: int) -> Saved:
        """The state that was saved after so many updates."""
        return Saved(self._path(step), _note(self._path(step)))

    def newest_good(self) -> Saved | None:
        """The newest state that training may go back to, the same on all ranks."""
        return self._agreed(self._newest_whole(good=True) if self.group.leads else None)

    def _agreed(self, leads: Saved | None) -> Saved | None:
        step = int(self.group.sum(torch.tensor(leads.step + 1 if leads else 0))) - 1
        if step < 0:
            return None
        saved = self.at(step)
        if saved.note["run"] != self.run:
            raise UserError(
                f"the state in {self.folder} is of another run:"
                f" {'; '.join(_differences(saved.note['run'], self.run))}.\n"
                "  give another --state folder, or remove this one to start anew"
            )
        return saved

    def _newest_whole(self, *, good: bool = False) -> Saved | None:
        self.wait()
        for state in sorted(self.folder.glob("state_*"), reverse=True):
            damage = _damage(state)
            if damage is None and (note := _note(state)).get("good", False) >= good:
                return Saved(state, note)
            if damage is not None:
                say(f"{self.label}  {state.name} is damaged ({damage}): trying the one before it")
        return None

    def best_is_whole(self, saved: Saved) -> bool:
        """Whether the best weights that a state speaks of are there as they were, or it has none.

        All ranks ask. If not, that is said: training is not lost for it, and finds others.
        """
        damage = None
        if self.group.leads and (step := saved.note["best_step"]):
            damage = _damage_of(self.best_weights(step), saved.note.get("best"))
            if damage:
                say(
                    f"{self.label}  the best weights, of step {step:,}, are damaged ({damage}):"
                    " the best from here on count"
                )
        return not int(self.group.sum(torch.tensor(int(damage is not None))))

    def load(self, saved: Saved, room: dict[str, Tensor]) -> None:
        """Fill tensors, by name, from a state; each rank what it made room for."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(
            room,
            storage_reader=FileSystemReader(saved.folder),
            process_group=self._gloo,
            no_dist=self._gloo is None,
        )

    def go_back(self, saved: Saved, **changes: Any) -> None:
        """Change the note of a state and drop those after it. The leading rank calls.

        In this order: if it is cut short, a later run starts from a newer state, comes to the same
        decision and makes the same changes.
        """
        _write_note(saved.folder, {**saved.note, **changes})
        self.drop_after(saved.step)

    def drop_after(self, step: int) -> None:
        """Remove states of later steps, which training will come to again."""
        for state in self.folder.glob("state_*"):
            if state > self._path(step):
                _discard(state)
        sync(self.folder)

    def require_space(self, n_parameters: int) -> None:
        """UserError unless the folder's disk holds the states that training will keep there.

        A state is weights and two moments in float32; one is written before the oldest is dropped, one
        to go back to may stay beside those kept, and each may have best weights of its own.
        """
        weights = 4 * n_parameters
        needed = (self.kept + 2) * (3 + 1) * weights
        used = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.folder).free + used
        if free < needed:
            raise UserError(
                f"training keeps up to {quantity(needed, 'B')} of states in {self.folder},"
                f" where {quantity(free, 'B')} are free.\n"
                "  free some space, lower execution.keep_states, or move the store to a larger disk"
                " (`store:` in the settings)"
            )


def _stager() -> Any:
    """What copies tensors to memory of its own: pinned where they are on a GPU, the same each time."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    pinned = torch.cuda.is_available()
    options = StagingOptions(
        use_pinned_memory=pinned,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=pinned,
    )
    return DefaultStager(options)


def newest_step(folder: Path) -> int:
    """Step of the newest state in a folder, whole or not; 0 if there is none."""
    names = (state.name for state in folder.glob("state_*"))
    return max((int(name.removeprefix("state_")) for name in names), default=0)


def _write_note(state: Path, note: Mapping[str, Any]) -> None:
    write_text_atomically(state / NOTE, json.dumps(note, indent=2, sort_keys=True) + "\n")


def _note(state: Path) -> dict[str, Any]:
    """What a state says of itself; nothing if that is damaged."""
    with contextlib.suppress(OSError, ValueError):
        note = json.loads((state / NOTE).read_text("utf-8"))
        return note if isinstance(note, dict) else {}
    return {}


def _damage(state: Path) -> str | None:
    note = _note(state)
    if not {"step", "run", "files"} <= note.keys():
        return f"{NOTE} is not readable"
    damages = (_damage_of(state / name, pin) for name, pin in note["files"].items())
    return next(filter(None, damages), None)


def _pin(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def _damage_of(file: Path, pin: Mapping[str, Any] | None) -> str | None:
    """In what a file is not as it was noted; None if it is, or if only its name was."""
    try:
        size = file.stat().st_size
        if pin and size != pin["bytes"]:
            return f"{file.name} has {size:,} bytes instead of {pin['bytes']:,}"
        if pin and file_digest(file) != pin["sha256"]:
            return f"the sha256 of {file.name} is not the one noted"
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return None


def _discard(state: Path) -> None:
    """Remove a state so that a half-removed one is never taken for a damaged one."""
    gone = state.with_name(f".{state.name}.gone")
    remove(gone)
    state.rename(gone)
    remove(gone)


def _differences(was: Any, now: Any, where: str = "") -> list[str]:
    """Where two trees of JSON values differ: `training.steps 100, here 200`."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        dotted = f"{where}." if where else ""
        return [line for k in keys for line in _differences(was.get(k), now.get(k), f"{dotted}{k}")]
    return [] if was == now else [f"{where} {was!r}, here {now!r}"]


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
