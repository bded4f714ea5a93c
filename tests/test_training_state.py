"""A saved state is whole or passed over; metrics never tell what did not happen."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from snakegpt.errors import UserError
from snakegpt.training_state import Metrics, StateFolder, write_atomically


def state(step: int, best: int = 0) -> dict:
    return {"step": step, "best_step": best, "model": {"w": torch.full((3,), float(step))}}


def test_the_newest_state_comes_back(tmp_path):
    folder = StateFolder(tmp_path, "x")
    assert folder.load() is None
    for step in (1, 2, 30):
        folder.save(step, state(step))
    assert folder.load()["model"]["w"].tolist() == [30.0] * 3


def test_the_last_two_are_kept_with_their_best_weights(tmp_path):
    folder = StateFolder(tmp_path, "x")
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 4)):
        folder.best_weights(best).write_text("weights")
        folder.save(step, state(step, best))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "best_000000002.safetensors",
        "best_000000004.safetensors",
        *(f"state_00000000{step}.{end}" for step in (3, 4) for end in ("json", "pt")),
    ]


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "no note", "half a note", "gone"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, capsys, damage):
    folder = StateFolder(tmp_path, "train_model x")
    for step in (1, 2):
        folder.save(step, state(step))
    file, note = tmp_path / "state_000000002.pt", tmp_path / "state_000000002.json"
    if damage == "flipped byte":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no note":
        note.unlink()
    elif damage == "half a note":
        note.write_text(note.read_text()[:9])
    else:
        file.unlink()
    assert folder.load()["step"] == 1
    if damage != "no note":
        assert "state_000000002.pt is damaged" in capsys.readouterr().err


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
    with pytest.raises(UserError, match=r"keeps up to 48MB of states(.|\n)*1kB are free"):
        StateFolder(tmp_path, "x").require_space(1_000_000)  # 3 states x 4 copies x 4 bytes
    StateFolder(tmp_path, "x").require_space(10)


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
