"""Faults on purpose: kills at every step, full disks, lost rights, damage. Nothing wrong is ever served."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from snakegpt import run as runner
from snakegpt.errors import RETRY, USER_ERROR, UserError, reports_errors
from snakegpt.store import Store, links

FILES = {"big.bin": b"0123456789" * 1000, "files/one.txt": b"one", "files/deep/two.txt": b"two"}
OLD = {"big.bin": b"old", "files/one.txt": b"one", "files/gone.txt": b"gone"}
FOLDER = Path("results/models/x")
TINY = Path(__file__).parent / "tiny.yaml"

# What publishing does to the disk, as Python's audit events name it.
STEPS = {
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "open",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with blanks, quotes and letters of other scripts in its name."""
    folder = tmp_path / 'it\'s a "project" für 雪'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(files: dict[str, bytes] = FILES, label: str = "new", **options: str) -> None:
    """One action through the runner; its stage, which writes `files`, is the only stand-in."""

    def stage(command: list[str], lease: object, environment: dict[str, str]) -> int:
        out = Path(command[command.index("--out") + 1])
        for name, content in files.items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return 0

    runner._call = stage
    store = Store("store", **options)
    place = {"execution": {}, "unhashed": {}, "state": True, "chain": False}
    runner.run("index_tokens", "x", {"label": label}, {}, FOLDER, store, **place)


def shown() -> dict[str, bytes]:
    """What results/ shows, with every link followed."""
    files = [path for path in FOLDER.rglob("*") if not path.is_dir()]
    return {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in files}


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(step: int) -> None:
    """From now on, kill this process just before the given step that changes the disk."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        changes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in STEPS and changes:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def assert_nothing_is_wrong(store: Store) -> None:
    """Every object is its name's bytes, every record's objects are there, no link shows anything else."""
    for path in (store.root / "objects").rglob("*"):
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    for path in (store.root / "actions").rglob("[!.]*.json"):
        assert store.look_up(json.loads(path.read_text())["key"])
    for path in FOLDER.rglob("[!.]*"):
        if not path.is_dir():
            name = path.relative_to(FOLDER).as_posix()
            assert path.read_bytes() in (FILES.get(name), OLD.get(name))


@pytest.mark.parametrize("before", [None, OLD], ids=["nothing before", "an old result"])
def test_a_kill_at_any_step_loses_and_spoils_nothing(project, before):
    pristine = project / "pristine"
    pristine.mkdir()
    os.chdir(pristine)
    if before:
        run(before, "old")
    kills = 0
    while True:
        attempt = project / "attempt"
        shutil.rmtree(attempt, ignore_errors=True)
        shutil.copytree(pristine, attempt, symlinks=True)
        os.chdir(attempt)
        status = in_child(lambda step=kills + 1: (kill_at(step), run()))
        store = Store("store")
        assert_nothing_is_wrong(store)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        n_records = len(list((store.root / "actions").rglob("[!.]*.json")))
        published = n_records == (2 if before else 1)
        assert in_child(run) == 0
        assert shown() == FILES
        assert_nothing_is_wrong(store)
        if (
            not published
        ):  # else there was nothing left to do but to link; `gc` takes what lies about
            for folder in ("tmp", "locks", "state"):
                assert not list((store.root / folder).iterdir())
    assert kills > 30  # so many steps there are, and each was tried


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (-signal.SIGTERM, RETRY),  # asked to stop while it starts, when it does not listen yet
        (-signal.SIGUSR1, RETRY),
        (-signal.SIGKILL, 1),
        (RETRY, RETRY),
        (USER_ERROR, USER_ERROR),
        (130, 1),
    ],
)
def test_who_was_asked_to_stop_asks_for_a_retry(project, ending, status):
    runner._call = lambda *_: ending
    place = {"execution": {}, "unhashed": {}, "state": True, "chain": False}
    with pytest.raises(SystemExit) as left:
        runner.run("index_tokens", "x", {}, {}, FOLDER, Store("store"), **place)
    assert left.value.code == status


@pytest.mark.long
def test_kills_at_random_times(project):
    """A real stage in a real process: 200 kills of runner and stage, one after the other."""
    text = Path("text.txt")
    text.write_text("some words of a text\n" * 1000, encoding="utf-8")
    corpus = Path("results/corpora/x/corpus.json")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    entry = {"path": "text.txt", "sha256": digest, "bytes": text.stat().st_size}
    (corpus.parent / "files").mkdir(parents=True)
    corpus.write_text(json.dumps({"files": [entry]}))
    shutil.copy(text, corpus.parent / "files/text.txt")
    kind = {"text_column": "text", "document_separator": None, "encoding_errors": "refuse"}
    command = [sys.executable, "-m", "snakegpt.run", "build_tokenizer", "x"]
    command += ["--settings", json.dumps({"kind": "char", "text": kind})]
    command += ["--input", "corpus", str(corpus), "--output", "results/tokenizers/x"]
    draw = random.Random(1)
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    longest = time.monotonic() - started
    expected = Path("results/tokenizers/x/tokenizer.json").read_bytes()
    kills = 0
    while kills < 200:
        shutil.rmtree("store/actions", ignore_errors=True)  # so that there is something to do
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(draw.uniform(0, longest))
        except subprocess.TimeoutExpired:
            whom = draw.choice([os.kill, os.killpg])  # the runner alone, or its stage as well
            whom(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if draw.random() < 0.2:
                subprocess.run(command, check=True, capture_output=True)
                assert Path("results/tokenizers/x/tokenizer.json").read_bytes() == expected
        for path in Path("store/objects").rglob("*"):
            assert path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    subprocess.run(command, check=True, capture_output=True)
    assert Path("results/tokenizers/x/tokenizer.json").read_bytes() == expected
    assert not list(Path("store/tmp").iterdir())
    verify = [sys.executable, "-m", "snakegpt.store", "verify", "--json"]
    clean = subprocess.run([*verify, "--configfile", str(TINY)], capture_output=True, text=True)
    assert clean.returncode == 0, clean.stdout + clean.stderr


@pytest.mark.parametrize(
    "damage", ["truncated", "deleted", "record deleted", "record half-written"]
)
def test_damage_is_a_miss_and_the_next_run_heals_it(project, damage):
    run()
    store = Store("store")
    record = links.maker(FOLDER / "big.bin")
    big = store.object_path(record["outputs"]["big.bin"]["sha256"])
    action = store.action_path(record["key"])
    big.chmod(0o644)
    if damage == "truncated":
        os.truncate(big, 10)
    elif damage == "deleted":
        big.unlink()
    elif damage == "record deleted":
        action.unlink()
    else:
        os.truncate(action, action.stat().st_size // 2)
    assert store.look_up(record["key"]) is None
    run()
    assert shown() == FILES
    assert_nothing_is_wrong(store)


@pytest.mark.parametrize("which", ["big.bin", "files"])
def test_a_flipped_bit_is_seen_by_a_hit_that_checks_digests(project, which):
    run()
    key = links.maker(FOLDER / "big.bin")["key"]
    path = Store("store").object_path(links.maker(FOLDER / which)["outputs"][which]["sha256"])
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    assert Store("store", check="digest").look_up(key) is None
    run(check="digest")
    assert shown() == FILES
    assert_nothing_is_wrong(Store("store"))


def namespaced(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as root of a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces for this user")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_faults as t; "
    )
    words = ["unshare", "-rm", "sh", "-ec", script, sys.executable, code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_full_disk_is_a_message_and_loses_nothing(project):
    done = namespaced(
        "mkdir store; mount -t tmpfs -o size=400k tmpfs store; "
        '"$0" -c "$1 t.reports_errors(t.run)(t.OLD, \'old\')"; '
        "dd if=/dev/zero of=store/fill bs=1k count=1000 2>/dev/null || true; "
        'status=0; "$0" -c "$1 t.reports_errors(t.run)()" || status=$?; echo status $status; '
        '"$0" -c "$1 t.assert_nothing_is_wrong(t.Store(\'store\')); assert t.shown() == t.OLD"; '
        'rm store/fill; "$0" -c "$1 t.run(); assert t.shown() == t.FILES"; echo healed'
    )
    assert "healed" in done.stdout, done.stderr
    assert f"status {USER_ERROR}" in done.stdout
    assert "No space left on device" in done.stderr
    assert "snakegpt.store gc" in done.stderr


def test_a_read_only_store_serves_hits_and_refuses_misses(project):
    run()
    shutil.rmtree("results")
    done = namespaced(
        "mount --bind store store; mount -o remount,bind,ro store; "
        '"$0" -c "$1 t.run(); assert t.shown() == t.FILES"; '
        'status=0; "$0" -c "$1 t.reports_errors(t.run)(t.OLD, \'old\')" || status=$?; '
        "echo status $status"
    )
    assert f"status {USER_ERROR}" in done.stdout, done.stderr
    assert "Read-only file system" in done.stderr
    assert "SNAKEGPT_STORE" in done.stderr
    assert shown() == FILES


def as_nobody(work: Callable[[], object]) -> int:
    """Run as a user without rights where this one is root, else as this one."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    return in_child(child)


def opened_for_writing(mode: str) -> None:
    with open(FOLDER / "big.bin", mode) as file:
        file.write("oops")


@pytest.mark.parametrize("link", ["symlink", "hardlink"])
@pytest.mark.parametrize("mode", ["w", "a", "r+"])
def test_a_result_cannot_be_opened_for_writing(project, link, mode):
    run(link=link)

    def attempt() -> None:
        with pytest.raises(PermissionError):
            opened_for_writing(mode)

    assert as_nobody(attempt) == 0
    assert_nothing_is_wrong(Store("store"))


@pytest.mark.parametrize("mode", ["w", "a", "r+"])
def test_what_is_written_to_a_copy_never_reaches_the_store(project, mode):
    run(link="copy")
    opened_for_writing(mode)
    store = Store("store")
    sha256 = links.maker(FOLDER / "big.bin")["outputs"]["big.bin"]["sha256"]
    assert store.object_path(sha256).read_bytes() == FILES["big.bin"]
    assert links.digest_of(store, FOLDER / "big.bin") != sha256  # and nobody is deceived
    run(link="copy")
    assert shown() == FILES


def test_a_missing_permission_is_a_message(project, capfd):
    run()
    for path in (Path("store/actions"), Path("store/locks")):
        path.chmod(0o755)
    assert as_nobody(lambda: reports_errors(run)(OLD, "old")) == USER_ERROR
    message = capfd.readouterr().err
    assert "error: store/" in message
    assert "Permission denied" in message
    assert "SNAKEGPT_STORE" in message


def test_an_unexpected_error_of_the_system_keeps_its_traceback():
    @reports_errors
    def main() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        main()


def test_a_real_file_in_place_of_a_link_is_a_new_input_and_is_replaced(project):
    run()
    path = FOLDER / "big.bin"
    path.unlink()
    path.write_bytes(b"mine")
    assert links.digest_of(Store("store"), path) == hashlib.sha256(b"mine").hexdigest()
    run()
    assert path.is_symlink()
    assert shown() == FILES


def test_a_folder_in_the_way_is_named_and_kept(project):
    (FOLDER / "big.bin").mkdir(parents=True)
    (FOLDER / "big.bin/precious").write_text("mine")
    with pytest.raises(UserError, match=r"big\.bin cannot be made"):
        run()
    assert (FOLDER / "big.bin/precious").read_text() == "mine"


def test_links_to_lost_objects_are_mended(project):
    run()
    store = Store("store")
    assert links.mend(store) == 0
    store.object_path(links.maker(FOLDER / "big.bin")["outputs"]["big.bin"]["sha256"]).unlink()
    assert links.mend(store) == 1
    assert set(shown()) == {"files/one.txt", "files/deep/two.txt"}


def test_a_moved_store_is_not_rebuilt_by_mistake(project):
    run()
    os.rename("store", "elsewhere")
    with pytest.raises(UserError, match="3 results point into a store that is gone") as caught:
        links.mend(Store("store"))
    assert "SNAKEGPT_STORE" in str(caught.value)
    moved = Store("elsewhere")
    links.mend(moved)
    runner._call = lambda *_: pytest.fail("the stage ran")
    place = {"execution": {}, "unhashed": {}, "state": True, "chain": False}
    runner.run("index_tokens", "x", {"label": "new"}, {}, FOLDER, moved, **place)
    assert shown() == FILES


def test_a_clock_that_jumps_backwards_changes_nothing(project, monkeypatch):
    run(OLD, "old")
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    run()
    assert shown() == FILES
    runner._call = lambda *_: pytest.fail("the stage ran")
    assert_nothing_is_wrong(Store("store"))


@pytest.mark.parametrize("link", ["auto", "symlink", "hardlink", "copy"])
def test_every_way_of_linking_shows_the_same_and_is_known_without_reading(
    project, link, monkeypatch
):
    run(OLD, "old", link=link)
    run(link=link)
    assert shown() == FILES
    store = Store("store", link=link)
    monkeypatch.setattr(links, "file_digest", lambda path: pytest.fail(f"read {path}"))
    for name, content in FILES.items():
        assert links.digest_of(store, FOLDER / name) == hashlib.sha256(content).hexdigest()
        assert links.maker(FOLDER / name)["science"] == {"label": "new"}


def test_a_filesystem_without_symbolic_links_gets_hard_links(project, monkeypatch):
    plain = os.symlink

    def no_symlinks_to_objects(target: str, link: Path, *rest: object) -> None:
        if "objects" in os.fspath(target):
            raise OSError(errno.EPERM, "Operation not permitted")
        plain(target, link, *rest)

    monkeypatch.setattr(os, "symlink", no_symlinks_to_objects)
    run()
    assert shown() == FILES
    assert (FOLDER / "big.bin").stat().st_nlink == 2


def test_racing_invocations_run_an_action_once(project):
    """50 rounds of two processes that want the same action at the same moment."""
    runs = Path("runs")

    def counted(command: list[str], *_rest: object) -> int:
        with runs.open("a") as file:
            file.write("run\n")
        out = Path(command[command.index("--out") + 1])
        (out / "a").write_text("content")
        return 0

    def child(number: int) -> None:
        runner._call = counted
        place = {"execution": {}, "unhashed": {}, "state": True, "chain": False}
        folder = Path(f"results/models/{os.getpid()}")
        runner.run("index_tokens", "x", {"round": number}, {}, folder, Store("store"), **place)
        assert (folder / "a").read_text() == "content"

    for number in range(50):
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    child(number)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert len(runs.read_text().splitlines()) == 50


def test_arguments_that_no_command_line_takes_come_from_a_file(project):
    """As rules/common.smk hands them on, and the runner to its stage, for corpora of many files."""
    texts = Path("results/corpora/x/files")
    texts.mkdir(parents=True)
    files = []
    for number in range(1500):
        content = f"text {number}".encode()
        (texts / f"{number:04d}.txt").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"path": f"{number:04d}.txt", "sha256": digest, "bytes": len(content)})
    Path("results/corpora/x/corpus.json").write_text(json.dumps({"files": files}))
    words = ["screen_documents", "x", "--output", "results/corpora/x"]
    words += ["--settings", json.dumps({"files": files, "deduplicate": True})]
    words += ["--unhashed", "corpus", "results/corpora/x/corpus.json"]
    assert max(map(len, words)) > 1 << 17
    Path("arguments.json").write_text(json.dumps(words))
    command = [sys.executable, "-m", "snakegpt.run", "@arguments.json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("results/corpora/x/drops.json").read_text())["n_documents"] == 1500
