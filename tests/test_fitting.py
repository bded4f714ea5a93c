"""What fits is found by trying; where it proves too much, less is taken and the sums stay the same."""

from __future__ import annotations

import json

import pytest
import torch
from ranks_at_work import SHAPE, trainer
from snakegpt.distributed import Group, StartAgain
from snakegpt.errors import UserError
from snakegpt.fitting import largest_that_fits, smaller, why_it_does_not_compile
from snakegpt.losses import mean_loss
from train_fixtures import metrics, tokens


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


class Device:
    """A memory of some bytes, in which a pass takes `fixed` and `per_row`."""

    def __init__(self, memory: int, fixed: int = 100, per_row: int = 10) -> None:
        self.memory, self.fixed, self.per_row = memory, fixed, per_row
        self.tried: list[int] = []

    def peak_bytes(self, rows: int) -> int:
        self.tried.append(rows)
        peak = self.fixed + self.per_row * rows
        if peak > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peak


@pytest.mark.parametrize("guess", [1, 3, 8, 64])
@pytest.mark.parametrize("memory", [105, 110, 125, 200, 740, 741, 10_000])
def test_the_largest_micro_batch_that_fits_is_found(memory, guess):
    device = Device(memory)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    found = largest_that_fits(device.peak_bytes, sizes, guess, memory, fixed_bytes=100)
    assert found == max((r for r in sizes if 100 + 10 * r <= memory), default=1)
    fits = 100 + 10 * guess <= memory  # the guess, and then what is the largest
    assert not fits or len(device.tried) <= 2


def test_a_memory_that_grows_faster_than_it_seemed_is_noticed():
    device = Device(700)
    device.peak_bytes = lambda rows: 100 + 10 * rows + (500 if rows > 20 else 0)  # type: ignore[method-assign]
    assert largest_that_fits(device.peak_bytes, [1, 2, 4, 8, 16, 32], 8, 700, 100) == 16
    assert largest_that_fits(device.peak_bytes, [24], 24, 10, 100) == 24


def test_smaller_micro_batches_divide_the_share():
    assert [smaller(rows, 12) for rows in (12, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]


def run_out_of_memory_above(rows, one, monkeypatch, *, unless_twice: bool = False) -> None:
    updates = one.updates
    losses = updates._losses

    def limited(network, ids, targets, reduction):
        if len(ids) > rows and network.training and not (unless_twice and updates.computes_twice):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses(network, ids, targets, reduction)

    monkeypatch.setattr(updates, "_losses", limited)


def test_out_of_memory_takes_fewer_rows_and_the_same_steps(manifest, tmp_path, monkeypatch, capsys):
    (tmp_path / "roomy").mkdir()
    trainer(tmp_path / "a", manifest).run(tmp_path / "roomy")
    tight = trainer(tmp_path / "b", manifest)
    run_out_of_memory_above(3, tight, monkeypatch)
    tight.run(tmp_path)
    assert tight.updates.micro_rows == 2
    assert tight.updates.accumulation == 4
    said = capsys.readouterr().err
    assert "8 rows at once do not fit: 4 from here on" in said
    assert "4 rows at once do not fit: 2 from here on" in said
    losses = [[x["loss"] for x in metrics(f, "train")] for f in (tmp_path / "roomy", tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_where_not_one_row_fits_activations_are_computed_twice_then_it_is_a_mistake(
    manifest, tmp_path, monkeypatch, capsys
):
    (tmp_path / "roomy").mkdir()
    trainer(tmp_path / "a", manifest).run(tmp_path / "roomy")
    tight = trainer(tmp_path / "b", manifest)
    run_out_of_memory_above(0, tight, monkeypatch, unless_twice=True)
    tight.run(tmp_path)
    assert "activations are computed twice from here on" in capsys.readouterr().err
    losses = [[x["loss"] for x in metrics(f, "train")] for f in (tmp_path / "roomy", tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    hopeless = trainer(tmp_path / "c", manifest)
    run_out_of_memory_above(0, hopeless, monkeypatch)
    with pytest.raises(UserError, match=r"one row of 8 tokens does not fit(.|\n)*fsdp"):
        hopeless.run(tmp_path)


def test_computing_activations_twice_changes_no_bit_and_keeps_fewer(manifest, tmp_path):
    shape = type(SHAPE)(**{**SHAPE.__dict__, "dropout": 0.3})
    saved, gradients = [], []
    for twice in (False, True):
        launch = {"activation_checkpointing": twice}
        updates = trainer(tmp_path / str(twice), manifest, shape=shape, launch=launch).updates
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        updates.start(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            updates._gradients(0)
        saved.append(kept)
        gradients.append([p.grad.clone() for p in updates.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < saved[0]


def test_the_deterministic_mode_does_not_change_its_micro_batch(manifest, tmp_path, monkeypatch):
    one = trainer(tmp_path / "a", manifest, launch={"deterministic": True, "micro_rows": 4})
    run_out_of_memory_above(3, one, monkeypatch)
    with pytest.raises(UserError, match=r"4 rows at once(.|\n)*rows_per_rank to 2"):
        one.run(tmp_path)


def test_one_of_several_ranks_asks_all_to_start_again_with_less(manifest, tmp_path, monkeypatch):
    """The others wait for it in an exchange, so that it cannot just go on with less."""
    one = trainer(tmp_path / "a", manifest, launch={"micro_rows": 4})
    run_out_of_memory_above(3, one, monkeypatch)
    monkeypatch.setattr(one.updates, "group", Group(rank=0, ranks=2))
    with pytest.raises(StartAgain, match="4 rows at once did not fit on rank 0"):
        one.run(tmp_path)
    assert json.loads((tmp_path / "a" / "fitted.json").read_text())["micro_rows"] == 2
    assert trainer(tmp_path / "a", manifest).updates.micro_rows == 2


def test_a_compiler_that_fails_is_done_without_and_said(manifest, tmp_path, monkeypatch, capsys):
    def broken(model, **how):
        def call(*_, **__):
            raise RuntimeError("no C++ compiler found\nmany more lines")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    one = trainer(tmp_path / "a", manifest, launch={"compiled": True, "loss": "chunked"})
    assert one.updates.compiled is False
    assert one.updates.model.mean_loss is mean_loss  # and not the one with a kernel to compile
    said = capsys.readouterr().err
    assert "does not compile here, and trains without: RuntimeError: no C++ compiler found" in said
    one.run(tmp_path)
    assert metrics(tmp_path, "start")[0]["compiled"] is False


def test_running_out_of_memory_says_nothing_of_the_compiler():
    def attempt():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert why_it_does_not_compile(attempt) is None
    assert why_it_does_not_compile(lambda: 1) is None
