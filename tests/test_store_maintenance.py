"""gc takes what nothing needs and nothing else; verify finds, names and moves aside what is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from snakegpt.errors import UserError
from snakegpt.identity import Action
from snakegpt.store import Store, alive, gc, links, provenance, reach, verify
from snakegpt.store.__main__ import main
from snakegpt.store.gc import collect
from snakegpt.store.objects import Entry
from snakegpt.store.pins import pin, pins, unpin

ROOT = Path(__file__).parent.parent
OLD_S = 7200.0  # past the hour in which gc touches nothing


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNAKEGPT_STORE", "store")
    store = Store("store")
    store.make()
    return store


@pytest.fixture
def later(monkeypatch):
    """Let gc run when everything here is old; files cannot be given an old time of change."""

    def set_clock(seconds: float = OLD_S) -> None:
        for module in (gc, alive):
            for name in ("filesystem_now", "now_or_here"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, lambda _: time.time() + seconds)

    return set_clock


@dataclass
class Made:
    """An action that a test published."""

    key: str
    record: dict

    def sha256(self, name: str) -> str:
        return self.record["outputs"][name]["sha256"]


def action(
    store: Store,
    stage: str,
    name: str,
    files: dict[str, str],
    inputs: dict[str, tuple[Made, str]] | None = None,
    *,
    seed: int = 0,
    diff: str | None = None,
    results: str | None = None,
) -> Made:
    """Publish an action under its true key; `results` is a folder below results/ to show it in."""
    entries = {
        role: [{"path": f"results/x/{output}", "sha256": made.sha256(output), "action": made.key}]
        for role, (made, output) in (inputs or {}).items()
    }
    digests = {role: [entry["sha256"] for entry in found] for role, found in entries.items()}
    science, code = {"seed": seed}, {"revision": 1, "modules": {}}
    key = Action(stage, science, code, digests).key
    with store.workspace(key) as workspace:
        for path, content in files.items():
            (workspace / path).parent.mkdir(parents=True, exist_ok=True)
            (workspace / path).write_text(content)
        outputs = store.publish(workspace)
    record = {"key": key, "stage": stage, "name": name, "science": science, "code": code}
    record |= {"inputs": entries, "unhashed": {}, "outputs": outputs, "execution": {}}
    record["provenance"] = {"wall_s": 1.0}
    if diff:
        content = diff.encode()
        record["provenance"]["diff"] = {"sha256": store.put(content), "bytes": len(content)}
    store.record(key, record)
    if results:
        links.link(store, record, Path("results") / results)
    return Made(key, record)


def chain(store: Store, results: str | None = "models/a") -> tuple[Made, Made]:
    """Raw text and a model made from it, of which only the model is shown."""
    corpus = action(store, "fetch_corpus", "text", {"raw/0.txt": "to be", "raw/1.txt": "or not"})
    files = {"weights": "w" * 100, "logs/0": "l0", "logs/1": "l1"}
    model = action(
        store, "train_model", "a", files, {"corpus": (corpus, "raw")}, diff="+1", results=results
    )
    return corpus, model


def objects(store: Store) -> set[str]:
    return {path.name for path in (store.root / "objects").rglob("*") if path.is_file()}


def records(store: Store) -> set[str]:
    return {path.stem for path in (store.root / "actions").rglob("*.json")}


def needed(store: Store, made: Made) -> set[str]:
    named = {sha256.hex() for sha256, _ in reach.objects_named(store, made.record, set(), set())}
    return named | {entry.sha256 for entry in store.entries(made.record["outputs"])}


def snapshot(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns, path.lstat().st_nlink)
        for path in folder.rglob("*")
        if path.name != "tmp"
    }


# ---- gc ----------------------------------------------------------------------------------------


def test_gc_keeps_results_with_their_objects_and_the_records_of_what_they_were_made_from(
    store, later
):
    corpus, model = chain(store)
    other = action(store, "train_model", "b", {"weights": "v"}, seed=1)
    loose = store.put(b"no record names this")
    wanted = needed(store, model)
    assert len(wanted) == 5  # weights, a listing, two files, a diff
    later()
    report = collect(store, delete=True)
    assert objects(store) == wanted
    assert records(store) == {corpus.key, model.key}
    assert store.look_up(model.key) == model.record
    assert [r["key"] for r in provenance.chain(store, [Path("results/models/a/weights")])] == [
        corpus.key,
        model.key,
    ]
    gone = {(g.name, g.stage): (g.goes.files, g.goes.bytes) for g in report.groups if g.goes.files}
    listing = corpus.record["outputs"]["raw"]["bytes"]
    assert gone[("text", "fetch_corpus")] == (3, listing + len("to be") + len("or not"))
    assert gone[("b", "train_model")][0] == 2 and other.key not in records(store)
    assert gone[("", "objects without a record")] == (1, 20) and loose not in objects(store)
    stays = next(g for g in report.groups if g.name == "a").stays
    sizes = [store.object_path(sha256).stat().st_size for sha256 in wanted]
    assert stays.files == 6
    assert stays.bytes == sum(sizes) + store.action_path(model.key).stat().st_size


def test_a_dry_run_says_the_same_and_touches_nothing(store, later):
    chain(store)
    action(store, "train_model", "b", {"weights": "v"}, seed=1)
    (store.root / "state" / "old").mkdir()
    (store.root / "tmp" / "left").mkdir()
    later()
    before = snapshot(Path())
    dry = collect(store, older_than_s=60, damaged=True)
    assert snapshot(Path()) == before
    wet = collect(store, delete=True, older_than_s=60, damaged=True)
    assert (dry.groups, dry.notes) == (wet.groups, wet.notes)
    assert dry.total().goes.files > 0
    assert collect(store, delete=True, older_than_s=60).total().goes.files == 0


def test_everything_young_stays(store):
    chain(store, results=None)
    store.put(b"loose")
    before = objects(store), records(store)
    assert collect(store, delete=True).total().goes.files == 0
    assert (objects(store), records(store)) == before


def test_an_age_spares_what_was_used_within_it(store, later):
    used = action(store, "train_model", "used", {"weights": "u"}, seed=1)
    unused = action(store, "train_model", "unused", {"weights": "v"}, seed=2)
    aged = time.time() - 86400
    os.utime(store.action_path(unused.key), (aged, aged))
    os.utime(store.object_path(unused.sha256("weights")), (aged, aged))
    later()
    collect(store, delete=True, older_than_s=43200)
    assert records(store) == {used.key}
    assert objects(store) == needed(store, used)


def test_of_two_results_folders_the_deleted_one_keeps_nothing(store, later, tmp_path):
    mine = action(store, "train_model", "a", {"weights": "a"}, seed=1, results="models/a")
    theirs = action(store, "train_model", "b", {"weights": "b"}, seed=2)
    other = tmp_path / "other" / "results"
    other.mkdir(parents=True)
    links.link(store, theirs.record, other / "models/b", other)
    later()
    assert collect(store, delete=True).total().goes.files == 0
    shutil.rmtree(other)
    report = collect(store, delete=True)
    assert records(store) == {mine.key} and objects(store) == {mine.sha256("weights")}
    assert any(str(other) in note for note in report.notes)
    assert [root.results for root in reach.registered(store)] == [str(tmp_path / "results")]


def test_results_that_are_out_of_reach_stop_a_deletion(store, later, tmp_path):
    made = action(store, "train_model", "b", {"weights": "b"})
    disk = tmp_path / "disk"
    results = disk / "checkout" / "results"
    results.mkdir(parents=True)
    links.link(store, made.record, results / "models/b", results)
    disk.rename(tmp_path / "unmounted")
    later()
    with pytest.raises(UserError, match=r"(?s)what .*disk/checkout/results needs.*--forget"):
        collect(store, delete=True)
    assert collect(store).total().goes.files == 2  # a dry run may say what would follow
    (tmp_path / "unmounted").rename(disk)
    assert collect(store, delete=True).total().goes.files == 0
    with pytest.raises(UserError, match="it can be read, or uses another store"):
        collect(store, delete=True, forget=[str(results)])
    shutil.rmtree(disk)
    collect(store, delete=True, forget=[str(results)])
    assert not objects(store) and not reach.registered(store)


def test_results_that_cannot_be_read_stop_gc(store, later, monkeypatch):
    chain(store)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("models"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    later()
    monkeypatch.setattr(reach.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"models cannot be read: Permission denied"):
        collect(store, delete=True)


def test_a_result_without_a_pointer_keeps_its_object(store, later):
    _, model = chain(store)
    links.pointer(Path("results/models/a/weights")).unlink()
    links.pointer(Path("results/models/a/logs")).unlink()
    shown = {entry.sha256 for entry in store.entries(model.record["outputs"])}
    later()
    collect(store, delete=True)
    assert not records(store)
    assert Path("results/models/a/weights").read_text() == "w" * 100
    assert objects(store) == shown


@pytest.mark.parametrize("mode", ["hardlink", "copy"])
def test_results_that_are_no_symbolic_links_keep_their_objects(tmp_path, later, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    store = Store("store", link=mode)
    store.make()
    _, model = chain(store)
    shown = {entry.sha256 for entry in store.entries(model.record["outputs"])}
    links.pointer(Path("results/models/a/weights")).unlink()
    links.pointer(Path("results/models/a/logs")).unlink()
    later()
    collect(store, delete=True)
    assert objects(store) == shown


def test_a_pinned_name_keeps_what_results_do_not(store, later):
    corpus, model = chain(store)
    assert pin(store, "paper", ["results/models/a/logs/0"]) == [model.key]
    assert pin(store, "text", [corpus.key[:10]]) == [corpus.key]
    shutil.rmtree("results")
    later()
    wanted = needed(store, model) | needed(store, corpus)
    collect(store, delete=True)
    assert objects(store) == wanted
    unpin(store, "paper")
    collect(store, delete=True)
    assert records(store) == {corpus.key} and objects(store) == needed(store, corpus)
    unpin(store, "text")
    collect(store, delete=True)
    assert not records(store) and not objects(store)


def test_a_pin_may_be_a_link_to_a_record(store, later):
    _, model = chain(store, results=None)
    (store.root / "pins").mkdir()
    record = Path("..", "actions", model.key[:2], f"{model.key}.json")
    (store.root / "pins" / "paper").symlink_to(record)
    assert pins(store) == {"paper": [model.key]}
    later()
    collect(store, delete=True)
    assert store.look_up(model.key)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("../x", ["results/models/a"], "is no name"),
        ("x", ["results/models/b"], "is nothing that the store"),
        ("x", ["abcdef123456"], "is nothing that the store"),
        ("taken", ["results/models/a"], "keeps other results"),
        ("x", ["OBJECT"], "no action's result"),
    ],
)
def test_what_cannot_be_pinned_is_refused(store, name, targets, message):
    corpus, model = chain(store)
    pin(store, "taken", [corpus.key])
    targets = [target.replace("OBJECT", model.sha256("weights")) for target in targets]
    with pytest.raises(UserError, match=message):
        pin(store, name, targets)
    assert pins(store) == {"taken": [corpus.key]}
    with pytest.raises(UserError, match=r"no pin is named 'take'. Nearest valid name: taken"):
        unpin(store, "take")


def test_a_damaged_pin_stops_gc(store, later):
    chain(store, results=None)
    (store.root / "pins").mkdir()
    (store.root / "pins" / "paper").write_text("half a ke")
    later()
    with pytest.raises(UserError, match="paper is no pin"):
        collect(store, delete=True)
    (finding,) = verify.verify(store).findings
    assert finding.kind == "foreign" and "paper is no pin" in finding.problem


def test_state_stays_until_its_action_is_finished_or_it_is_too_old(store, later):
    finished = action(store, "train_model", "a", {"weights": "a"}, results="models/a")
    for key in (finished.key, "e" * 64):
        store.state_path(key).mkdir()
        (store.state_path(key) / "step").write_text("100")
    later()
    collect(store, delete=True)
    assert [path.name for path in (store.root / "state").iterdir()] == ["e" * 64]
    collect(store, delete=True, older_than_s=2 * OLD_S)
    assert (store.state_path("e" * 64) / "step").exists()
    with store.claim("e" * 64, lambda: None):
        later(10 * OLD_S)
        collect(store, delete=True, older_than_s=2 * OLD_S)
        assert (store.state_path("e" * 64) / "step").exists()
    collect(store, delete=True, older_than_s=2 * OLD_S)
    assert not store.state_path("e" * 64).exists()


def test_state_of_a_finished_action_stays_while_its_result_is_not_whole(store, later):
    finished = action(store, "train_model", "a", {"weights": "a"}, results="models/a")
    store.state_path(finished.key).mkdir()
    store.object_path(finished.sha256("weights")).unlink()
    later()
    collect(store, delete=True)
    assert store.state_path(finished.key).exists()


def test_what_a_running_action_writes_stays_whatever_dates_it_has(store, later):
    before = store.put(b"before the lease")
    started = reach.filesystem_now(store)
    while reach.filesystem_now(store) == started:
        pass  # the filesystem's clock ticks every few milliseconds
    with store.claim("e" * 64, lambda: None), store.workspace("e" * 64) as workspace:
        (workspace / "out").mkdir()
        unpacked = workspace / "out" / "from_an_archive"
        unpacked.write_text("written long ago")
        os.utime(unpacked, (1e9, 1e9))
        published = store.publish(workspace / "out")["from_an_archive"]["sha256"]
        (workspace / "half").write_text("x")
        later(1000 * OLD_S)
        report = collect(store, delete=True, older_than_s=60)
        assert objects(store) == {published}
        assert before not in objects(store)
        assert (workspace / "half").exists()
        assert any("actions that run: 1" in note for note in report.notes)
    collect(store, delete=True)
    assert not objects(store)


def test_the_workspace_of_a_running_action_stays_at_any_age(store, later):
    with store.workspace("e" * 64) as workspace:
        (workspace / "half").write_text("x")
        started = reach.filesystem_now(store)
        while reach.filesystem_now(store) == started:
            pass
        with store.claim("e" * 64, lambda: None):
            later()
            collect(store, delete=True, older_than_s=60)
            assert (workspace / "half").exists()
        collect(store, delete=True)
        assert not workspace.exists()


def test_what_the_dead_left_is_removed_and_holds_nothing_back(store, later):
    loose = store.put(b"loose")
    crash = (
        "import os\n"
        "from snakegpt.store import Store\n"
        "store = Store('store')\n"
        f"with store.claim('{'e' * 64}', None), store.workspace('{'e' * 64}') as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", crash], check=False)
    for left in (f"actions/{loose[:2]}/.half.json.123", "locks/.e.lease.abc", "tmp/object-1"):
        (store.root / left).parent.mkdir(exist_ok=True)
        (store.root / left).write_text("{")
    locks = {path.name for path in (store.root / "locks").iterdir()}
    assert locks == {"e" * 64, f"{'e' * 64}.lease", ".e.lease.abc"}
    later()
    assert "locks of dead processes: 1" in collect(store).notes
    assert {path.name for path in (store.root / "locks").iterdir()} == locks
    collect(store, delete=True)
    for folder in ("locks", "tmp", "objects", "actions"):
        assert not [path for path in (store.root / folder).rglob("*") if path.is_file()]


def test_a_lease_of_another_machine_is_believed(store, later):
    loose = store.put(b"loose")
    lease = {"owner": "x", "pid": 1, "machine": "elsewhere", "since": time.time() - 60}
    (store.root / "locks" / f"{'e' * 64}.lease").write_text(json.dumps(lease))
    (store.root / "locks" / ("e" * 64)).write_text("")  # free, as far as this machine knows
    later()
    collect(store, delete=True)
    assert objects(store) == {loose}
    assert (store.root / "locks" / f"{'e' * 64}.lease").exists()


def test_an_action_that_is_found_while_gc_runs_stays_whole(store, later, monkeypatch):
    found = action(store, "train_model", "b", {"weights": "v", "logs/0": "x"}, seed=1)
    action(store, "train_model", "c", {"weights": "u"}, seed=2)
    sweep = gc._Collection._sweep_records

    def use_then_sweep(self):
        now = time.time() + OLD_S
        os.utime(store.action_path(found.key), (now, now))  # between mark and sweep
        sweep(self)

    monkeypatch.setattr(gc._Collection, "_sweep_records", use_then_sweep)
    later()
    collect(store, delete=True)
    assert records(store) == {found.key}
    assert store.look_up(found.key) == found.record
    assert objects(store) == needed(store, found)


def test_what_a_run_finds_is_young_again_or_a_miss(store, later, monkeypatch):
    made = action(store, "train_model", "b", {"weights": "v"})
    path = store.action_path(made.key)
    os.utime(path, (1e9, 1e9))
    assert store.look_up(made.key) and path.stat().st_mtime == 1e9  # a question uses nothing
    assert store.use(made.key) and path.stat().st_mtime > time.time() - 60
    look_up = store.look_up

    def look_up_then_gc(key):
        record = look_up(key)
        collect(store, delete=True)
        return record

    later()
    monkeypatch.setattr(store, "look_up", look_up_then_gc)
    assert store.use(made.key) is None


def test_an_object_that_goes_while_it_is_published_is_written(store, later, monkeypatch):
    sha256, holds = store.put(b"found there"), store.holds

    def hold_then_gc(*pair):
        found = holds(*pair)
        collect(store, delete=True)
        return found

    later()
    monkeypatch.setattr(store, "holds", hold_then_gc)
    aside = store.root / "new"
    aside.write_bytes(b"found there")
    store._move_in(aside, Entry("", 0o444, sha256, 11))
    assert store.object_path(sha256).read_bytes() == b"found there"


@pytest.mark.parametrize("change", ["made young", "published anew", "both at once"])
def test_an_object_that_is_published_in_the_moment_it_goes_stays(store, later, monkeypatch, change):
    """Injected between gc's last look and its move: the moment that no check before can cover."""
    sha256 = store.put(b"wanted again")
    path = store.object_path(sha256)
    rename = os.rename

    def publish_then_rename(source, target):
        if str(source) == str(path):
            if change == "made young":
                os.utime(path)
            elif change == "published anew":
                (store.root / "tmp" / "new").write_bytes(b"wanted again")
                os.replace(store.root / "tmp" / "new", path)
            else:
                rename(source, target)
                store.put(b"wanted again")
                return
        rename(source, target)

    later()
    monkeypatch.setattr(gc.os, "rename", publish_then_rename)
    collect(store, delete=True)
    assert path.read_bytes() == b"wanted again"
    assert not list((store.root / "tmp").iterdir())


def test_a_deletion_that_is_killed_leaves_no_record_of_what_is_gone(store, later, monkeypatch):
    for seed in range(3):
        action(store, "train_model", f"m{seed}", {"weights": str(seed), "logs/0": "l"}, seed=seed)
    later()
    unlink, kills = os.unlink, 0
    while True:
        calls = itertools.count()

        def unlink_or_die(path, *, calls=calls, last=kills, **rest):
            if next(calls) == last:
                raise KeyboardInterrupt
            unlink(path, **rest)

        copy = Store(f"copy{kills}")
        shutil.copytree(store.root, copy.root)
        monkeypatch.setattr(gc.os, "unlink", unlink_or_die)
        try:
            collect(copy, delete=True)
            break
        except KeyboardInterrupt:
            kills += 1
        finally:
            monkeypatch.setattr(gc.os, "unlink", unlink)
        assert all(copy.look_up(key) for key in records(copy))
    assert kills == 3 + 3 + 1 + 1  # records, weights, a file and a listing that all three share


def test_what_is_damaged_stays_aside_unless_asked_for(store, later):
    (store.root / "damaged").mkdir()
    (store.root / "damaged" / ("a" * 64)).write_text("x")
    later()
    collect(store, delete=True)
    assert list((store.root / "damaged").iterdir())
    collect(store, delete=True, damaged=True)
    assert not list((store.root / "damaged").iterdir())


def test_why_names_what_keeps_a_result_a_key_and_an_object(store, later, tmp_path):
    corpus, model = chain(store)
    pin(store, "paper", [model.key])
    garbage = action(store, "train_model", "b", {"weights": "v"}, seed=1)
    later()
    result = f"result {tmp_path}/results/models/a"
    shown = {f"{result}/weights", f"{result}/logs"}
    kept = alive.why_kept(store, "results/models/a/weights")
    assert set(kept["records"][model.key]) == {*shown, "pin paper"}
    assert set(kept["objects"][model.sha256("weights")]) == {*shown, "pin paper"}
    above = alive.why_kept(store, corpus.key[:16])["records"][corpus.key]
    assert set(above) == {f"{r}, made from it" for r in (*shown, "pin paper")}
    raw = hashlib.sha256(b"to be").hexdigest()
    assert alive.why_kept(store, raw) == {"records": {}, "objects": {raw: []}}
    assert alive.why_kept(store, garbage.key) == {"records": {garbage.key: []}, "objects": {}}


def test_a_store_that_is_not_there_is_a_clear_error(tmp_path):
    for command in (collect, verify.verify):
        with pytest.raises(UserError, match="there is no store at"):
            command(Store(tmp_path / "none"))


def test_gc_on_the_command_line(store, capsys):
    _, model = chain(store)
    config = ["--configfile", str(ROOT / "config.yaml")]
    main(["pin", "paper", "results/models/a", *config])
    assert capsys.readouterr().out == f"paper  {model.key[:12]}\n"
    main(["gc", "--json", *config])
    found = json.loads(capsys.readouterr().out)
    assert found["deleted"] is False and found["total"]["goes"] == {"files": 0, "bytes": 0}
    assert {(g["name"], g["stage"]) for g in found["groups"]} == {
        ("a", "train_model"),
        ("text", "fetch_corpus"),
    }
    main(["gc", *config])
    assert "nothing was touched; --delete removes what goes" in capsys.readouterr().out
    main(["gc", "--why", "results/models/a", *config])
    assert "  pin paper\n" in capsys.readouterr().out
    main(["unpin", "paper", *config])
    main(["pin", "--json", *config])
    assert json.loads(capsys.readouterr().out) == {}
    with pytest.raises(SystemExit) as stopped:
        main(["gc", "--older-than", "7 days", *config])
    assert stopped.value.code == 2


# ---- verify ------------------------------------------------------------------------------------


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, bytes(content))


def found(report: verify.Report) -> list[tuple[str, str]]:
    return sorted((finding.kind, finding.name) for finding in report.findings)


def test_a_store_that_is_whole_gives_nothing(store):
    chain(store)
    store.put(b"loose")
    report = verify.verify(store)
    assert not report.findings
    assert (report.records, report.checked, report.unnamed) == (2, 8, 1)
    report = verify.verify(store, unnamed=True)
    assert (report.findings, report.checked, report.unnamed) == ([], 9, 0)


def test_the_key_is_computed_as_the_runner_computes_it(store):
    corpus, model = chain(store)
    assert [verify.key_of(made.record) for made in (corpus, model)] == [corpus.key, model.key]
    science = {"ä": [1, 2.5, 1e-7, None, True], "b": {"z": "\n", "a": 10**20, "": {}}}
    expected = Action("s", science, {"revision": 2}, {"x": ["1", "2"], "a": []}).key
    inputs = {"x": [{"sha256": "1"}, {"sha256": "2", "path": "p"}], "a": []}
    record = {"stage": "s", "science": science, "code": {"revision": 2}, "inputs": inputs}
    assert verify.key_of(json.loads(json.dumps(record))) == expected
    with pytest.raises(ValueError, match="not JSON compliant"):
        verify.key_of(record | {"science": float("nan")})


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "longer"])
def test_a_damaged_object_is_named_moved_aside_and_rebuilt(store, tmp_path, damage):
    _, model = chain(store)
    sha256 = model.sha256("weights")
    path = store.object_path(sha256)
    if damage == "flipped bit":
        flip_a_bit(path)
        assert not verify.verify(store, metadata=True).findings  # which reads nothing
        assert store.look_up(model.key)  # as a look-up that checks sizes alone does
    else:
        overwrite(path, b"w" * (99 if damage == "truncated" else 101))
    bytes_found = path.read_bytes()
    (finding,) = verify.verify(store, metadata=damage != "flipped bit").findings
    assert (finding.kind, finding.name) == ("damaged", sha256)
    assert finding.moved == f"store/damaged/{sha256}"
    assert finding.actions == [f"train_model a ({model.key[:12]})"]
    assert finding.results == [f"{tmp_path}/results/models/a/weights"]
    assert not path.exists() and Path(finding.moved).read_bytes() == bytes_found
    assert store.look_up(model.key) is None
    assert found(verify.verify(store)) == [("missing", sha256)]
    assert links.mend(store) == 1
    chain(store)
    assert store.look_up(model.key)
    assert not verify.verify(store).findings


@pytest.mark.parametrize("metadata", [True, False])
def test_a_deleted_object_is_missing(store, tmp_path, metadata):
    _, model = chain(store)
    leaf = hashlib.sha256(b"l1").hexdigest()
    store.object_path(leaf).unlink()
    (finding,) = verify.verify(store, metadata=metadata).findings
    assert (finding.kind, finding.name, finding.moved) == ("missing", leaf, None)
    assert finding.actions == [f"train_model a ({model.key[:12]})"]
    assert finding.results == [f"{tmp_path}/results/models/a/logs/1"]


@pytest.mark.parametrize("metadata", [True, False])
def test_a_damaged_listing_is_found_without_reading_objects(store, tmp_path, metadata):
    _, model = chain(store)
    listing = model.sha256("logs")
    flip_a_bit(store.object_path(listing))
    (finding,) = verify.verify(store, metadata=metadata).findings
    assert (finding.kind, finding.name) == ("damaged", listing)
    assert finding.moved
    assert finding.results == [f"{tmp_path}/results/models/a/logs"]
    assert store.look_up(model.key) is None
    chain(store)
    assert store.look_up(model.key) and not verify.verify(store).findings


def test_a_deleted_action_is_missing_where_a_result_or_a_pin_leads_to_it(store, tmp_path):
    _, model = chain(store)
    pin(store, "paper", [model.key])
    store.action_path(model.key).unlink()
    (finding,) = verify.verify(store).findings
    assert (finding.kind, finding.name) == ("missing", model.key)
    results = [f"{tmp_path}/results/models/a/{name}" for name in ("logs", "weights")]
    assert finding.results == [*results, "pin paper"]


def test_results_of_another_store_are_no_fault_of_this_one(store):
    chain(store)
    other = Store("other")
    other.make()
    links.register(other)
    assert not verify.verify(other).findings


@pytest.mark.parametrize("damage", ["half", "edited", "renamed", "no outputs", "odd", "bad digest"])
def test_a_record_that_is_none_is_foreign(store, tmp_path, damage):
    _, model = chain(store)
    path = store.action_path(model.key)
    record = json.loads(path.read_text())
    name = model.key
    if damage == "half":
        path.write_text(path.read_text()[:100])
    elif damage == "edited":
        path.write_text(json.dumps(record | {"science": {"seed": 5}}))
    elif damage == "renamed":
        name = model.key[:-1] + ("1" if model.key[-1] == "0" else "0")
        path = path.rename(path.with_name(f"{name}.json"))
    elif damage == "no outputs":
        path.write_text(json.dumps({"key": model.key}))
    elif damage == "odd":
        path.write_text(json.dumps(record | {"inputs": [1, 2]}))
    else:
        path.write_text(json.dumps(record | {"outputs": {"x": {"sha256": "xyz", "bytes": 1}}}))
    report = verify.verify(store)
    foreign = [finding for finding in report.findings if finding.kind == "foreign"]
    assert [finding.name for finding in foreign] == [name]
    assert path.exists()
    if damage != "renamed":
        assert f"{tmp_path}/results/models/a/weights" in foreign[0].results


def test_a_record_with_a_wrong_size_is_named_and_the_object_stays(store):
    _, model = chain(store)
    other = action(store, "copy", "b", {"weights": "w" * 100}, seed=3)  # the same object
    path = store.action_path(other.key)
    record = json.loads(path.read_text())
    record["outputs"]["weights"]["bytes"] = 7
    path.write_text(json.dumps(record))
    for metadata in (True, False):
        assert found(verify.verify(store, metadata=metadata)) == [("foreign", other.key)]
    assert store.look_up(model.key)


def test_what_does_not_belong_is_named_and_left(store):
    chain(store)
    sha256 = hashlib.sha256(b"misplaced").hexdigest()
    wrong = "00" if sha256[:2] != "00" else "11"
    places = [
        "objects/notes.txt",
        "objects/zz/file",
        f"objects/{wrong}/{sha256}",
        f"objects/{wrong}/readme",
        f"objects/{wrong}/{wrong}{'a' * 62}/inside",
        f"actions/{wrong}/{'e' * 64}",
        "actions/x.json",
    ]
    for place in places:
        (store.root / place).parent.mkdir(parents=True, exist_ok=True)
        (store.root / place).write_text("misplaced")
    link = store.root / "objects" / wrong / f"{wrong}{'b' * 62}"
    link.symlink_to("/dev/null")
    (store.root / "actions" / wrong / ".half.json.17").write_text("{")  # a crash's, which gc takes
    report = verify.verify(store)
    names = {finding.name for finding in report.findings}
    assert {finding.kind for finding in report.findings} == {"foreign"}
    assert names == {
        "store/objects/notes.txt",
        "store/objects/zz",
        f"store/objects/{wrong}/{sha256}",
        f"store/objects/{wrong}/readme",
        f"store/objects/{wrong}/{wrong}{'a' * 62}",
        f"store/objects/{wrong}/{wrong}{'b' * 62}",
        "e" * 64,
        "store/actions/x.json",
    }
    assert all((store.root / place).exists() for place in places)


def test_an_object_that_no_record_names_is_read_only_if_asked(store):
    sha256 = store.put(b"loose")
    flip_a_bit(store.object_path(sha256))
    assert not verify.verify(store).findings
    assert found(verify.verify(store, unnamed=True)) == [("damaged", sha256)]


def test_a_result_that_is_the_damaged_file_itself_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("store", link="hardlink")
    store.make()
    _, model = chain(store)
    result = Path("results/models/a/weights")
    flip_a_bit(result)  # which is the object, by another name
    (finding,) = verify.verify(store).findings
    assert finding.name == model.sha256("weights")
    assert finding.results == [str(result.absolute())]
    assert not result.exists()
    assert Path("results/models/a/logs/0").exists()


def test_a_disk_that_cannot_read_an_object_has_damaged_it(store, monkeypatch):
    _, model = chain(store)
    sha256, hashed = model.sha256("weights"), verify.file_digest

    def fail(path):
        if path.name == sha256:
            raise OSError(5, "Input/output error")
        return hashed(path)

    monkeypatch.setattr(verify, "file_digest", fail)
    (finding,) = verify.verify(store).findings
    assert finding.problem == "it cannot be read: Input/output error"
    assert not store.object_path(sha256).exists()


def test_a_fault_that_does_not_come_again_damages_nothing(store, monkeypatch):
    _, model = chain(store)
    sha256, hashed, times = model.sha256("weights"), verify.file_digest, []

    def once(path):
        if path.name == sha256 and not times:
            times.append(path)
            return "0" * 64
        return hashed(path)

    monkeypatch.setattr(verify, "file_digest", once)
    assert not verify.verify(store).findings
    assert times and store.look_up(model.key)


def test_only_what_was_not_read_lately_is_read(store, monkeypatch):
    chain(store)
    assert verify.verify(store, older_than_s=60).checked == 8
    again = verify.verify(store, older_than_s=60)
    assert (again.checked, again.skipped) == (0, 8)
    assert verify.verify(store).checked == 8
    now = time.time()
    monkeypatch.setattr(verify, "now_or_here", lambda _: now + 61)
    assert verify.verify(store, older_than_s=60).checked == 8
    monkeypatch.setattr(verify, "now_or_here", lambda _: now - 86400)  # a clock that jumped back
    assert verify.verify(store, older_than_s=60).checked == 8


def test_what_was_read_lately_still_has_to_be_there_in_full(store):
    _, model = chain(store)
    verify.verify(store)
    overwrite(store.object_path(model.sha256("weights")), b"short")
    store.object_path(hashlib.sha256(b"l0").hexdigest()).unlink()
    assert [kind for kind, _ in found(verify.verify(store, older_than_s=60))] == [
        "damaged",
        "missing",
    ]


def test_a_killed_verify_goes_on_where_it_was(store, monkeypatch):
    for seed in range(20):
        action(store, "train_model", "m", {"weights": str(seed)}, seed=seed)
    total = len(objects(store))
    hashed, reads = verify.file_digest, []

    def read(path):
        reads.append(path.name)
        if len(reads) == 12:
            raise KeyboardInterrupt
        return hashed(path)

    monkeypatch.setattr(verify, "AHEAD", 1)
    monkeypatch.setattr(verify, "file_digest", read)
    with pytest.raises(KeyboardInterrupt):
        verify.verify(store, older_than_s=60, threads=1)
    noted = {s for p in (store.root / "verified").glob("*.json") for s in json.loads(p.read_text())}
    assert 0 < len(noted) < 12
    assert {name[:2] for name in noted} == {name[:2] for name in sorted(reads)[: len(noted)]}
    report = verify.verify(store, older_than_s=60, threads=1)
    assert (report.checked, report.skipped) == (total - len(noted), len(noted))


def test_a_note_of_the_last_check_that_is_damaged_counts_for_nothing(store):
    chain(store)
    verify.verify(store)
    for path in (store.root / "verified").glob("*.json"):
        path.write_text("{")
    assert verify.verify(store, older_than_s=60).checked == 8


def test_metadata_reads_no_object(store, monkeypatch):
    chain(store)
    monkeypatch.setattr(verify, "file_digest", lambda _: pytest.fail("it was read"))
    report = verify.verify(store, metadata=True)
    assert (report.findings, report.checked) == ([], 8)
    assert not (store.root / "verified").exists()


@pytest.mark.parametrize("threads", [1, 8])
def test_many_threads_find_what_one_finds(store, threads):
    made = [
        action(store, "train_model", "m", {"w": "x" * 5000 + str(seed)}, seed=seed)
        for seed in range(60)
    ]
    broken = sorted(m.sha256("w") for m in made[::7])
    for sha256 in broken:
        flip_a_bit(store.object_path(sha256))
    assert found(verify.verify(store, threads=threads)) == [("damaged", s) for s in broken]


def test_verify_beside_a_gc_does_not_miss_what_went_with_its_record(store, monkeypatch):
    made = action(store, "train_model", "b", {"weights": "v"})
    read = verify._Verification._read_records

    def read_then_lose(self):
        read(self)
        store.action_path(made.key).unlink()
        store.object_path(made.sha256("weights")).unlink()

    monkeypatch.setattr(verify._Verification, "_read_records", read_then_lose)
    assert not verify.verify(store).findings


@pytest.mark.parametrize("metadata", [True, False])
def test_what_gc_took_is_not_missing(store, later, metadata):
    corpus, _ = chain(store)
    action(store, "train_model", "b", {"weights": "v"}, seed=1)
    later()
    collect(store, delete=True)
    report = verify.verify(store, metadata=metadata)
    assert report.findings == []
    assert (report.records, report.checked, report.let_go) == (
        2,
        5,
        1,
    )  # a listing, whose files none knows
    pin(store, "text", [corpus.key])
    lost = verify.verify(store, metadata=metadata)
    assert found(lost) == [("missing", corpus.sha256("raw"))]
    assert lost.findings[0].actions == [f"fetch_corpus text ({corpus.key[:12]})"]


def test_verify_on_the_command_line(store, capsys):
    _, model = chain(store)
    config = ["--configfile", str(ROOT / "config.yaml")]
    main(["verify", *config])
    assert "2 records, 8 objects read" in capsys.readouterr().out
    store.object_path(model.sha256("weights")).unlink()
    for arguments in (["--metadata"], ["--json", "--older-than", "1h"]):
        with pytest.raises(SystemExit) as stopped:
            main(["verify", *arguments, *config])
        assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "missing  " + model.sha256("weights") in out
    printed = json.loads(out[out.index("{") :])
    assert [f["kind"] for f in printed["findings"]] == ["missing"]
    with contextlib.suppress(OSError):
        shutil.rmtree("store")
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *config])
    assert stopped.value.code == 2


def test_an_object_that_no_result_shows_may_be_gone_unless_it_is_pinned(store):
    _, model = chain(store)
    shutil.rmtree("results")
    store.object_path(model.sha256("weights")).unlink()
    report = verify.verify(store)
    assert not report.findings
    assert report.let_go == 1
    pin(store, "paper", [model.key])
    assert found(verify.verify(store)) == [("missing", model.sha256("weights"))]
