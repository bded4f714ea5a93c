"""The remote store: what arrives is what was sent or is a miss, and no run fails because of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from snakegpt.errors import UserError
from snakegpt.settings import load
from snakegpt.store import Store, remote
from snakegpt.store.arrivals import Unfit
from snakegpt.store.remote import Remote, RemoteError
from store_fixtures import Checkout, contents, made, new_store, s3_server

FILES = {
    "weights": bytes(range(256)) * 500,
    "empty": b"",
    "shards/a.bin": b"1234",
    "shards/deep/b.bin": b"5" * 9000,
}
MANIFEST = "results/tokens/generated-generated_char/manifest.json"
STAGES = {"fetch_corpus", "build_tokenizer", "encode_tokens", "index_tokens"}


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture
def here(tmp_path):
    return new_store(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return new_store(tmp_path / "there")


@pytest.fixture
def url(tmp_path):
    folder = tmp_path / "it's shared"
    folder.mkdir()
    return f"file://{folder}"


@pytest.fixture
def pushed(here, url):
    """An action that is in the remote store."""
    record = made(here, FILES)
    assert Remote(here, url).push(record, "train_model tiny")
    return record


def at(url: str, sha256: str) -> Path:
    """Where the folder of a remote store has an object."""
    return Path(url.removeprefix("file://"), "objects", sha256[:2], sha256)


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


# ---- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "memory", "s3"])
def test_what_one_store_pushes_another_one_pulls(kind, here, there, url, request, monkeypatch):
    if kind == "memory":
        url = "memory://shared"
        fsspec.filesystem("memory").makedirs("shared", exist_ok=True)
    if kind == "s3":
        server = request.getfixturevalue("s3")
        server.be(monkeypatch, server.writer)
        url = "s3://shared/round/trip"
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    record = made(here, FILES)
    assert there.look_up(record["key"]) is None
    assert Remote(there, url).pull(record["key"], "") is None
    assert Remote(here, url).push(record, "")
    assert not Remote(here, url).push(record, "")  # all of it is there
    assert Remote(there, url).pull(record["key"], "") == record
    assert there.look_up(record["key"]) == record
    assert contents(there) == contents(here)
    assert not list((there.root / "tmp").iterdir())


def test_a_folder_that_is_no_url_is_a_remote_too(here, there, tmp_path):
    (tmp_path / "plain").mkdir()
    record = made(here, FILES)
    Remote(here, str(tmp_path / "plain")).push(record, "")
    assert Remote(there, str(tmp_path / "plain")).pull(record["key"], "") == record
    assert Store(tmp_path / "plain").look_up(record["key"]) == record  # laid out as a store is


def test_a_push_leaves_alone_what_is_there(here, there, url, pushed):
    folder = Path(url.removeprefix("file://"))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    other = made(here, {"weights": FILES["weights"], "more": b"new"}, steps=2)
    assert Remote(here, url).push(other, "")
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert before.items() <= after.items()
    new = {p.name for p in after.keys() - before.keys()}
    assert new == {other["outputs"]["more"]["sha256"], f"{other['key']}.json"}
    assert not list((folder / "tmp").iterdir())


def test_of_two_outcomes_of_one_action_the_first_one_stands(here, there, url, pushed):
    again = made(there, {"weights": b"another machine, another rounding"})
    assert again["key"] == pushed["key"] and again["outputs"] != pushed["outputs"]
    assert not Remote(there, url).push(again, "")
    assert not at(url, again["outputs"]["weights"]["sha256"]).exists()
    third = new_store(there.root.parent / "third")
    assert Remote(third, url).pull(pushed["key"], "") == pushed


# ---- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "s3"])
@pytest.mark.parametrize("damage", ["other bytes", "short", "gone"])
@pytest.mark.parametrize("what", ["weights", "shards"])
def test_a_damaged_object_is_named_is_a_miss_and_is_replaced(
    place, damage, what, here, there, url, capsys, request, monkeypatch
):
    if place == "s3":
        server = request.getfixturevalue("s3")
        server.be(monkeypatch, server.writer)
        url = f"s3://shared/{damage.replace(' ', '-')}/{what}"
    record = made(here, FILES)
    Remote(here, url).push(record, "")
    sha256, n_bytes = record["outputs"][what]["sha256"], record["outputs"][what]["bytes"]
    folder = remote._Place(url, 5.0)
    name = f"{folder._root}/objects/{sha256[:2]}/{sha256}"
    if damage == "gone":
        folder._files.rm_file(name)
    else:
        if place == "folder":
            at(url, sha256).chmod(0o644)
        content = bytes(n_bytes) if damage == "other bytes" else bytes(n_bytes // 2)
        folder._files.pipe_file(name, content)

    puller = Remote(there, url)
    assert puller.try_pull(record["key"], "train_model tiny") is None
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and sha256 in told
    assert there.look_up(record["key"]) is None
    assert sha256 not in contents(there)

    assert made(there, FILES)["outputs"] == record["outputs"]  # the stage runs instead
    puller.try_push(record, "train_model tiny")
    assert capsys.readouterr().err == ""
    third = new_store(there.root.parent / "third")
    assert Remote(third, url).pull(record["key"], "") == record


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r | {"key": "d" * 64}, "another action's"),
        (lambda r: r | {"science": {"steps": 7}}, "another action's"),
        (lambda r: r | {"outputs": {"../weights": r["outputs"]["weights"]}}, "no stage can have"),
        (lambda r: r | {"outputs": {"/weights": r["outputs"]["weights"]}}, "no stage can have"),
        (lambda r: r | {"outputs": {"a": {"sha256": "../../x", "bytes": 1}}}, "no stage can have"),
        (lambda r: r | {"outputs": {}}, "no stage can have"),
        (lambda r: {k: v for k, v in r.items() if k != "provenance"}, "damaged"),
        (lambda r: [r], "damaged"),
    ],
)
def test_a_record_that_is_not_its_key_s_is_refused_and_replaced(
    change, reason, there, url, pushed, here, capsys
):
    key = pushed["key"]
    path = Path(url.removeprefix("file://"), "actions", key[:2], f"{key}.json")
    rewrite(path, json.dumps(change(pushed)).encode())
    assert Remote(there, url).try_pull(key, "") is None
    told = capsys.readouterr().err
    assert reason in told and key in told
    assert not contents(there) and there.record_of(key) is None
    assert Remote(here, url).push(pushed, "")
    assert Remote(there, url).pull(key, "") == pushed


def test_a_listing_that_leads_out_of_its_folder_is_refused(here, there, url):
    record = made(here, FILES)
    entry = {"path": "../../../../.bashrc", "mode": 0o444, "sha256": "a" * 64, "bytes": 1}
    listing = json.dumps({"entries": [entry]}).encode()
    sha256 = here.put(listing)
    folder = {"sha256": sha256, "bytes": len(listing), "folder": {"files": 1, "bytes": 1}}
    here.record(record["key"], record | {"outputs": {"shards": folder}})
    for path in (here.action_path(record["key"]), here.object_path(sha256)):
        target = Path(url.removeprefix("file://"), path.relative_to(here.root))
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    with pytest.raises(Unfit, match="no listing"):
        Remote(there, url).pull(record["key"], "")
    assert there.record_of(record["key"]) is None


def test_a_damaged_object_is_never_pushed(here, url, capsys):
    record = made(here, FILES)
    sha256 = record["outputs"]["weights"]["sha256"]
    rewrite(here.object_path(sha256), bytes(len(FILES["weights"])))
    Remote(here, url).try_push(record, "train_model tiny")
    assert sha256 in capsys.readouterr().err
    assert not at(url, sha256).exists()
    assert not Path(url.removeprefix("file://"), "actions").exists()


# ---- cut off -----------------------------------------------------------------------------------

# Moves bytes until the n-th call of a function, where the process is killed.
_KILLED = """
import os, sys
from snakegpt.store import Store, remote
root, url, key, what, n = sys.argv[1:]
remote.CHUNK_BYTES, remote.THREADS, calls = 1000, 1, []
owner, name = (remote._Meter, "add") if what == "pull" else (remote._Place, "put")
original = getattr(owner, name)
def counted(*arguments):
    calls.append(None)
    if len(calls) == int(n):
        os.kill(os.getpid(), 9)
    return original(*arguments)
setattr(owner, name, counted)
store = Store(root)
remote.Remote(store, url).pull(key, "") if what == "pull" else remote.Remote(store, url).push(store.look_up(key), "")
"""


def killed(store: Store, url: str, key: str, what: str, n: int) -> bool:
    """Whether a process that pulls or pushes got as far as its n-th step, where it is killed."""
    words = [sys.executable, "-c", _KILLED, str(store.root), url, key, what, str(n)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_killed_pull_goes_on_where_it_was(spoilt, there, url, pushed, monkeypatch):
    key, sha256 = pushed["key"], pushed["outputs"]["weights"]["sha256"]
    found = None
    for n in range(20, 60, 10):  # objects come in no certain order
        assert killed(there, url, key, "pull", n)
        assert there.record_of(key) is None
        contents(there)  # all are what their names say
        part = there.root / "tmp" / f"pull-{key}" / sha256
        if part.exists() and part.stat().st_size:
            found = part
            break
    assert found, "never killed within the largest object"
    kept = found.stat().st_size
    assert kept < len(FILES["weights"])
    if spoilt:
        found.write_bytes(bytes(kept))
    starts = []
    original = remote._Place.chunks

    def chunks(self, name, start, n_bytes):
        if name.endswith(sha256):
            starts.append(start)
        return original(self, name, start, n_bytes)

    monkeypatch.setattr(remote._Place, "chunks", chunks)
    assert Remote(there, url).pull(key, "") == pushed
    assert starts == ([kept, 0] if spoilt else [kept])
    assert there.look_up(key) == pushed
    contents(there)


def test_a_push_killed_at_any_step_is_a_miss_that_the_next_one_completes(here, there, url):
    record = made(here, FILES)
    n_steps = 0
    while killed(here, url, record["key"], "push", n_steps + 1):
        n_steps += 1
        assert Remote(there, url).pull(record["key"], "") is None
        assert n_steps < 100
    # Nothing is sent twice: 0 + 1 + 2 + 3 attempts sent six objects (weights, empty, two of the
    # folder, its listing, the diff), so the fifth sends the record alone and is not killed.
    assert n_steps == 4
    assert Remote(there, url).pull(record["key"], "") == record


# ---- a remote that fails -----------------------------------------------------------------------


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_unreachable_remote_is_one_warning_for_some_minutes(here, there, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    url = "s3://shared/unreachable"
    for _ in range(3):  # as three stages of a run
        assert Remote(here, url).try_pull("a" * 64, "train_model tiny") is None
        Remote(here, url).try_push(made(here, FILES), "train_model tiny")
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "cannot be read" in told and url in told
    assert "hush-hush" not in told
    (mark,) = (here.root / "tmp").iterdir()
    then = mark.stat().st_mtime - remote.OFF_S - 1
    os.utime(mark, (then, then))
    Remote(here, url).try_pull("a" * 64, "train_model tiny")
    assert capsys.readouterr().err.count("warning") == 1


def test_a_silent_server_is_given_up(there, monkeypatch, capsys):
    monkeypatch.setattr(remote, "ANSWER_S", 0.2)
    monkeypatch.setattr(remote, "RETRIES_S", 0.1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and says nothing
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert Remote(there, "s3://shared/silent").try_pull("a" * 64, "") is None
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["file:///no/such/folder", "nonsense://x", "s3://", "hdfs://x"])
def test_no_url_fails_a_run(url, here, capsys):
    assert Remote(here, url).try_pull("a" * 64, "train_model tiny") is None
    assert capsys.readouterr().err.count("warning") == 1


def test_wrong_credentials_are_said_and_not_shown(s3, here, monkeypatch, capsys):
    s3.be(monkeypatch, (s3.reader[0], "hush-hush"))
    assert Remote(here, "s3://shared/x").try_pull("a" * 64, "") is None
    told = capsys.readouterr().err
    assert "access is denied" in told and told.count("warning") == 1
    assert "hush-hush" not in told and s3.reader[0] not in told


def test_a_remote_that_may_only_be_read_is_read_on(s3, here, there, monkeypatch, capsys):
    url = "s3://shared/read-only"
    s3.be(monkeypatch, s3.writer)
    known, new = made(here, FILES), made(here, {"weights": b"new"}, steps=2)
    Remote(here, url).push(known, "")
    s3.be(monkeypatch, s3.reader)
    Remote(here, url).try_push(new, "")
    Remote(here, url).try_push(new, "")
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "cannot be written: access is denied" in told
    assert Remote(here, url).pull(new["key"], "") is None
    assert Remote(there, url).try_pull(known["key"], "") == known


def test_a_bucket_that_is_not_there_is_an_error_of_the_push(s3, here, monkeypatch):
    s3.be(monkeypatch, s3.writer)
    with pytest.raises(RemoteError):
        Remote(here, "s3://nowhere/x").push(made(here, FILES), "")


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A checkout whose results have been pushed to a folder as they were made."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "shared").mkdir()
    checkout = Checkout(folder / "first")
    told = checkout.make(MANIFEST, "--remote", str(folder / "shared"))
    assert told.count("  runs  ") == len(STAGES)
    return checkout, str(folder / "shared")


def test_a_run_takes_from_the_remote_what_another_checkout_made(filled, tmp_path):
    first, url = filled
    second = Checkout(tmp_path / "second")
    told = second.make(MANIFEST, "--remote", url)
    assert "  runs  " not in told and told.count("pulled from") == len(STAGES)
    assert (second.folder / MANIFEST).read_bytes() == (first.folder / MANIFEST).read_bytes()
    told = second.make(MANIFEST, "--remote", url)
    assert "pulled" not in told and told.count("found in the store") == len(STAGES)


def test_a_run_that_does_not_push_leaves_the_remote_empty(tmp_path):
    (tmp_path / "shared").mkdir()
    checkout = Checkout(tmp_path / "first")
    checkout.make("results/corpora/generated/corpus.json", "--remote", "../shared", "--no-push")
    assert not list((tmp_path / "shared").iterdir())


def test_a_run_survives_an_unreachable_remote_with_one_warning(tmp_path):
    checkout = Checkout(tmp_path / "first")
    told = checkout.make(MANIFEST, "--remote", "/no/such/folder")
    assert told.count("warning") == 1 and told.count("  runs  ") == len(STAGES)


def test_a_hit_does_not_load_what_remotes_need(filled):
    checkout, url = filled
    words = ["build_tokenizer", "x", "--output", "results/x", "--settings", '{"kind": "gpt2"}']
    code = (
        "import sys\nfrom snakegpt import run\nfrom snakegpt.store import Store\n"
        "Store.use = lambda *_: {'key': 'a' * 64, 'outputs': {}}\n"
        f"run.main({words!r} + ['--remote', {url!r}])\n"
        "assert not {'fsspec', 'snakegpt.store.remote'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "found in the store" in done.stderr


# ---- by hand -----------------------------------------------------------------------------------


def by_hand(checkout: Checkout, command: str, url: str, *words: str, status: int = 0) -> str:
    setting = f"store={{remote: '{url}'}}"
    return checkout.call("snakegpt.store", command, *words, "--config", setting, status=status)


def test_push_and_pull_move_a_result_with_what_it_follows_from(filled, tmp_path):
    first, _ = filled
    (tmp_path / "other").mkdir()
    url = str(tmp_path / "other")
    told = by_hand(first, "push", url, MANIFEST)
    assert told.count("  pushed  ") == len(STAGES)
    assert by_hand(first, "push", url, MANIFEST).count("  is there  ") == len(STAGES)

    second = Checkout(tmp_path / "second")
    told = by_hand(second, "pull", url, MANIFEST, "--without", "fetch_corpus")
    assert told.count("  pulled, ") == len(STAGES) - 1 and "fetch_corpus" not in told
    assert (second.folder / MANIFEST).read_bytes() == (first.folder / MANIFEST).read_bytes()
    told = second.make(MANIFEST)
    assert told.count("  runs  ") == 1 and "fetch_corpus generated  runs" in told


def test_pull_says_what_the_remote_does_not_have(filled, tmp_path):
    _, url = filled
    other = Checkout(tmp_path / "second")
    (other.folder / "texts/a.txt").write_text("other text " * 300, encoding="utf-8")
    other.call(
        "snakegpt.stages.lock_corpora", "--configfile", "config.yaml", "--update", "generated"
    )
    told = by_hand(other, "pull", url, MANIFEST, status=2)
    assert "fetch_corpus generated" in told and "is not in the remote store" in told


def test_commands_say_what_is_wrong(filled, tmp_path):
    checkout, _ = filled
    assert "set store.remote" in checkout.call("snakegpt.store", "push", MANIFEST, status=2)
    told = by_hand(checkout, "push", "/no/such/folder", MANIFEST, status=2)
    assert "there is no folder /no/such/folder" in told
    told = by_hand(checkout, "push", str(tmp_path), "train_tiny", status=2)
    assert "has not been made yet" in told
    told = by_hand(checkout, "pull", str(tmp_path), MANIFEST, "--without", "fetch", status=2)
    assert "Nearest valid name: fetch_corpus" in told


def test_a_password_in_the_settings_is_refused_and_not_repeated():
    config = {"corpora": {}, "tokenizers": {}, "experiments": {}}
    with pytest.raises(UserError, match="environment") as refused:
        load(config | {"store": {"remote": "sftp://me:hush-hush@host/store"}})
    assert "hush-hush" not in str(refused.value)
    assert load(config | {"store": {"remote": "sftp://me@host/store"}}).store.remote
