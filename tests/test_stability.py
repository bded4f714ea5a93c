"""What is skipped changes nothing; a loss that leaps is found; training goes back and leaves data out."""

from __future__ import annotations

import math

import pytest
import torch
from ranks_at_work import trainer
from safetensors.torch import load_file
from snakegpt.errors import Interrupted, UserError
from snakegpt.settings import Training
from snakegpt.stability import Judge
from torch.utils._python_dispatch import TorchDispatchMode
from train_fixtures import SETTINGS, metrics, tokens


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


def recipe(**training) -> Training:
    return Training(**{**SETTINGS["training"], **training})


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def poison(one, monkeypatch, places, value: float = math.nan) -> None:
    """Make the loss of the batches at these places of the order a bad one."""
    updates = one.updates
    losses, gradients = updates._losses, updates._gradients
    now = []

    def gradients_at(place):
        now[:] = [place]
        gradients(place)

    def poisoned(network, ids, targets, reduction):
        found = losses(network, ids, targets, reduction)
        return found * value if network.training and now[0] in places else found

    monkeypatch.setattr(updates, "_gradients", gradients_at)
    monkeypatch.setattr(updates, "_losses", poisoned)


def test_a_gradient_that_is_no_number_is_skipped_and_told_at_the_next_look():
    judge = Judge(recipe(), "cpu", scaled=False)
    norms = [1.0, math.nan, math.inf, 2.0, math.nan]
    refused = [
        bool(judge.refuses(step, *numbers(0.5, norm))) for step, norm in enumerate(norms, start=1)
    ]
    assert refused == [False, True, True, False, True]
    assert [skipped.step for skipped in judge.look()] == [2, 3, 5]
    assert judge.in_a_row == 1
    assert judge.look() == []
    judge.refuses(6, *numbers(0.5, math.nan))
    judge.look()
    assert judge.in_a_row == 2


def test_a_spike_is_found_by_its_z_score_among_the_losses_taken():
    """Against the same rule written out over lists."""
    judge = Judge(recipe(skip_spikes_above=3.0, spike_window=5), "cpu", scaled=False)
    draw = torch.Generator().manual_seed(3)
    losses = (2 + 0.1 * torch.randn(40, generator=draw)).tolist()
    losses[3] = 9.0  # too early to tell
    losses[20] = 2.9
    losses[30], losses[31] = 1.0, 5.0  # better than expected is no spike
    taken: list[float] = []
    for step, loss in enumerate(losses):
        recent = taken[-5:]
        mean = sum(recent) / max(1, len(recent))
        spread = math.sqrt(sum((x - mean) ** 2 for x in recent) / 4)
        wanted = len(recent) == 5 and loss > mean + 3 * spread
        assert bool(judge.refuses(step, *numbers(loss, 1.0))) == wanted, step
        if not wanted:
            taken.append(loss)
    skipped = {line.step for line in judge.look()}
    assert {20, 31} <= skipped and not {3, 30} & skipped


def test_the_scale_of_float16_halves_at_an_overflow_and_grows_after_many_good_steps():
    judge = Judge(recipe(), "cpu", scaled=True)
    scaler = torch.amp.GradScaler("cpu")  # the other way: torch's own
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(4200):
        bad = step in (0, 1, 50, 2100)
        scaler.scale(weight.sum() * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        judge.refuses(step, *numbers(1.0, math.inf if bad else 1.0))
        assert judge.scale.item() == scaler.get_scale(), step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_update_changes_no_weight_and_no_moment(manifest, tmp_path, optimizer):
    one = trainer(tmp_path / "state", manifest, optimizer=optimizer).updates
    one.start(0)
    for step in range(3):
        one.update(step, step)
    before = {name: tensor.clone() for name, tensor in one.strategy.tensors().items()}
    one._gradients(3)
    for parameter in one.model.parameters():
        parameter.grad[0] = math.nan
    one.strategy.step(torch.tensor(True))
    after = one.strategy.tensors()
    assert len(before) > 20
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    one._gradients(4)
    one.strategy.step(torch.tensor(False))
    assert not any(torch.equal(after[n], before[n]) for n in before if n.startswith("model."))


class NeverWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: to read a number, or a size that depends on numbers."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(self.WAITS), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(manifest, tmp_path, monkeypatch, optimizer):
    training = {"optimizer": optimizer, "skip_spikes_above": 6.0, "spike_window": 2}
    launch = {"dtype": torch.float16, "micro_rows": 4}
    one = trainer(tmp_path / "state", manifest, launch=launch, precision="float16", **training)
    one.updates.start(0)
    one.updates.update(0, 0)
    monkeypatch.setattr(torch.Tensor, "tolist", None)  # reads a CPU's memory without an operator
    with NeverWaits():
        for step in range(1, 5):
            one.updates.update(step, step)
        with pytest.raises(AssertionError, match="waits for the device"):
            float(one.updates.mean_loss())
        with pytest.raises(TypeError):
            one.updates.judge.look()


def test_a_bad_batch_is_skipped_and_recorded_and_nothing_else_changes(
    manifest, tmp_path, monkeypatch, capsys
):
    one = trainer(tmp_path / "state", manifest)
    poison(one, monkeypatch, {6})
    one.run(tmp_path)
    [line] = metrics(tmp_path, "skipped")
    assert (line["step"], line["loss"], line["gradient_norm"]) == (7, None, None)
    assert [x["step"] for x in metrics(tmp_path, "train")] == [*range(1, 7), *range(8, 13)]
    assert "skipped the update of step 7: loss nan" in capsys.readouterr().err
    for tensor in load_file(tmp_path / "weights.safetensors").values():
        assert tensor.isfinite().all()


def test_a_spike_of_the_settings_is_skipped(manifest, tmp_path, monkeypatch):
    one = trainer(tmp_path / "state", manifest, skip_spikes_above=8.0, spike_window=6)
    poison(one, monkeypatch, {9}, value=4.0)
    one.run(tmp_path)
    [line] = metrics(tmp_path, "skipped")
    assert line["step"] == 10
    assert line["loss"] > 5
    assert math.isfinite(line["gradient_norm"])


BAD = range(12, 16)  # places of the order
GOES_BACK = {"steps": 20, "validation_interval": 5, "rollback_after": 3}


def test_many_bad_batches_are_gone_back_from_and_left_out(manifest, tmp_path, monkeypatch, capsys):
    """Against a run that meets no bad batch, but takes others from the same step on."""
    one = trainer(tmp_path / "state", manifest, **GOES_BACK)
    poison(one, monkeypatch, BAD)
    one.run(tmp_path)
    [line] = metrics(tmp_path, "rolled_back")
    # The third bad one is that of step 15; the last good validation is that of step 10.
    assert (line["step"], line["from_step"], line["rollbacks"]) == (10, 15, 1)
    assert line["reason"] == "3 updates in a row were skipped"
    assert "goes back from step 15 to 10" in capsys.readouterr().err
    assert [x["step"] for x in metrics(tmp_path, "train")] == [*range(1, 11), *range(12, 21)]
    assert [x["step"] for x in metrics(tmp_path, "skipped")] == [11]  # the last bad one, place 15

    other = trainer(tmp_path / "other", manifest, **GOES_BACK)
    update = other.updates.update

    def skips_five(step, place):
        if step == 10:
            other.updates.start(15)
        return update(step, place if step < 10 else place + 5)

    monkeypatch.setattr(other.updates, "update", skips_five)
    poison(other, monkeypatch, {15})
    (tmp_path / "out").mkdir()
    other.run(tmp_path / "out")
    for name in ("weights", "best"):
        files = [(f / f"{name}.safetensors").read_bytes() for f in (tmp_path, tmp_path / "out")]
        assert files[0] == files[1]


@pytest.mark.parametrize("stop_at", [8, 13, 14, 11, 18])
def test_going_back_is_the_same_whatever_was_interrupted(manifest, tmp_path, monkeypatch, stop_at):
    whole = trainer(tmp_path / "whole", manifest, **GOES_BACK)
    poison(whole, monkeypatch, BAD)
    whole.run(tmp_path)
    expected = (tmp_path / "weights.safetensors").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    for attempt in range(2):
        one = trainer(tmp_path / "state", manifest, **GOES_BACK)
        poison(one, monkeypatch, BAD)
        if attempt == 0:
            monkeypatch.setattr(one, "_agreed", lambda _, due, one=one: (one.step == stop_at, due))
            with pytest.raises(Interrupted):
                one.run(out)
        else:
            one.run(out)
    assert (out / "weights.safetensors").read_bytes() == expected
    assert len(metrics(out, "rolled_back")) == 1


def test_it_gives_up_after_as_many_rollbacks_as_allowed(manifest, tmp_path, monkeypatch):
    one = trainer(tmp_path / "state", manifest, rollbacks=2, **GOES_BACK)
    poison(one, monkeypatch, range(7, 1000))
    with pytest.raises(UserError, match=r"diverged at step 8: 3 updates(.|\n)*back 2 times"):
        one.run(tmp_path)
    none = trainer(tmp_path / "none", manifest, rollbacks=0, **GOES_BACK)
    poison(none, monkeypatch, range(7, 1000))
    with pytest.raises(UserError, match=r"diverged at step 10: 3 updates"):
        none.run(tmp_path)


def test_no_number_at_the_first_step_is_a_mistake_said_at_once(manifest, tmp_path, monkeypatch):
    one = trainer(tmp_path / "state", manifest)
    poison(one, monkeypatch, {0})
    with pytest.raises(UserError, match="no finite number at the very first step"):
        one.run(tmp_path)
    assert one.step == 1


def test_float16_trains_on_cpu_too_and_its_scale_is_saved(manifest, tmp_path, monkeypatch):
    launch = {"dtype": torch.float16}
    whole = trainer(tmp_path / "whole", manifest, launch=launch, precision="float16")
    whole.run(tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path, "train")]
    assert losses[-1] < 0.95 * losses[0]
    broken = trainer(tmp_path / "broken", manifest, launch=launch, precision="float16")
    broken.updates.judge.scale.fill_(2.0**60)  # overflows until it has been halved often enough
    monkeypatch.setattr(broken, "_agreed", lambda came, due: (broken.step == 3, due))
    with pytest.raises(Interrupted):
        broken.run(tmp_path)
    again = trainer(tmp_path / "broken", manifest, launch=launch, precision="float16")
    again._resume(again.states.newest())
    assert again.updates.judge.scale.item() == 2.0**57
