"""The schedules by hand values, who decays, and both optimisers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from snakegpt.model import GPT, Shape
from snakegpt.optimizer import (
    Muon,
    Schedule,
    clip_gradients,
    make_optimizers,
    orthogonalised,
    schedule_of,
    set_learning_rate,
)
from snakegpt.settings import Training
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RECIPE = Training(learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.95)


def schedule(kind: str, **changed) -> Schedule:
    sizes = {"floor": 0.1, "warmup_steps": 4, "decay_steps": 14, "cooldown_steps": 5}
    return Schedule(kind=kind, **{**sizes, **changed})


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        # Of the steps 0, 3, 4, 9, 14 and 100.
        ("cosine", [1 / 5, 4 / 5, 1.0, 0.55, 0.1, 0.1]),  # half-way: the mean of peak and floor
        ("linear", [1 / 5, 4 / 5, 1.0, 0.55, 0.1, 0.1]),
        ("warmup_stable_decay", [1 / 5, 4 / 5, 1.0, 1.0, 0.1, 0.1]),
    ],
)
def test_the_schedules_by_hand(kind, shares):
    made = schedule(kind)
    assert [made.at(step) for step in (0, 3, 4, 9, 14, 100)] == pytest.approx(shares)


def test_between_their_ends_the_schedules_differ():
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert schedule("cosine", warmup_steps=0, decay_steps=40).at(10) == pytest.approx(quarter)
    assert schedule("linear", warmup_steps=0, decay_steps=40).at(10) == pytest.approx(0.775)
    late = schedule("warmup_stable_decay", warmup_steps=0, decay_steps=40, cooldown_steps=10)
    assert [late.at(30), late.at(32)] == pytest.approx([1.0, 0.1 + 0.9 * 0.8])


def test_a_cooldown_longer_than_what_follows_the_warm_up_begins_after_it():
    assert schedule("warmup_stable_decay", cooldown_steps=14).at(9) == pytest.approx(0.55)


def test_no_warm_up_starts_at_the_peak():
    assert schedule("cosine", warmup_steps=0).at(0) == 1.0


def test_settings_make_the_schedule():
    made = schedule_of(Training(steps=80, schedule="warmup_stable_decay", min_learning_rate=6e-5))
    assert (made.floor, made.decay_steps, made.cooldown_steps) == (pytest.approx(0.1), 80, 40)
    assert schedule_of(Training(steps=80, decay_steps=70)).decay_steps == 70


def test_matrices_decay_and_biases_and_norms_do_not():
    model = GPT(Shape(vocabulary=8, layers=1, heads=1, channels=4, context=4))
    [adamw] = make_optimizers(model, RECIPE)
    decaying, others = adamw.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in others["params"])
    assert all(
        names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decaying["params"]
    )
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_one_step_is_adamw_by_hand():
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(3.0)
    optimizers = make_optimizers(layer, RECIPE)
    set_learning_rate(optimizers, 0.5)
    layer.weight.grad, layer.bias.grad = torch.tensor([[4.0]]), torch.tensor([-1.0])
    optimizers[0].step()
    # The first step moves by the learning rate times the gradient's sign; decay first shrinks by lr x wd.
    assert float(layer.weight.detach()) == pytest.approx(2.0 * (1 - 0.05 * 0.5) - 0.05, abs=1e-6)
    assert float(layer.bias.detach()) == pytest.approx(3.0 + 0.05, abs=1e-6)


# ---- muon ----

MUON = Training(
    optimizer="muon",
    learning_rate=0.01,
    muon_learning_rate=0.1,
    muon_momentum=0.9,
    weight_decay=0.5,
)


def orthogonal_by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Five times the quintic on the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh


@pytest.mark.parametrize("size", [(6, 6), (12, 5), (5, 12)])
def test_matrices_become_orthogonal_as_by_their_singular_values(size):
    matrices = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    made = orthogonalised(matrices)
    for matrix, one in zip(matrices, made, strict=True):
        torch.testing.assert_close(one, orthogonal_by_singular_values(matrix), atol=1e-4, rtol=1e-3)
        assert 0.6 < torch.linalg.svdvals(one).min() <= torch.linalg.svdvals(one).max() < 1.3


def test_a_matrix_of_zeros_does_not_move():
    assert not orthogonalised(torch.zeros(1, 3, 4)).any()


def model_with_gradients() -> GPT:
    model = GPT(Shape(vocabulary=8, layers=2, heads=2, channels=4, context=4))
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=draws)
        parameter.grad = torch.randn(parameter.shape, generator=draws)
    return model


def test_muon_takes_the_matrices_of_blocks_and_adamw_everything_else():
    model = model_with_gradients()
    muon, adamw = make_optimizers(model, MUON)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw)]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    kinds = ("qkv.weight", "projection.weight", "expansion.weight")
    assert len(taken[0]) == 2 * 4 and all(name.endswith(kinds) for name in taken[0])
    assert {g["peak"] for g in muon.param_groups} == {0.1}
    assert {g["peak"] for g in adamw.param_groups} == {0.01}


def test_three_steps_of_muon_are_its_formula():
    model = model_with_gradients()
    layer = model.blocks[1]
    wanted = {  # (weight, gradient) of every matrix that is orthogonalised by itself
        "q": (layer.attention.qkv.weight[:4], layer.attention.qkv.weight.grad[:4]),
        "v": (layer.attention.qkv.weight[8:], layer.attention.qkv.weight.grad[8:]),
        "tall": (layer.mlp.expansion.weight, layer.mlp.expansion.weight.grad),
        "wide": (layer.mlp.projection.weight, layer.mlp.projection.weight.grad),
    }
    by_hand = {name: weight.detach().clone() for name, (weight, _) in wanted.items()}
    averages = {name: torch.zeros_like(weight) for name, weight in by_hand.items()}
    muon, _ = optimizers = make_optimizers(model, MUON)
    for factor in (1.0, 0.5, 0.25):
        set_learning_rate(optimizers, factor)
        muon.step()
        for name, weight in by_hand.items():
            gradient = wanted[name][1]
            averages[name] = 0.9 * averages[name] + 0.1 * gradient
            move = orthogonal_by_singular_values(0.1 * gradient + 0.9 * averages[name])
            rate = 0.1 * factor
            weight *= 1 - rate * 0.5
            weight -= rate * (2.0 if name == "tall" else 1.0) * move  # sqrt(16 / 4)
    for name, (weight, _) in wanted.items():
        torch.testing.assert_close(weight.detach(), by_hand[name], atol=1e-4, rtol=1e-3)


def test_muon_is_torchs_own_within_its_bfloat16():
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    muon = Muon([{"params": [ours], "peak": 0.1}], momentum=0.95, weight_decay=0.1)
    set_learning_rate([muon], 1.0)
    peer = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.1)
    for _ in range(3):
        muon.step()
        peer.step()
    torch.testing.assert_close(ours.data, theirs.data, atol=2e-2, rtol=0)
    assert (ours - 1).abs().max() > 0.1  # it has moved


def _muon_on_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole = model_with_gradients()
    muon, _ = optimizers = make_optimizers(whole, MUON, dist.group.WORLD)
    sharded = model_with_gradients()
    mesh = init_device_mesh("cpu", (2,))
    for name, parameter in list(sharded.named_parameters()):
        shard = torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]))
        shard.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
        module, _, last = name.rpartition(".")
        setattr(sharded.get_submodule(module), last, shard)
    muon_of_shards, _ = make_optimizers(sharded, MUON, dist.group.WORLD)
    for _ in range(2):
        set_learning_rate([*optimizers, muon_of_shards], 1.0)
        muon.step()
        muon_of_shards.step()
    name = "blocks.1.attention.qkv.weight"
    found = {
        "shared": {k: v for k, v in whole.state_dict().items() if k.startswith("blocks")},
        "sharded": sharded.get_parameter(name).full_tensor(),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_work_and_the_shards(tmp_path):
    model = model_with_gradients()
    muon, _ = optimizers = make_optimizers(model, MUON)
    for _ in range(2):
        set_learning_rate(optimizers, 1.0)
        muon.step()
    torch.multiprocessing.spawn(_muon_on_two_ranks, (str(tmp_path),), nprocs=2)
    weights = model.state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in found["shared"].items():
            torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=1e-6)
        wanted = weights["blocks.1.attention.qkv.weight"]
        torch.testing.assert_close(found["sharded"], wanted, atol=1e-6, rtol=1e-6)


def test_clipping_scales_to_the_limit_and_tells_the_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(clip_gradients([weight], 1.0)) == 5.0
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
