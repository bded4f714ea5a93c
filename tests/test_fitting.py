"""What fits is found by trying; where it proves too much, less is taken and the sums stay the same."""

from __future__ import annotations

import json

import pytest
import torch
from ranks_at_work import SHAPE, trainer
from snakegpt.distributed import Group
from snakegpt.errors import UserError
from snakegpt.fitting import largest_that_fits, smaller, why_it_does_not_compile
from snakegpt.losses import mean_loss
from snakegpt.outcomes import StartAgain
from snakegpt.watchdog import Watchdog
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


SHARE_480 = [r for r in range(1, 65) if 480 % r == 0]  # of GPT-2's batch, 18 sizes


@pytest.mark.parametrize("memory", [*range(110, 760, 10), 10_000])
@pytest.mark.parametrize("guess", [1, 60])
def test_few_sizes_are_tried_whatever_the_memory(memory, guess):
    """torch compiles a model for eight sizes, and then no more."""
    device = Device(memory)
    found = largest_that_fits(device.peak_bytes, SHARE_480, guess, memory, fixed_bytes=100)
    assert found == max(r for r in SHARE_480 if 100 + 10 * r <= memory)
    assert len(device.tried) <= 7 < torch._dynamo.config.recompile_limit


def test_a_trial_above_the_budget_says_how_far_to_go_down():
    device = Device(10_000)
    assert largest_that_fits(device.peak_bytes, SHARE_480, 60, 320, fixed_bytes=100) == 20
    assert device.tried == [60, 20]


def test_a_memory_that_grows_faster_than_it_seemed_is_noticed():
    device = Device(700)
    device.peak_bytes = lambda rows: 100 + 10 * rows + (500 if rows > 20 else 0)  # type: ignore[method-assign]
    assert largest_that_fits(device.peak_bytes, [1, 2, 4, 8, 16, 32], 8, 700, 100) == 16
    assert largest_that_fits(device.peak_bytes, [24], 24, 10, 100) == 24


class Gpu(Device):
    """What torch.cuda tells of a device on which trials allocate."""

    def install(self, monkeypatch, updates) -> None:
        self.peak = 0
        told = {
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", 0),
            "memory_allocated": lambda: self.fixed,
            "max_memory_allocated": lambda: max(self.fixed, self.peak),
            "mem_get_info": lambda: (self.memory - self.fixed, self.memory),
        }
        for name, tell in told.items():
            monkeypatch.setattr(torch.cuda, name, tell)
        monkeypatch.setattr(updates, "_trial", lambda rows, network: self.trial(rows))

    def trial(self, rows: int) -> None:
        self.peak = self.fixed + self.per_row * rows  # also of one that ran out
        self.peak_bytes(rows)


@pytest.mark.parametrize(("others", "rows"), [(8, 8), (2, 2)])
def test_the_probe_leaves_room_for_the_moments_and_asks_the_other_ranks(
    manifest, tmp_path, monkeypatch, others, rows
):
    """Of 500,000 bytes beside what is held, 92 % less 8 bytes a parameter are a trial's."""
    updates = trainer(
        tmp_path / "a", manifest, batch_tokens=64 * 8, launch={"micro_rows": 64}
    ).updates
    parameters = sum(p.numel() for p in updates.model.parameters())
    per_row = (0.92 * 500_000 - 8 * parameters) / 9  # eight rows fit, nine would
    gpu = Gpu(memory=10_000 + 500_000, fixed=10_000, per_row=int(per_row))
    gpu.install(monkeypatch, updates)
    monkeypatch.setattr(Group, "least", lambda self, mine: min(mine, others))
    updates._probe()
    assert updates.micro_rows == rows
    assert gpu.tried[0] == 64 and len(gpu.tried) <= 5
    assert torch.cuda.max_memory_allocated() == 10_000  # a trial is no peak of the training's


def test_smaller_micro_batches_divide_the_share():
    assert [smaller(rows, 12) for rows in (12, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]


GPU_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run_out_of_memory_above(
    rows, one, monkeypatch, *, unless_twice: bool = False, error: RuntimeError = GPU_IS_FULL
) -> None:
    updates = one.updates
    losses = updates._losses

    def limited(network, ids, targets, reduction):
        if len(ids) > rows and network.training and not (unless_twice and updates.computes_twice):
            raise error
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


def allocated_by_a_cpu() -> RuntimeError:
    """What torch says where a CPU has no room: more bytes than any address space."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    return refused.value


@pytest.mark.parametrize(
    "error",
    [
        allocated_by_a_cpu(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1 GB)"),
    ],
    ids=["cpu", "cublas", "mps"],
)
def test_no_room_is_known_by_every_name_it_has(manifest, tmp_path, monkeypatch, capsys, error):
    assert why_it_does_not_compile(lambda: (_ for _ in ()).throw(error)) is None
    tight = trainer(tmp_path / "a", manifest)
    run_out_of_memory_above(4, tight, monkeypatch, error=error)
    tight.run(tmp_path)
    assert "8 rows at once do not fit: 4 from here on" in capsys.readouterr().err


def test_another_error_is_no_lack_of_memory(manifest, tmp_path, monkeypatch):
    wrong = trainer(tmp_path / "a", manifest)
    run_out_of_memory_above(4, wrong, monkeypatch, error=RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wrong.run(tmp_path)


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


def test_one_of_several_ranks_asks_all_to_start_again_with_less(
    manifest, tmp_path, monkeypatch, capsys
):
    """The others wait for it in an exchange, so that it cannot just go on with less."""
    one = trainer(tmp_path / "a", manifest, launch={"micro_rows": 4})
    run_out_of_memory_above(3, one, monkeypatch)
    monkeypatch.setattr(one.updates, "group", Group(rank=0, ranks=2))
    with pytest.raises(StartAgain, match="4 rows at once did not fit on rank 0"):
        one.run(tmp_path)
    assert json.loads((tmp_path / "a" / "fitted.json").read_text())["micro_rows"] == 2
    capsys.readouterr()
    assert trainer(tmp_path / "a", manifest).updates.micro_rows == 2
    assert "2 rows at once, as an attempt before this one found" in capsys.readouterr().err


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


def test_the_watchdog_hears_of_what_is_tried_before_the_first_step(manifest, tmp_path, monkeypatch):
    """A large model compiles for minutes, each size that is tried anew."""
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    heard = []
    watchdog = Watchdog(None)
    watchdog.beat = heard.append  # type: ignore[method-assign]
    one = trainer(tmp_path / "a", manifest, launch={"compiled": True}, watchdog=watchdog)
    assert heard == ["a trial of 8 rows"]
    one.run(tmp_path)
    assert heard[-2:] == ["the last step and its state", "writing the weights"]


def test_running_out_of_memory_says_nothing_of_the_compiler():
    def attempt():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert why_it_does_not_compile(attempt) is None
    assert why_it_does_not_compile(lambda: 1) is None
