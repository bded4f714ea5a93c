"""Pretrained weights are locked and fetched as corpora are, from a model repository or a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from data_fixtures import Faults, pin, serving, stage
from hub_stand_in import COMMIT, Hub, hub_env
from pretrained_fixtures import foreign
from snakegpt import locks
from snakegpt.sources.weights import weight_files

NAMES = ["config.json", "model.safetensors"]
SOURCE = {"kind": "huggingface", "repo": "some/model", "files": NAMES}


@pytest.fixture
def files(tmp_path):
    foreign(tmp_path / "theirs")
    return {name: (tmp_path / "theirs" / name).read_bytes() for name in NAMES}


def hub_of(files, **more) -> Hub:
    return Hub("some/model", COMMIT, files, {"model.safetensors"}, kind="model", **more)


def fetch(tmp_path, pins, source=SOURCE, env=None):
    execution = {"weights": "theirs", "source": source, "revision": COMMIT, "download_workers": 1}
    execution["lock_file"] = str(tmp_path / "lock.json")
    done = stage("fetch_weights", {"files": pins}, tmp_path / "out", execution=execution, env=env)
    assert "Traceback" not in done.stderr
    return done


def lock(tmp_path, source, *arguments, env=None):
    config = {
        "corpora": {},
        "tokenizers": {"gpt2": {"kind": "gpt2"}},
        "weights": {"theirs": {"source": source, "tokenizer": "gpt2"}},
        "experiments": {},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, "-m", "snakegpt.stages.lock_corpora", *arguments],
        cwd=tmp_path,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )


def test_a_model_repository_is_locked_at_its_commit_and_fetched(tmp_path, files):
    with serving(hub_of({**files, "pytorch_model.bin": b"a pickle"})) as hub:
        env = hub_env(tmp_path, hub.url)
        done = lock(tmp_path, SOURCE, "theirs", env=env)
        assert done.returncode == 0, done.stderr
        tree = json.loads((tmp_path / "corpora.lock.json").read_text())
        assert tree["corpora"] == {}
        entry = tree["weights"]["theirs"]
        assert entry["revision"] == COMMIT
        assert entry["files"] == [pin(name, files[name]) for name in NAMES]
        done = fetch(tmp_path, entry["files"], env=env)
    assert done.returncode == 0, done.stderr
    listing = tmp_path / "out/weights.json"
    assert json.loads(listing.read_text()) == {"files": entry["files"]}
    found = weight_files(listing)
    assert found.config.read_bytes() == files["config.json"]
    assert [path.read_bytes() for path in found.tensors] == [files["model.safetensors"]]


def test_corpora_and_weights_keep_to_their_tables(tmp_path, files):
    path = tmp_path / "corpora.lock.json"
    text = locks.Entry({"kind": "local", "paths": ["a"]}, (locks.File(**pin("a", b"x")),))
    locks.put(path, {"text": text})
    assert "weights" not in json.loads(path.read_text())  # the file of those who have none stays
    locks.put(path, {"theirs": text}, "weights")
    locks.put(path, {"more": text})
    tree = json.loads(path.read_text())
    assert (set(tree["corpora"]), set(tree["weights"])) == ({"text", "more"}, {"theirs"})
    assert set(locks.read(path)) == {"text", "more", "theirs"}


def test_a_folder_is_locked_on_the_way_and_then_fetched(tmp_path, files):
    source = {"kind": "local", "paths": [f"{tmp_path}/theirs/{name}" for name in NAMES]}
    done = fetch(tmp_path, None, source)
    assert done.returncode == 2
    assert "weights theirs are now locked: 2 files" in done.stderr
    pins = json.loads((tmp_path / "lock.json").read_text())["weights"]["theirs"]["files"]
    assert fetch(tmp_path, pins, source).returncode == 0
    (tmp_path / "theirs/model.safetensors").write_bytes(b"others")
    done = fetch(tmp_path, pins, source)
    assert done.returncode == 2
    assert "weights theirs: model.safetensors is not the file that was locked" in done.stderr
    assert "lock_corpora --update theirs" in done.stderr


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*", "pytorch_model.bin is a pickle, which can run code when it is loaded"),
        ("*.safetensors", "one config.json and at least one safetensors file are wanted"),
        ("config.json", "one config.json and at least one safetensors file are wanted"),
    ],
)
def test_files_that_are_no_weights_are_refused_before_a_download(tmp_path, files, pattern, said):
    with serving(hub_of({**files, "pytorch_model.bin": b"a pickle"})) as hub:
        source = {**SOURCE, "files": [pattern]}
        done = lock(tmp_path, source, "theirs", env=hub_env(tmp_path, hub.url))
        assert not any(name.endswith(".safetensors") for name, _ in hub.asked)
    assert done.returncode == 2
    assert f"weights theirs: {said}" in done.stderr
    assert not (tmp_path / "corpora.lock.json").exists()


@pytest.mark.parametrize("is_locked", [True, False])
def test_a_hub_out_of_reach_is_one_message_within_seconds(tmp_path, files, is_locked):
    pins = [pin(name, files[name]) for name in NAMES] if is_locked else None
    started = time.monotonic()
    done = fetch(tmp_path, pins, env=hub_env(tmp_path, "http://127.0.0.1:9"))
    assert time.monotonic() - started < 10
    assert done.returncode == 2
    assert "weights theirs: on the Hugging Face hub, which cannot be reached" in done.stderr
    assert not (tmp_path / "lock.json").exists()


def test_a_download_that_breaks_off_goes_on_and_the_cache_will_do(tmp_path, files):
    pins = [pin(name, files[name]) for name in NAMES]
    with serving(hub_of(files, faults=Faults(drops=[10**6, 1000]))) as hub:
        env = hub_env(tmp_path, hub.url)
        assert fetch(tmp_path, pins, env=env).returncode == 0
        assert ("model.safetensors", "bytes=1000-") in hub.asked
    folder = tmp_path / "hf/hub/models--some--model/snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    offline = hub_env(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert fetch(tmp_path, pins, env=offline).returncode == 0
