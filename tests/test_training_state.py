"""A saved state is whole or passed over; metrics never tell what did not happen."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from snakegpt import training_state
from snakegpt.distributed import Group
from snakegpt.durable import write_atomically
from snakegpt.errors import UserError
from snakegpt.training_state import Metrics, StateFolder, newest_step

RUN = {"model": {"layers": 2}, "training": {"steps": 100, "seed": 1}}


def states(folder, run=RUN, kept=2) -> StateFolder:
    return StateFolder(folder, "train_model x", Group(), run, kept=kept)


def save(folder: StateFolder, step: int, best: int = 0, *, good: bool = False) -> None:
    tensors = {"model.w": torch.full((300,), float(step)), "count": torch.tensor(step)}
    folder.save(tensors, {"step": step, "best_step": best, "good": good})
    folder.wait()


def loaded(folder: StateFolder) -> float | None:
    saved = folder.newest()
    if saved is None:
        return None
    room = {"model.w": torch.zeros(300)}
    folder.load(saved, room)
    assert room["model.w"].unique().numel() == 1
    assert saved.sizes() == {"model.w": torch.Size([300]), "count": torch.Size([])}
    return room["model.w"][0].item()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_state_comes_back(tmp_path):
    folder = states(tmp_path)
    assert loaded(folder) is None
    for step in (1, 2, 30):
        save(folder, step)
    assert loaded(folder) == 30.0
    assert newest_step(tmp_path) == 30
    whole = folder.newest().whole()
    assert whole["count"] == 30 and torch.equal(whole["model.w"], torch.full((300,), 30.0))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_as_many_as_asked_for_are_kept_with_their_best_weights(tmp_path, kept):
    folder = states(tmp_path, kept=kept)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 4)):
        folder.best_weights(best).write_text("weights")
        save(folder, step, best)
    left = range(5 - kept, 5)
    best = sorted({{1: 1, 2: 2, 3: 2, 4: 4}[step] for step in left})
    assert names(tmp_path) == [
        *(f"best_{step:09d}.safetensors" for step in best),
        *(f"state_{step:09d}" for step in left),
    ]


def test_one_to_go_back_to_stays_until_there_is_a_newer_one(tmp_path):
    folder = states(tmp_path)
    for step in range(1, 8):
        save(folder, step, good=step in (1, 2))
    assert names(tmp_path) == [f"state_{step:09d}" for step in (2, 6, 7)]
    good = folder.newest_good()
    assert good.step == 2
    folder.go_back(good, skipped_batches=5)
    assert names(tmp_path) == ["state_000000002"]
    assert folder.newest().note["skipped_batches"] == 5
    assert loaded(folder) == 2.0


def test_best_weights_of_a_state_that_is_still_to_come_stay(tmp_path):
    folder = states(tmp_path)
    folder.best_weights(5).write_text("written while the state of step 4 is")
    save(folder, 4)
    assert folder.best_weights(5).exists()


@pytest.mark.parametrize(
    "damage", ["flipped byte", "truncated", "index", "no note", "half a note", "gone"]
)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, capsys, damage):
    folder = states(tmp_path)
    for step in (1, 2):
        save(folder, step)
    newest = tmp_path / "state_000000002"
    file, note = newest / "__0_0.distcp", newest / "note.json"
    if damage == "flipped byte":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "index":
        (newest / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that runs code
    elif damage == "no note":
        note.unlink()
    elif damage == "half a note":
        note.write_text(note.read_text()[:9])
    else:
        file.unlink()
    assert loaded(states(tmp_path)) == 1.0
    said = capsys.readouterr().err
    assert "train_model x  state_000000002 is damaged (" in said
    folder.drop_after(1)
    assert names(tmp_path) == ["state_000000001"]


def test_what_was_being_written_when_the_run_was_killed_is_not_taken_for_a_state(tmp_path):
    save(states(tmp_path), 1)
    (tmp_path / ".state_000000002").mkdir()
    (tmp_path / ".state_000000002" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".best_000000002.safetensors.4711").write_bytes(b"half of the best weights")
    assert loaded(states(tmp_path)) == 1.0
    assert names(tmp_path) == ["state_000000001"]


def test_a_state_of_another_run_is_refused_with_what_differs(tmp_path):
    save(states(tmp_path), 1)
    other = {"model": {"layers": 3}, "training": {"steps": 100, "seed": 1, "momentum": 0.5}}
    with pytest.raises(UserError) as refusal:
        states(tmp_path, other).newest()
    assert "model.layers 2, here 3; training.momentum None, here 0.5." in str(refusal.value)


def test_training_goes_on_while_a_state_is_written_and_changes_it_no_more(tmp_path, monkeypatch):
    folder = states(tmp_path)
    weights = torch.ones(300)
    may_write = threading.Event()
    write = folder._write

    def waits(tensors, note):
        assert may_write.wait(20)
        write(tensors, note)

    monkeypatch.setattr(folder, "_write", waits)
    folder.save({"model.w": weights, "count": torch.tensor(1)}, {"step": 1, "best_step": 0})
    weights += 1  # the next update, before anything is on the disk
    assert names(tmp_path) == []
    may_write.set()
    assert loaded(folder) == 1.0


def test_a_file_that_cannot_be_written_is_the_systems_error_at_the_next_save(tmp_path):
    """A full disk is a message for people (snakegpt.errors), if it arrives as what it is."""
    folder = states(tmp_path)
    save(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        folder.save({"w": torch.ones(9)}, {"step": 2, "best_step": 0})
        with pytest.raises(OSError, match="File too large"):
            folder.save({"w": torch.ones(9)}, {"step": 3, "best_step": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [
        "state_000000001"
    ]  # and nothing half written takes what room there is
    assert loaded(states(tmp_path)) == 1.0


def test_the_metrics_are_on_the_disk_before_the_state_that_makes_them_final(tmp_path, monkeypatch):
    """Or a machine that loses its power would leave a hole in them."""
    folder = states(tmp_path)
    folder.metrics.write_text("lines up to step 1")
    synced = []

    def note(path):
        synced.append((path.name, (tmp_path / "state_000000001").exists()))

    monkeypatch.setattr(training_state, "sync", note)
    save(folder, 1)
    assert ("metrics.jsonl", False) in synced


def test_the_note_says_what_the_files_hold(tmp_path):
    save(states(tmp_path), 7, 3)
    note = json.loads((tmp_path / "state_000000007" / "note.json").read_text())
    assert (note["step"], note["best_step"], note["run"]) == (7, 3, RUN)
    assert set(note["files"]) == {"__0_0.distcp", ".metadata"}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_too_little_disk_is_an_error_before_training(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"keeps up to 64MB of states(.|\n)*1kB are free"):
        states(tmp_path).require_space(1_000_000)  # 4 states x 4 copies x 4 bytes
    states(tmp_path).require_space(10)


def test_metrics_forget_what_came_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, None)
    first.write("start")
    for step in range(1, 6):
        first.write("train", step=step, loss=0.5)
    first.close()
    with path.open("a") as file:
        file.write('{"event": "train", "st')  # killed while writing
    resumed = Metrics(path, 3)
    resumed.write("resume", step=3)
    resumed.close()
    assert path.read_text().splitlines() == [
        '{"event": "start"}',
        *(f'{{"event": "train", "step": {step}, "loss": 0.5}}' for step in (1, 2, 3)),
        '{"event": "resume", "step": 3}',
    ]
