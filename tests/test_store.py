"""The store: published whole or not at all, damaged is a miss, links show what the action made."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from snakegpt.errors import UserError
from snakegpt.store import Store
from snakegpt.store.links import digest_of, link, maker, pointer
from snakegpt.store.objects import read_record

KEY = "c" * 64


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("store")
    store.make()
    return store


def published(store: Store, files: dict[str, bytes], key: str = KEY) -> dict:
    """An action that made these files, through the store's own steps."""
    with store.workspace(key) as workspace:
        for name, content in files.items():
            path = workspace / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        record = {"key": key, "outputs": store.publish(workspace), "inputs": {}}
    store.record(key, record)
    return record


def test_objects_are_named_by_their_bytes_and_read_only(store):
    record = published(store, {"a.txt": b"text", "deep/b.txt": b"text"})
    sha256 = hashlib.sha256(b"text").hexdigest()
    listing = (
        f'{{"entries":[{{"bytes":4,"mode":292,"path":"b.txt","sha256":"{sha256}"}}]}}'.encode()
    )
    assert record["outputs"] == {
        "a.txt": {"sha256": sha256, "bytes": 4},
        "deep": {
            "sha256": hashlib.sha256(listing).hexdigest(),
            "bytes": len(listing),
            "folder": {"files": 1, "bytes": 4},
        },
    }
    path = store.object_path(sha256)
    assert path.read_bytes() == b"text"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    objects = {p for p in (store.root / "objects").rglob("*") if p.is_file()}
    assert objects == {path, store.object_path(record["outputs"]["deep"]["sha256"])}
    assert not list((store.root / "tmp").iterdir())


def test_a_recorded_action_is_found(store):
    record = published(store, {"a": b"1"})
    assert store.look_up(KEY) == record
    assert store.look_up("d" * 64) is None


@pytest.mark.parametrize(
    "damage", ["object gone", "object short", "record half", "record of another key"]
)
def test_what_is_not_whole_is_a_miss(store, damage):
    record = published(store, {"a": b"1234"})
    path = store.object_path(record["outputs"]["a"]["sha256"])
    action = store.action_path(KEY)
    if damage == "object gone":
        path.unlink()
    elif damage == "object short":
        path.chmod(0o644)
        path.write_bytes(b"12")
    elif damage == "record half":
        action.write_text(action.read_text()[:20])
    else:
        action.write_text(json.dumps(record | {"key": "d" * 64}))
    assert store.look_up(KEY) is None
    assert published(store, {"a": b"1234"})["outputs"] == record["outputs"]  # and is rebuilt
    assert store.look_up(KEY) is not None
    assert path.read_bytes() == b"1234"


def test_a_crash_before_the_record_leaves_a_miss_and_is_cleaned_up(store):
    crash = (
        "import os, sys\n"
        "from snakegpt.store import Store\n"
        f"with Store('store').workspace('{KEY}') as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", crash], check=False)
    assert len(list((store.root / "tmp").iterdir())) == 1
    assert store.look_up(KEY) is None
    with store.workspace(KEY) as folder:
        assert list((store.root / "tmp").iterdir()) == [folder]


def test_a_failing_stage_publishes_nothing(store):
    def fail() -> None:
        with store.workspace(KEY) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list((store.root / "tmp").iterdir())
    assert not list((store.root / "objects").iterdir())


def test_links_are_relative_and_lead_to_bytes_and_record(store, tmp_path):
    record = published(store, {"a.txt": b"1", "sub/b.txt": b"2"})
    folder = tmp_path.joinpath("results/models/x").relative_to(tmp_path)
    link(store, record, folder)
    assert not os.path.isabs(os.readlink(folder / "a.txt"))
    assert (folder / "a.txt").read_bytes() == b"1"
    assert (folder / "sub/b.txt").read_bytes() == b"2"
    assert maker(folder / "a.txt")["key"] == KEY
    os.rename(tmp_path / "store", tmp_path / "gone")
    os.rename(tmp_path / "gone", tmp_path / "store")
    assert digest_of(store, folder / "a.txt") == record["outputs"]["a.txt"]["sha256"]


def test_relinking_drops_what_the_new_action_does_not_make(store, tmp_path):
    folder = Path("results/corpora/x")
    link(store, published(store, {"a": b"1", "b": b"2"}), folder)
    (folder / "other_actions_file").write_text("stays")
    link(store, published(store, {"a": b"3"}, "d" * 64), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "other_actions_file"]
    assert not pointer(folder / "b").exists()
    assert (folder / "a").read_bytes() == b"3"


def test_a_real_file_in_the_way_is_replaced(store):
    folder = Path("results/models/x")
    folder.mkdir(parents=True)
    (folder / "a").write_text("someone's copy")
    link(store, published(store, {"a": b"1"}), folder)
    assert (folder / "a").is_symlink()


def test_the_digest_of_a_link_is_read_off_its_name_and_of_a_file_from_its_bytes(store, tmp_path):
    record = published(store, {"a": b"1"})
    sha256 = record["outputs"]["a"]["sha256"]
    assert digest_of(store, store.object_path(sha256)) == sha256
    plain = tmp_path / ("f" * 64)
    plain.write_bytes(b"2")
    assert digest_of(store, plain) == hashlib.sha256(b"2").hexdigest()


def test_one_process_runs_an_action_and_others_wait(store):
    holder = (
        "import sys\n"
        "from snakegpt.store import Store\n"
        f"with Store('store').claim('{KEY}', lambda: None):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    waited = []

    def waiting() -> None:
        waited.append(time.monotonic())
        process.stdin.write("\n")
        process.stdin.flush()

    with store.claim(KEY, waiting):
        assert process.wait(10) == 0
    assert len(waited) == 1


def test_a_killed_holder_holds_nothing(store):
    code = f"import os\nfrom snakegpt.store import Store\nwith Store('store').claim('{KEY}', None):\n    os.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", code], check=False)
    with store.claim(KEY, lambda: pytest.fail("waited for a dead process")):
        pass


def test_a_store_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Store(tmp_path / "file" / "store").make()


def test_the_environment_names_the_store(monkeypatch):
    monkeypatch.setenv("SNAKEGPT_STORE", "/elsewhere")
    assert str(Store.locate("store").root) == "/elsewhere"
    monkeypatch.delenv("SNAKEGPT_STORE")
    assert str(Store.locate("store").root) == "store"


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"outputs": 3}', "\xff"])
def test_no_record_is_read_from_rubbish(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    assert read_record(tmp_path / "x.json") is None


def test_a_page_keeps_its_name_for_browsers(store):
    record = published(store, {"report.html": b"<html>", "summary.json": b"{}"})
    folder = Path("results/reports/x")
    link(store, record, folder)
    page = folder / "report.html"
    assert Path(os.path.realpath(page)).name == "report.html"
    assert digest_of(store, page) == record["outputs"]["report.html"]["sha256"]
    assert (folder / "summary.json").is_symlink()
