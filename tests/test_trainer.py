"""The loop: exact when repeated and resumed, the same for any ranks and micro-batches within rounding."""

from __future__ import annotations

import math

import pytest
import torch
from ranks_at_work import SHAPE
from ranks_at_work import trainer as one_rank
from snakegpt.batches import TrainingBatches
from snakegpt.errors import Interrupted, UserError
from snakegpt.model import GPT, Pass, Shape, initialise
from snakegpt.tokens import open_split, read_manifest
from snakegpt.trainer import Trainer
from train_fixtures import changed, metrics, tokens, train


def trainer(folder, manifest, shape=SHAPE, micro_rows=8, **training) -> Trainer:
    return one_rank(folder, manifest, shape=shape, launch={"micro_rows": micro_rows}, **training)


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


def test_the_loop_is_the_plain_algorithm(manifest, tmp_path):
    """Against twelve steps of AdamW written out over the same batches."""
    out = tmp_path / "out"
    out.mkdir()
    ours = trainer(tmp_path / "state", manifest, micro_rows=2)
    ours.run(out)
    torch.manual_seed(0)
    model = initialise(GPT(SHAPE), 1337)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = TrainingBatches(open_split(manifest, read_manifest(manifest), "train"), 8, 8, 1337)
    losses = []
    for step in range(12):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
            group["lr"] = 1e-2 * (step + 1) / 3 if step < 2 else 1e-3 + cosine * 9e-3
        [(ids, targets)] = batches.micro_batches(step, 8, 0, 1)
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    logged = [line["loss"] for line in metrics(out, "train")]
    assert logged == pytest.approx(losses, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(12), abs=0.1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            ours.updates.model.state_dict()[name], parameter.data, atol=1e-5, rtol=1e-4
        )


def test_bytes_changed_bump_revision(manifest, tmp_path):
    """Golden losses: if these move, what train_model makes has changed: bump its REVISION."""
    (tmp_path / "out").mkdir()
    trainer(tmp_path / "state", manifest, steps=6).run(tmp_path / "out")
    losses = [round(line["loss"], 4) for line in metrics(tmp_path / "out", "train")]
    golden = [2.4923, 2.4392, 2.3155, 2.2174, 2.1333, 2.0706]
    assert losses == pytest.approx(golden, abs=2e-4)  # processors round differently


def test_the_validation_loss_is_the_mean_over_every_target(manifest, tmp_path):
    ours = trainer(tmp_path / "state", manifest)
    ids = open_split(manifest, read_manifest(manifest), "val").read(0, 300)
    losses = []
    with torch.no_grad():
        for start in range(0, 299, 8):
            window = torch.tensor(ids[start : start + 9]).unsqueeze(0)
            losses.append(ours.updates.model(window[:, :-1], window[:, 1:]).flatten())
    assert ours.updates.validate() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_dropout_is_off_in_validation_and_a_function_of_the_step(manifest, tmp_path):
    shape = Shape(vocabulary=12, layers=2, heads=2, channels=16, context=8, dropout=0.5)
    one = trainer(tmp_path / "a", manifest, shape)
    assert one.updates.validate() == one.updates.validate()
    one.updates.start(0)
    one.updates.update(0, 0)
    again = trainer(tmp_path / "b", manifest, shape)
    torch.rand(7)  # other draws before it
    again.updates.start(0)
    again.updates.update(0, 0)
    assert again.updates.mean_loss() == one.updates.mean_loss()


def test_masked_documents_change_training_and_not_validation(manifest, tmp_path, monkeypatch):
    plain, masked = (
        trainer(tmp_path / str(on), manifest, document_masking=on).updates for on in (False, True)
    )
    assert plain.validate() == masked.validate()
    [(ids, targets)] = masked.batches.micro_batches(0, 8, 0, 1)
    ids[:, 3] = 0  # the end-of-text id: documents of 3 and of 5 tokens
    masked._micro_batches, plain._micro_batches = iter([(ids, targets)]), iter([(ids, targets)])
    alone = torch.cat([masked.model(ids[:, :3]), plain_from(masked.model, ids, 3)], dim=1)
    wanted = torch.nn.functional.cross_entropy(alone.flatten(0, 1), targets.flatten())
    masked.update(0, 0)
    assert float(masked.mean_loss()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    plain.update(0, 0)
    assert float(plain.mean_loss()) != pytest.approx(float(wanted.detach()), rel=1e-5)


def plain_from(model: GPT, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of the positions from `start` on, at their places, as if nothing stood before them."""
    x = model.token_embedding(ids) + model.position_embedding.weight[: ids.shape[1]]
    x = x[:, start:]
    for layer, block in enumerate(model.blocks):
        x = block(x, Pass(), layer)
    return model.final_norm(x) @ model.token_embedding.weight.T


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_is_undisturbed(manifest, tmp_path, monkeypatch, optimizer):
    whole = trainer(tmp_path / "whole", manifest, optimizer=optimizer)
    (tmp_path / "out").mkdir()
    whole.run(tmp_path / "out")
    expected = (tmp_path / "out" / "weights.safetensors").read_bytes()

    broken = trainer(tmp_path / "broken", manifest, optimizer=optimizer)
    monkeypatch.setattr(broken, "_agreed", lambda came, due: (broken.step == 7, due))
    with pytest.raises(Interrupted, match="step 7"):
        broken.run(tmp_path / "out")
    (tmp_path / "again").mkdir()
    trainer(tmp_path / "broken", manifest, optimizer=optimizer).run(tmp_path / "again")
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == expected
    for event in ("train", "validation"):
        clean = [
            [
                {k: v for k, v in line.items() if not k.endswith(("_s", "_share"))}
                for line in metrics(tmp_path / o, event)
            ]
            for o in ("out", "again")
        ]
        assert clean[0] == clean[1]


def test_best_weights_are_those_of_the_lowest_validation_loss(manifest, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    ours = trainer(tmp_path / "state", manifest, validation_interval=4)
    losses = iter([2.0, 1.0, 1.5])
    at_step = {}

    def validate(beat):
        at_step[ours.step] = {k: v.clone() for k, v in ours.updates.model.state_dict().items()}
        return next(losses)

    monkeypatch.setattr(ours.updates, "validate", validate)
    ours.run(out)
    from safetensors.torch import load_file

    best = load_file(out / "best.safetensors")["transformer.wte.weight"]
    assert torch.equal(best, at_step[8]["token_embedding.weight"])
    assert metrics(out, "end")[0]["best_step"] == 8


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "gone"])
def test_damaged_best_weights_are_never_handed_on(manifest, tmp_path, monkeypatch, capsys, damage):
    """The best from there on are; the run itself is not lost."""
    first = trainer(tmp_path / "state", manifest)
    monkeypatch.setattr(first, "_agreed", lambda came, due: (first.step == 7, due))
    with pytest.raises(Interrupted):
        first.run(tmp_path)
    best = tmp_path / "state" / "best_000000005.safetensors"
    content = bytearray(best.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        best.unlink()
    else:
        best.write_bytes(content[:-1] if damage == "truncated" else content)
    again = trainer(tmp_path / "state", manifest)
    monkeypatch.setattr(again.updates, "validate", lambda beat: 9.0 + again.step)
    again.run(tmp_path)
    assert "the best weights, of step 5, are damaged (" in capsys.readouterr().err
    [end] = metrics(tmp_path, "end")
    assert (end["best_step"], end["best_loss"]) == (10, 19.0)
    assert (tmp_path / "best.safetensors").stat().st_size == len(content)


def test_a_diverging_loss_stops_with_advice(manifest, tmp_path):
    with pytest.raises(UserError, match=r"diverged(.|\n)*learning_rate"):
        trainer(
            tmp_path / "state", manifest, learning_rate=1e30, warmup_steps=0, gradient_clip=None
        ).run(tmp_path)
    assert not list((tmp_path / "state").glob("state_*.json"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_and_two_ranks_train_alike(manifest, tmp_path, optimizer):
    runs = {}
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        done = train(manifest, out, changed(optimizer=optimizer), ranks=ranks, rows_per_rank=2)
        assert done.returncode == 0, done.stderr
        assert metrics(out, "start")[0]["ranks"] == ranks
        runs[ranks] = [line["loss"] for line in metrics(out, "train") + metrics(out, "validation")]
    assert runs[1] == pytest.approx(runs[2], rel=1e-5)
    assert len(runs[1]) == 12 + 3
