"""Fetching a corpus: locked ones are verified, others are locked first; every failure is one message."""

from __future__ import annotations

import json
import time

import pytest
from data_fixtures import pin, serving, stage
from hub_stand_in import COMMIT, Hub, hub_env
from snakegpt import locks

HUB_FILES = {"data/a.txt": b"text a", "data/b.parquet": b"not really parquet"}
HUB_SOURCE = {"kind": "huggingface", "repo": "some/texts", "files": ["data/*"]}


def fetch(tmp_path, files, execution, env=None):
    done = stage("fetch_corpus", {"files": files}, tmp_path / "out", execution=execution, env=env)
    assert "Traceback" not in done.stderr
    assert "hf_verysecret" not in done.stderr + done.stdout
    return done


def on_hub(files, revision=COMMIT):
    pins = [pin(name, content) for name, content in files.items()]
    return pins, {"corpus": "web", "source": HUB_SOURCE, "revision": revision}


def left(tmp_path):
    out = tmp_path / "out"
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_corpus_on_the_hub_is_fetched_from_its_commit(tmp_path):
    with serving(Hub("some/texts", COMMIT, HUB_FILES, lfs={"data/b.parquet"})) as hub:
        pins, execution = on_hub(HUB_FILES)
        done = fetch(tmp_path, pins, execution, hub_env(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr
    found = left(tmp_path)
    assert json.loads(found.pop("corpus.json")) == {"files": pins}
    assert found == {f"files/{name}": content for name, content in HUB_FILES.items()}


def test_a_file_of_the_same_size_but_other_bytes_is_refused(tmp_path):
    wrong = b"Not really parquet"
    with serving(Hub("some/texts", COMMIT, HUB_FILES, lfs={"data/b.parquet"})) as hub:
        hub.served["data/b.parquet"] = wrong
        done = fetch(tmp_path, *on_hub(HUB_FILES), hub_env(tmp_path, hub.url))
    assert done.returncode == 2
    assert "data/b.parquet is not the file that was locked" in done.stderr
    assert f"expected: sha256 {pin('', HUB_FILES['data/b.parquet'])['sha256']}" in done.stderr
    assert f"found:    sha256 {pin('', wrong)['sha256']}" in done.stderr
    assert "corpus.json" not in left(tmp_path)


@pytest.mark.parametrize("is_locked", [True, False])
@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_an_unreachable_hub_is_one_message_within_seconds(tmp_path, is_locked, more):
    pins, execution = on_hub(HUB_FILES)
    execution["lock_file"] = str(tmp_path / "lock.json")
    started = time.monotonic()
    env = hub_env(tmp_path, "http://127.0.0.1:9", **more)
    done = fetch(tmp_path, pins if is_locked else None, execution, env)
    assert time.monotonic() - started < 10  # the hub's own client: 23 s
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert not (tmp_path / "lock.json").exists()


def test_a_corpus_without_a_lock_is_locked_and_then_fetched(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    source = {"kind": "local", "paths": [f"{tmp_path}/*.txt"]}
    lock_file = tmp_path / "corpora.lock.json"
    execution = {"corpus": "mine", "source": source, "lock_file": str(lock_file)}
    done = fetch(tmp_path, None, execution)
    assert done.returncode == 2
    assert f"corpus mine is now locked: 1 files, 3B, in {lock_file}" in done.stderr
    assert "look at it, commit it and run the same command again" in done.stderr
    entry = json.loads(lock_file.read_text())["corpora"]["mine"]
    assert entry["files"] == [pin("a.txt", b"one")]
    done = fetch(tmp_path, entry["files"], execution)
    assert done.returncode == 0, done.stderr
    assert left(tmp_path)["files/a.txt"] == b"one"


def test_locking_on_the_way_keeps_the_commit_of_the_repository(tmp_path):
    """The settings ask for other files now, and the hub has a newer commit."""
    lock_file = tmp_path / "lock.json"
    pins, execution = on_hub(HUB_FILES)
    source = {**HUB_SOURCE, "files": ["data/a.txt"]}
    locks.put(
        lock_file, {"web": locks.Entry(source, (locks.File(**pins[0]),), execution["revision"])}
    )
    newest = Hub("some/texts", "f" * 40, {"data/a.txt": b"newer"}, set())
    newest.earlier = {COMMIT: HUB_FILES}
    with serving(newest) as hub:
        execution["lock_file"] = str(lock_file)
        done = fetch(tmp_path, None, execution, hub_env(tmp_path, hub.url))
    assert "now locked" in done.stderr
    entry = locks.read(lock_file)["web"]
    assert entry.revision == COMMIT
    assert [file.path for file in entry.files] == list(HUB_FILES)


def test_a_local_file_that_changed_says_how_to_take_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"two")
    source = {"kind": "local", "paths": [f"{tmp_path}/*.txt"]}
    done = fetch(tmp_path, [pin("a.txt", b"one")], {"corpus": "mine", "source": source})
    assert done.returncode == 2
    for fact in (
        pin("", b"one")["sha256"],
        pin("", b"two")["sha256"],
        "lock_corpora --update mine",
    ):
        assert fact in done.stderr


@pytest.mark.parametrize("source", [None, {"kind": "ftp"}, {"kind": "local"}])
def test_a_source_that_is_none_is_refused(tmp_path, source):
    done = fetch(tmp_path, [], {"corpus": "mine", "source": source})
    assert done.returncode == 2
    assert "source" in done.stderr
