"""Fetching a corpus: locked ones are verified, others are locked first; every failure is one message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import pytest
from data_fixtures import Faults, FileServer, pin, serving, stage
from hub_stand_in import COMMIT, TOKEN, Hub, hub_env
from snakegpt import locks
from snakegpt.sources import downloads

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


PARQUET = {"data/b.parquet": os.urandom(300_000)}


def on_faulty_hub(tmp_path, faults=None, **hub):
    """Fetch a parquet of a hub with faults: (what the stage said, the ranges it asked for)."""
    with serving(Hub(files=PARQUET, lfs={*PARQUET}, faults=faults or Faults(), **hub)) as server:
        done = fetch(tmp_path, *on_hub(PARQUET), hub_env(tmp_path, server.url))
    return done, [wanted for _, wanted in server.asked]


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        (Faults(), [""]),
        (Faults(drops=[100_000, 1000]), ["", "bytes=100000-", "bytes=101000-"]),
        (Faults(statuses=[(429, {"Retry-After": "0"}), 500]), ["", "", ""]),
        (Faults(statuses=[(429, {"RateLimit": '"resolvers";r=0;t=1'})], drops=[5]), ["", "", "bytes=5-"]),
    ],
    ids=["good", "drops", "429 and 500", "used up"],
)  # fmt: skip
def test_a_hub_that_stumbles_is_asked_again(tmp_path, faults, asked):
    done, found = on_faulty_hub(tmp_path, faults)
    assert done.returncode == 0, done.stderr
    assert found == asked
    assert left(tmp_path)["files/data/b.parquet"] == PARQUET["data/b.parquet"]


def test_a_slow_hub_is_waited_for(tmp_path):
    faults = Faults(holds=[1000])
    threading.Timer(1.0, faults.release.set).start()
    done, asked = on_faulty_hub(tmp_path, faults)
    assert faults.held.is_set()
    assert done.returncode == 0, done.stderr
    assert asked == [""]


def test_a_truncated_file_on_the_hub_is_refused(tmp_path):
    short = PARQUET["data/b.parquet"][:200_000]
    done, _ = on_faulty_hub(tmp_path, served={"data/b.parquet": short})
    assert done.returncode == 2
    assert f"found:    sha256 {pin('', short)['sha256']}, 200,000 bytes" in done.stderr
    assert "corpus.json" not in left(tmp_path)


@pytest.mark.parametrize("gated", ["files", "all"])
@pytest.mark.parametrize(("token", "status"), [("", 401), ("hf_another", 403)])
def test_a_gated_repository_says_how_to_get_in(tmp_path, gated, token, status):
    with serving(Hub(files=PARQUET, lfs={*PARQUET}, gated=gated)) as hub:
        pins, execution = on_hub(PARQUET)
        env = hub_env(tmp_path, hub.url, HF_TOKEN=token)
        execution["lock_file"] = str(tmp_path / "lock.json")
        refused = [fetch(tmp_path, pins, execution, env)]
        refused += [fetch(tmp_path, None, execution, env)] if gated == "all" else []
        for done in refused:
            assert done.returncode == 2
            assert str(status) in done.stderr
            assert "HF_TOKEN" in done.stderr
            assert "hf_another" not in done.stderr
        assert len(hub.asked) == 1  # a refusal is one
        done = fetch(tmp_path, pins, execution, hub_env(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr


def test_a_commit_that_the_hub_does_not_have_is_named(tmp_path):
    with serving(Hub(files=HUB_FILES)) as hub:
        done = fetch(tmp_path, *on_hub(HUB_FILES, "e" * 40), hub_env(tmp_path, hub.url))
    assert done.returncode == 2
    assert "the hub has no such repository or revision" in done.stderr


def test_the_token_goes_to_the_hub_and_not_to_the_host_that_has_the_bytes(tmp_path):
    tokens = []

    class Store(FileServer):
        def answer(self, handler):
            tokens.append(handler.headers.get("Authorization"))
            super().answer(handler)

    with serving(Store(PARQUET)) as cdn:
        elsewhere = cdn.url.replace("127.0.0.1", "localhost")
        with serving(Hub(files=PARQUET, lfs={*PARQUET}, cdn=elsewhere, gated="all")) as hub:
            done = fetch(tmp_path, *on_hub(PARQUET), hub_env(tmp_path, hub.url))
            assert done.returncode == 0, done.stderr
            cdn.files = {}
            shutil.rmtree(tmp_path / "out")
            done = fetch(tmp_path, *on_hub(PARQUET), hub_env(tmp_path, hub.url))
    assert tokens == [None, None]
    assert "the server answers 404" in done.stderr
    assert "alsosecret" not in done.stderr


def test_offline_the_hub_s_cache_will_do(tmp_path):
    env = hub_env(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    folder = tmp_path / "hf" / "hub" / "datasets--some--texts" / "snapshots" / COMMIT
    for name, content in HUB_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    done = fetch(tmp_path, *on_hub(HUB_FILES), env)
    assert done.returncode == 0, done.stderr
    assert left(tmp_path)["files/data/a.txt"] == b"text a"
    (folder / "data/a.txt").write_bytes(b"Text a")  # damaged: as good as not there
    done = fetch(tmp_path, *on_hub(HUB_FILES), env)
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set and the hub's cache lacks it" in done.stderr


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


# ---- through the runner ----------------------------------------------------------------------


def runner(tmp_path, files, execution, store="store", env=None):
    """The runner as the rule calls it, in a process group of its own."""
    command = [sys.executable, "-m", "snakegpt.run", "fetch_corpus", "web"]
    command += ["--settings", json.dumps({"files": files}), "--execution", json.dumps(execution)]
    command += ["--output", "results/corpora/web", "--store", store, "--state"]
    command += ["--log", "logs/web.log"]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def on_web(server, files):
    source = {"kind": "http", "urls": [f"{server.url}/{quote(name)}" for name in files]}
    pins = [pin(name, files[name]) for name in sorted(files)]
    return pins, {"corpus": "web", "source": source, "download_workers": 1}


def kill_9(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_fetch_that_was_killed_goes_on_where_it_was(tmp_path):
    """Finished files and the beginning of the one under way are not asked for again."""
    files = {"a b.txt": os.urandom(1000), "b.txt": os.urandom(3_000_000)}
    faults = Faults(holds=[2_000_000])
    with serving(FileServer(files, faults=faults)) as server:
        pins, execution = on_web(server, files)
        first = runner(tmp_path, pins, execution)
        assert faults.held.wait(60)
        (part,) = wait_for(lambda: [*tmp_path.glob("store/state/*/parts/*.part")])
        wait_for(lambda: part.stat().st_size > 2_000_000 - downloads.PIECE_BYTES)
        kill_9(first)
        kept = part.stat().st_size
        faults.release.set()
        second = runner(tmp_path, pins, execution)
        said = second.communicate()[0]
    assert second.returncode == 0, said
    assert server.asked == ["", "", f"bytes={kept}-"]
    for name, content in files.items():
        assert (tmp_path / "results/corpora/web/files" / name).read_bytes() == content
    assert not list((tmp_path / "store" / "state").iterdir())


def wait_for(answer, seconds=30):
    end = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_two_fetches_at_once_download_once(tmp_path):
    files = {"a.txt": os.urandom(500_000)}
    faults = Faults(holds=[1000])
    with serving(FileServer(files, faults=faults)) as server:
        pins, execution = on_web(server, files)
        first = runner(tmp_path, pins, execution)
        assert faults.held.wait(60)
        second = runner(tmp_path, pins, {**execution, "download_workers": 2})
        line = second.stdout.readline()
        assert "waits for another run of it" in line
        faults.release.set()
        for process in (first, second):
            said = process.communicate()[0]
            assert process.returncode == 0, said
    assert server.asked == [""]
    assert (tmp_path / "results/corpora/web/files/a.txt").read_bytes() == files["a.txt"]


def test_the_token_is_nowhere_in_what_runs_leave_behind(tmp_path):
    with serving(Hub(files=PARQUET, lfs={*PARQUET}, gated="all")) as hub:
        pins, execution = on_hub(PARQUET)
        env = hub_env(tmp_path, hub.url)
        hub.served["data/b.parquet"] = PARQUET["data/b.parquet"][::-1]
        good = [False, True]
        for is_good in good:
            if is_good:
                hub.served.clear()
            process = runner(tmp_path, pins, execution, env=env)
            said = process.communicate()[0]
            assert process.returncode == (0 if is_good else 2), said
            assert TOKEN not in said
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            for path in files:
                assert TOKEN.encode() not in path.read_bytes(), path
        assert any(path.match("actions/*/*.json") for path in files)
        assert any(path.name == "web.log" for path in files)
    sent = [headers["Authorization"] for headers in hub.headers if "Authorization" in headers]
    assert sent and set(sent) == {f"Bearer {TOKEN}"}  # it was in use
