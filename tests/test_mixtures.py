"""A mixture is one token set whose corpora get their shares of every step, and are scored apart."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import yaml
from data_fixtures import stage
from made_results import TINY
from snakegpt.errors import UserError
from snakegpt.pipeline import Pipeline
from snakegpt.settings import load
from snakegpt.stages.index_tokens import mix_tokens
from snakegpt.tokens import open_sets, open_split, read_manifest, training_batches
from train_fixtures import changed, metrics, shard, tokens, train


def written(folder, n_train, n_val, **more):
    """A token set as index_tokens leaves it."""
    path = tokens(folder, n_train=n_train, n_val=n_val, **more)
    manifest = json.loads(path.read_text())
    for split in manifest["splits"].values():
        split |= {"n_characters": split["n_tokens"], "lengths": {"64": 1}}
    path.write_text(json.dumps(manifest))
    return path


@pytest.fixture
def mixed(tmp_path):
    """Manifests of 1,000 and of 400 training tokens, mixed 3 to 1."""
    sets = [written(tmp_path / "a", 1000, 120), written(tmp_path / "b", 400, 60)]
    out = tmp_path / "mix"
    out.mkdir()
    manifest = mix_tokens(sets, [3, 1], out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return sets, out / "manifest.json"


def test_the_manifest_lists_the_shards_of_all_and_they_stand_beside_it(mixed):
    sets, path = mixed
    manifest = read_manifest(path)
    train = manifest["splits"]["train"]
    names = ["000_000000", "000_000001", "001_000000", "001_000001"]
    assert [shard["name"] for shard in train["shards"]] == [f"train_{name}.bin" for name in names]
    assert (train["n_tokens"], train["n_documents"], train["lengths"]) == (1400, 2, {"64": 2})
    joined = open_split(path, manifest, "train")
    apart = [
        open_split(p, read_manifest(p), "train").read(0, n)
        for p, n in zip(sets, (1000, 400), strict=True)
    ]
    assert np.array_equal(joined.read(0, 1400), np.concatenate(apart))
    for part, ids in zip(open_sets(path, manifest, "train"), apart, strict=True):
        assert np.array_equal(part.stream.read(0, len(part.stream)), ids)


def test_read_only_shards_cost_no_disk_and_others_are_copied(tmp_path):
    path = written(tmp_path / "a", 400, 60)
    kept = tmp_path / "a/train_000000.bin"
    kept.chmod(0o444)
    mix_tokens([path, path], [1, 1], tmp_path)
    assert (tmp_path / "train_000_000000.bin").stat().st_ino == kept.stat().st_ino
    other = tmp_path / "a/train_000001.bin"
    assert (tmp_path / "train_000_000001.bin").stat().st_ino != other.stat().st_ino
    assert (tmp_path / "train_000_000001.bin").read_bytes() == other.read_bytes()


def test_rows_come_by_the_shares(mixed):
    _, path = mixed
    sets = open_sets(path, read_manifest(path), "train")
    batches = training_batches(sets, context=8, rows=50, seed=1)
    starts = np.concatenate(
        [batches.starts(step) for step in range(200)]
    )  # one cycle of 10,000 rows
    assert np.count_nonzero(starts < 1000) == 7500
    second = starts[starts >= 1000] - 1000
    windows, times = np.unique(second, return_counts=True)
    assert np.array_equal(windows, np.arange(0, 392, 8)) and np.ptp(times) <= 1


def test_other_names_and_an_altered_shard_are_refused(mixed, tmp_path):
    sets, _ = mixed
    other = written(tmp_path / "c", 100, 20, fingerprint="cd" * 32)
    with pytest.raises(UserError, match="cd" * 32):
        mix_tokens([sets[0], other], [1, 1], tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    shard(tmp_path / "b/train_000000.bin", np.zeros(7, np.uint16), "ab" * 32)
    with pytest.raises(UserError, match="holds 7 tokens"):
        mix_tokens(sets, [1, 1], again)
    with pytest.raises(UserError, match="2 manifests, but there are 3 weights"):
        mix_tokens(sets, [1, 1, 1], again)


def test_training_validates_by_the_shares(mixed, tmp_path):
    """The loss of a model that has seen one step is near ln(11), whatever it is the mean of; so by hand."""
    _, path = mixed
    assert train(path, tmp_path / "out", changed(steps=1)).returncode == 0
    (found,) = metrics(tmp_path / "out", "validation")
    apart = []
    for name in "ab":
        # The same weights on each corpus: one more step of a learning rate of nothing.
        settings = changed(steps=1, seed=1337)
        manifest = tmp_path / name / "manifest.json"
        apart.append(_loss(tmp_path / "out", manifest, settings))
    assert math.isclose(found["loss"], (3 * apart[0] + apart[1]) / 4, rel_tol=1e-5)


def _loss(model, manifest, settings):
    import torch
    from snakegpt.batches import sequential_batches
    from snakegpt.command import read_json
    from snakegpt.huggingface_format import load_model

    network = load_model(
        model / "weights.safetensors", read_json(model / "config.json", "snakegpt")
    )
    stream = open_split(manifest, read_manifest(manifest), "val")
    with torch.no_grad():
        losses = [network(*pair).flatten() for pair in sequential_batches(stream, 8, 4)]
    return float(torch.cat(losses).double().mean())


@pytest.fixture
def config():
    found = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    found["corpora"]["other"] = copy.deepcopy(found["corpora"]["generated"])
    found["mixtures"] = {"both": {"weights": {"generated": 3, "other": 1}}}
    found["experiments"]["tiny"]["corpus"] = "both"
    return found


def test_a_mixture_is_made_of_the_token_sets_of_its_corpora(config):
    pipeline = Pipeline(load(config), {})
    train_model = pipeline.request("train_model", {"experiment": "tiny"})
    (manifest,) = train_model.inputs["tokens"]
    made = pipeline.find(manifest)
    assert made.stage == "index_tokens" and made.settings == {"weights": [3, 1]}
    assert made.inputs["sets"] == [
        f"results/tokens/{name}-generated_char/manifest.json" for name in ("generated", "other")
    ]
    report = pipeline.request("build_report", {"experiment": "tiny"})
    assert len(report.inputs["corpus"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["mixtures"]["both"]["weights"].update(othr=1),
            r"names 'othr', which is not.*other",
        ),
        (lambda c: c["mixtures"]["both"]["weights"].update(other=0), r"weights.other = 0"),
        (lambda c: c["mixtures"].update(generated={"weights": {"other": 1}}), "name of a corpus"),
        (lambda c: c["experiments"]["tiny"].update(corpus="bth"), "'bth' is not defined.*both"),
        (lambda c: c["mixtures"]["both"].update(weigths={}), "unknown setting .*weigths.*weights"),
    ],
)
def test_mistakes_are_named(config, change, message):
    change(config)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load(config)


def test_a_mixture_is_made_by_hand(mixed, tmp_path):
    sets, path = mixed
    out = tmp_path / "by_hand"
    assert stage("index_tokens", {"weights": [3, 1]}, out, "--sets", *sets).returncode == 0
    assert json.loads((out / "manifest.json").read_text()) == json.loads(path.read_text())
