"""Every strategy computes what one rank computes, and its states fit every other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_at_work import SHAPE, work
from safetensors.torch import load_file
from snakegpt.distributed import Group
from snakegpt.errors import UserError
from snakegpt.model import GPT
from snakegpt.settings import Training
from snakegpt.strategies import _branches, dealt, joined, make_strategy, whole
from train_fixtures import ENVIRONMENT, metrics, tokens

STRATEGIES = ("ddp", "zero1", "fsdp")
OPTIMIZERS = ("adamw", "muon")
HERE = Path(__file__).parent


def ranks_work(n: int, jobs: list[dict], folder: Path) -> None:
    """Do jobs with so many ranks; see ranks_at_work.py."""
    file = folder / f"jobs{n}.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), str(HERE / "ranks_at_work.py"), str(file)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**ENVIRONMENT, "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of 50 steps in folders `<ranks>-<strategy>-<optimizer>`, and some that stop and go on."""
    folder = tmp_path_factory.mktemp("runs")
    manifest = tokens(folder / "tokens")
    common = {"manifest": str(manifest)}

    def job(name: str, strategy: str, state: str | None = None, **more) -> dict:
        launch = {"strategy": strategy, "micro_rows": 2, **more.pop("launch", {})}
        training = {"steps": 50, "validation_interval": 25, **more.pop("training", {})}
        state = str(folder / f"{state or name}.state")
        return {
            **common,
            "out": str(folder / name),
            "state": state,
            "launch": launch,
            "training": training,
            **more,
        }

    one = [job(f"1-ddp-{o}", "ddp", training={"optimizer": o}) for o in OPTIMIZERS]
    draws = {"shape": {"dropout": 0.1}, "training": {"document_masking": True}}
    one.append(job("1-ddp-draws", "ddp", **draws))
    # Stopped on one rank at step 20, then on two ranks of each strategy at 30 to 40, then on one.
    one += [job(f"resharded-{o}", "ddp", training={"optimizer": o}, stop_at=20) for o in OPTIMIZERS]
    for each in one:
        work(each, Group())
    two = [job(f"2-{s}-{o}", s, training={"optimizer": o}) for s in STRATEGIES for o in OPTIMIZERS]
    two += [job(f"2-{s}-draws", s, **draws) for s in STRATEGIES]
    two += [
        job(f"resharded-{o}", s, training={"optimizer": o}, stop_at=step)
        for o in OPTIMIZERS
        for step, s in zip((30, 35, 40), STRATEGIES, strict=True)
    ]
    two += [
        job(f"2-{s}-{exchange}", s, counted=True, training={"gradient_exchange": exchange})
        for s in ("ddp", "zero1")
        for exchange in ("float32", "bfloat16")
    ]
    ranks_work(2, two, folder)
    for o in OPTIMIZERS:
        work(job(f"resharded-{o}", "ddp", training={"optimizer": o}), Group())
    return folder


def losses(run: Path) -> list[float]:
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == list(range(1, 51))
    return [line["loss"] for line in lines + metrics(run, "validation")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_of_every_strategy_train_as_one(runs, strategy, optimizer):
    one, two = (losses(runs / f"{n}-{optimizer}") for n in ("1-ddp", f"2-{strategy}"))
    assert two == pytest.approx(one, rel=1e-5)
    assert one[49] < 0.8 * one[0]
    for name in ("weights", "best"):
        first, second = (
            load_file(runs / f"{n}-{optimizer}" / f"{name}.safetensors")
            for n in ("1-ddp", f"2-{strategy}")
        )
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_and_masks_are_on_again_after_a_validation(runs, strategy):
    """Validation turns them off, at step 25 too; what wraps a model does not know of it."""
    one, two = (losses(runs / f"{n}-draws") for n in ("1-ddp", f"2-{strategy}"))
    assert two == pytest.approx(one, rel=1e-5)
    plain = losses(runs / "1-ddp-adamw")
    assert all(abs(a - b) > 1e-4 for a, b in zip(one[:50], plain[:50], strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_resharded_between_ranks_and_strategies(runs, optimizer):
    """1 rank to step 20, 2 of ddp to 30, of zero1 to 35, of fsdp to 40, 1 rank to 50."""
    run = runs / f"resharded-{optimizer}"
    assert losses(run) == pytest.approx(losses(runs / f"1-ddp-{optimizer}"), rel=1e-5)
    assert [line["step"] for line in metrics(run, "resume")] == [20, 30, 35, 40]


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_gradients_in_bfloat16_are_half_the_bytes_and_train_alike(runs, strategy):
    whole, half = (runs / f"2-{strategy}-{exchange}" for exchange in ("float32", "bfloat16"))
    n_parameters = sum(p.numel() for p in GPT(SHAPE, "sdpa", "plain").parameters())
    sent = {run: int((run / "sent").read_text()) for run in (whole, half)}
    # Of two ranks each sends as many numbers as there are, and some bytes about them.
    assert sent[whole] - sent[half] == 2 * n_parameters
    assert 2 * n_parameters <= sent[half] < 2.2 * n_parameters
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), rel=2e-2)


@pytest.mark.parametrize(
    ("name", "deterministic", "words"),
    [("fsdp", False, "strategy fsdp"), ("ddp", True, "execution.deterministic")],
)
def test_what_cannot_send_bfloat16_says_so(name, deterministic, words):
    model = GPT(SHAPE, "sdpa", "plain")
    recipe = Training(gradient_exchange="bfloat16")
    with pytest.raises(UserError, match=f"gradient_exchange = bfloat16 does not go with {words}"):
        make_strategy(name, model, recipe, Group(), compiled=False, deterministic=deterministic)


def test_any_number_of_ranks_ends_at_the_same_bits_in_the_deterministic_mode(tmp_path):
    """And, as four ranks are there already: fsdp on two nodes of two trains as one rank does."""
    manifest = tokens(tmp_path / "tokens")
    nodes = {
        "manifest": str(manifest),
        "out": str(tmp_path / "nodes"),
        "state": str(tmp_path / "nodes.state"),
        "launch": {"strategy": "fsdp"},
        "training": {"optimizer": "muon"},
        "local_ranks": 2,
    }
    work({**nodes, "out": str(tmp_path / "one"), "state": str(tmp_path / "one.state")}, Group())

    def jobs(ranks: int) -> list[dict]:
        launch = {"deterministic": True, "micro_rows": 2}
        return [
            {
                "manifest": str(manifest),
                "out": str(tmp_path / f"{ranks}-{optimizer}"),
                "state": str(tmp_path / f"{ranks}-{optimizer}.state"),
                "shape": {"dropout": 0.1},
                "launch": launch,
                "training": {"steps": 20, "optimizer": optimizer, "skip_spikes_above": 3.0},
            }
            for optimizer in OPTIMIZERS
        ]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for job in jobs(1):
        work(job, Group())
    torch.set_num_threads(threads)
    ranks_work(2, jobs(2), tmp_path)
    ranks_work(4, [*jobs(4), nodes], tmp_path)
    one, two = ([x["loss"] for x in metrics(tmp_path / f, "train")] for f in ("one", "nodes"))
    assert two == pytest.approx(one, rel=1e-5)
    for optimizer in OPTIMIZERS:
        runs = [tmp_path / f"{ranks}-{optimizer}" for ranks in (1, 2, 4)]
        for name in ("weights", "best"):
            files = [(run / f"{name}.safetensors").read_bytes() for run in runs]
            assert files[0] == files[1] == files[2]
        # Every bit of what is logged, too; the best loss decides which weights are the best.
        first, *others = [
            [
                line["loss"]
                for event in ("train", "validation", "skipped")
                for line in metrics(run, event)
            ]
            for run in runs
        ]
        assert all(other == first for other in others)
        assert len(first) >= 20


def test_zero1_keeps_a_part_of_the_optimisers_on_each_rank():
    sizes = {"a": 100, "b": 60, "c": 50, "d": 1}
    owners = dealt(sizes, 2)
    assert owners == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert set(dealt(sizes, 3).values()) == {0, 1, 2}


@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 8, 12, 24])
def test_the_tree_of_sums_is_one_for_any_number_of_ranks(leaves):
    """Strings for numbers: their concatenation is no more associative in brackets than floats are."""

    class Sum(str):
        def __add__(self, other):
            return Sum(f"({self}{other})")

    def add(left, right):
        left[0] = left[0] + right[0]

    def tree(ranks):
        share = leaves // ranks
        sums = []
        for rank in range(ranks):
            mine = range(rank * share, (rank + 1) * share)
            own = joined([(range(i, i + 1), [Sum(f" {i} ")]) for i in mine])
            assert [branch for branch, _ in own] == _branches(mine)
            sums += own
        return whole(joined(sums), leaves)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_add_", add)
        trees = {tree(ranks) for ranks in range(1, leaves + 1) if leaves % ranks == 0}
    assert len(trees) == 1
    assert trees.pop().count(" ") == 2 * leaves
