"""One process runs an action at a time: on one machine, on several, after deaths and lost leases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from snakegpt.errors import Interrupted
from snakegpt.store import leases

KEY = "c" * 64

# A process that holds the lease until a line comes in, as another machine would if told so.
HOLDER = """
import sys
from pathlib import Path
from snakegpt.store import leases
folder, key, elsewhere = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "elsewhere"
if elsewhere:
    leases.machine = lambda: "another machine"
    leases._flock = lambda path: (None, True)  # a lock that this machine cannot see
leases.BEAT_S = 0.05
with leases.hold(folder, key, lambda: print("waits", flush=True)):
    print("holds", flush=True)
    sys.stdin.readline()
"""


def holder(folder: Path, where: str = "here") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, KEY, where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "holds\n"
    return process


def must_not_wait() -> None:
    pytest.fail("waited for a process that is dead")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "DEAD_AFTER_S", 1.0)
    monkeypatch.setattr(leases, "POLL_S", (0.01, 0.05))


def release(process: subprocess.Popen) -> None:
    process.communicate("\n", timeout=10)
    assert process.returncode == 0


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_living_owner_is_waited_for_as_long_as_it_takes(tmp_path, quick, where):
    process = holder(tmp_path, where)
    waiting, released = threading.Event(), threading.Event()

    def end() -> None:
        released.set()
        release(process)

    threading.Timer(3 * leases.DEAD_AFTER_S, end).start()
    with leases.hold(tmp_path, KEY, waiting.set):
        assert released.is_set()
    assert waiting.is_set()
    process.wait(10)
    assert not list(tmp_path.iterdir())


def test_an_owner_killed_on_this_machine_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "DEAD_AFTER_S", 1e6)
    process = holder(tmp_path)
    process.kill()
    process.wait()
    with leases.hold(tmp_path, KEY, must_not_wait) as lease:
        lease.check()


def test_an_owner_killed_elsewhere_is_followed_when_its_heart_stopped(tmp_path, quick):
    process = holder(tmp_path, "elsewhere")
    process.kill()
    process.wait()
    waited = []
    with leases.hold(tmp_path, KEY, lambda: waited.append(True)) as lease:
        lease.check()
    assert waited == [True]


def test_a_child_that_inherits_the_claim_keeps_it_alive(tmp_path, quick):
    with leases.hold(tmp_path, KEY, must_not_wait) as lease:
        os.set_inheritable(lease.descriptor, True)
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.readline()"],
            stdin=subprocess.PIPE,
            pass_fds=(lease.descriptor,),
        )
        (tmp_path / f"{KEY}.lease").rename(tmp_path / "kept")
        lease.end = lambda: None  # the owner dies without giving anything back
        (tmp_path / KEY).rename(tmp_path / "lock")
    (tmp_path / "lock").rename(tmp_path / KEY)
    (tmp_path / "kept").rename(tmp_path / f"{KEY}.lease")
    descriptor, free = leases._flock(tmp_path / KEY)
    os.close(descriptor)
    assert not free
    child.communicate(b"\n")
    with leases.hold(tmp_path, KEY, must_not_wait):
        pass


def test_an_owner_that_lost_its_lease_finds_out_and_stops(tmp_path, quick):
    stopped = threading.Event()
    with leases.hold(tmp_path, KEY, must_not_wait) as lease:
        lease.on_loss = stopped.set
        other = {"owner": "another", "machine": "another machine", "pid": 1, "since": 0}
        aside = tmp_path / "aside"
        aside.write_text(json.dumps(other))
        aside.replace(tmp_path / f"{KEY}.lease")
        with pytest.raises(Interrupted, match="taken this action over"):
            lease.check()
        assert stopped.wait(10)
        assert lease.lost.is_set()
    assert (
        json.loads((tmp_path / f"{KEY}.lease").read_text()) == other
    )  # not given back for another


def test_the_heartbeat_does_not_depend_on_the_clock(tmp_path, quick, monkeypatch):
    with leases.hold(tmp_path, KEY, must_not_wait):
        lease = tmp_path / f"{KEY}.lease"
        monkeypatch.setattr(time, "time", lambda: 0.0)  # jumps back by fifty years
        seen = {lease.stat().st_mtime_ns}
        deadline = time.monotonic() + 10
        while len(seen) < 4 and time.monotonic() < deadline:
            seen.add(lease.stat().st_mtime_ns)
        assert len(seen) == 4
        assert sorted(seen)[1:] == [min(seen) + beat * 1_000_000_000 for beat in (1, 2, 3)]


@pytest.mark.parametrize("content", ["", "{", '{"no": "owner"}', "[]"])
def test_a_half_written_lease_is_waited_out(tmp_path, quick, content):
    (tmp_path / f"{KEY}.lease").write_text(content)
    with leases.hold(tmp_path, KEY, lambda: None) as lease:
        lease.check()


def test_a_filesystem_without_links_and_locks_will_do(tmp_path, quick, monkeypatch):
    def no_links(*_paths: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(leases, "_flock", lambda path: (None, True))
    dead = {"owner": "x", "machine": leases.machine(), "pid": 2**22 + 1, "since": 0}
    (tmp_path / f"{KEY}.lease").write_text(json.dumps(dead))
    with leases.hold(tmp_path, KEY, must_not_wait) as lease:
        lease.check()
        assert list(leases.living(tmp_path)) == [KEY]
    assert not list(tmp_path.iterdir())


def test_removing_a_dead_lease_puts_a_living_one_back(tmp_path):
    path = tmp_path / f"{KEY}.lease"
    path.write_text(json.dumps({"owner": "faster"}))
    assert not leases._remove(path, tmp_path / "aside", "dead")
    assert json.loads(path.read_text()) == {"owner": "faster"}
    assert leases._remove(path, tmp_path / "aside", "faster")
    assert not list(tmp_path.iterdir())


# Each worker counts in a file without any lock of its own: two at once would lose a count.
WORKER = """
import sys
from pathlib import Path
from snakegpt.store import leases
folder, key, place, rounds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
if place != "here":
    leases.machine = lambda: place
    leases._flock = lambda path: (None, True)
leases.POLL_S = (0.001, 0.01)
counter = folder.parent / "counter"
for _ in range(rounds):
    with leases.hold(folder, key, lambda: None) as lease:
        before = int(counter.read_text())
        lease.check()
        counter.write_text(str(before + 1))
"""


@pytest.mark.parametrize("places", [("here", "here", "here"), ("one", "two", "three")])
def test_many_workers_take_turns(tmp_path, places):
    folder = tmp_path / "locks"
    folder.mkdir()
    (tmp_path / "counter").write_text("0")
    rounds = 50
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, folder, KEY, place, str(rounds)])
        for place in places
    ]
    assert [worker.wait(60) for worker in workers] == [0] * len(places)
    assert int((tmp_path / "counter").read_text()) == rounds * len(places)


def test_workers_killed_at_random_times_leave_no_lease_behind(tmp_path):
    folder = tmp_path / "locks"
    folder.mkdir()
    (tmp_path / "counter").write_text("0")
    for index in range(10):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, folder, KEY, "here", "1000000"])
        time.sleep(0.1 + 0.013 * index)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        (tmp_path / "counter").write_text("0")
        with leases.hold(folder, KEY, must_not_wait):
            pass
