"""One process runs an action at a time, on any number of machines that share the store.

    locks/<key>        flock of the process that runs it, inherited by the stage: settles one machine
    locks/<key>.lease  who runs it, JSON; its modification time is the owner's heartbeat

The lease is made by link(2), which is atomic on NFS too, where flock alone is not to be relied on.
No clocks are compared: a waiting process watches the heartbeat against its own monotonic clock. An
owner on this machine whose flock is free is dead at once; one elsewhere after DEAD_AFTER_S in silence.
An owner that was declared dead and is not (a suspended machine) finds the lease to be another's: it
stops its stage and publishes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snakegpt.errors import Interrupted

BEAT_S = 15.0
DEAD_AFTER_S = 120.0  # NFS may show a modification time that is a minute old
POLL_S = (0.05, 1.0)  # first and longest pause of a waiting process

# What a filesystem without locks says.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lease:
    """The right to run an action, while it lasts.

    descriptor  of the flock: a child that inherits it keeps the claim alive; None without flock
    """

    def __init__(self, path: Path, owner: str, descriptor: int | None) -> None:
        self.path, self.owner, self.descriptor = path, owner, descriptor
        self.lost = threading.Event()
        self.on_loss: Callable[[], object] = lambda: None
        self._ended = threading.Event()
        self._file = os.open(path, os.O_RDONLY)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Called before anything is published.

        raises   Interrupted if another process has taken the action over
        """
        if not self._is_mine():
            self.lost.set()
            raise Interrupted(
                "another process has taken this action over, nothing is published;"
                " run the same command again to take its result"
            )

    def _is_mine(self) -> bool:
        found = _read(self.path)
        return found is not None and found.get("owner") == self.owner

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            if not self._is_mine():
                self.lost.set()
                self.on_loss()
                return
            # Of the file that this process made, never of another's in its place.
            found = os.fstat(self._file)
            with contextlib.suppress(OSError):  # a full or read-only moment; the next beat may do
                os.utime(self._file, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))

    def end(self) -> None:
        """Give the lease back, if it still is this process's."""
        self._ended.set()
        self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)
        os.close(self._file)


@contextlib.contextmanager
def hold(folder: Path, key: str, waiting: Callable[[], object]) -> Iterator[Lease]:
    """Wait for the right to run an action and hold it.

    waiting  called once if another process holds it
    """
    told, pause = False, POLL_S[0]
    observer = _Observer()
    while True:
        descriptor, free = _flock(folder / key)
        try:
            if free:
                lease = _take(folder / f"{key}.lease", descriptor, observer)
                if lease:
                    break
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
        if not told:
            told = True
            waiting()
        time.sleep(pause)
        pause = min(2 * pause, POLL_S[1])
    try:
        yield lease
    finally:
        lease.end()
        if descriptor is not None:
            # While it is locked: whoever opened this file before finds that it is not the one any more.
            (folder / key).unlink(missing_ok=True)
        _close(descriptor)


def living(folder: Path) -> dict[str, float]:
    """Keys that have a lease, dead owners' included, and when it was made (seconds since the epoch)."""
    found = {}
    for path in folder.glob("*.lease"):
        content = _read(path)
        if content:
            found[path.name.removesuffix(".lease")] = float(content.get("since", 0.0))
    return found


def abandoned(folder: Path) -> set[str]:
    """Keys whose lock or lease is left from a process of this machine that is dead. Changes nothing."""
    names = {path.name for path in folder.glob("*") if not path.name.startswith(".")}
    return {
        key
        for key in {name.removesuffix(".lease") for name in names}
        if _is_abandoned(folder / key, _read(folder / f"{key}.lease"))
    }


def _is_abandoned(lock: Path, content: dict[str, Any] | None) -> bool:
    if content and content.get("machine") != machine():
        return False
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Without a lock to ask, the process table says it; a lock that is held says no.
        silent = error.errno in (errno.ENOENT, *_NO_LOCKS)
        return silent and content is not None and not _runs(content.get("pid"))
    return True


@contextlib.contextmanager
def attempt(folder: Path, key: str) -> Iterator[bool]:
    """Hold the right to run an action if it is free, a dead owner's included; yields whether it was."""

    class Busy(Exception):
        pass

    def busy() -> None:
        raise Busy

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(folder, key, busy))
            free = True
        except (Busy, OSError):
            free = False
        yield free


class _Observer:
    """Whether the owner of a lease gave a sign of life lately, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] = ()
        self._since = time.monotonic()

    def is_dead(self, path: Path, owner: Any) -> bool:
        try:
            sign = (owner, path.stat().st_mtime_ns)
        except FileNotFoundError:  # given back this moment
            return False
        if sign != self._seen:
            self._seen, self._since = sign, time.monotonic()
        return time.monotonic() - self._since > DEAD_AFTER_S


def _take(path: Path, descriptor: int | None, observer: _Observer) -> Lease | None:
    """Make the lease, or declare its owner dead and make it, or None: wait."""
    owner = uuid.uuid4().hex
    # A time for people and for `gc`; nothing here compares it.
    content = {"owner": owner, "pid": os.getpid(), "machine": machine(), "since": time.time()}
    # Who holds the flock is alone on this machine, so that what a kill leaves aside is used again.
    aside = path.with_name(f".{path.name}.{owner if descriptor is None else _short(machine())}")
    if _create(path, aside, json.dumps(content)):
        return Lease(path, owner, descriptor)
    found = _read(path)
    if found is None:  # given back meanwhile, or half-written by a filesystem without links
        dead = observer.is_dead(path, None)
    elif found.get("machine") == machine():
        # With flock its being free says so; without, the process table does.
        dead = descriptor is not None or not _runs(found.get("pid"))
    else:
        dead = observer.is_dead(path, found.get("owner"))
    gone = dead and _remove(path, aside, found and found.get("owner"))
    if gone and _create(path, aside, json.dumps(content)):
        return Lease(path, owner, descriptor)
    return None


def _create(path: Path, aside: Path, content: str) -> bool:
    aside.unlink(missing_ok=True)
    try:
        aside.write_text(content, encoding="utf-8")
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError:
            # NFS may say no to a link that it made, and some filesystems have none.
            if aside.stat().st_nlink == 2:
                return True
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True
    finally:
        aside.unlink(missing_ok=True)


def _remove(path: Path, aside: Path, owner: Any) -> bool:
    """Take a dead owner's lease away, and no other: somebody may have been faster."""
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    found = _read(aside)
    mine = (found and found.get("owner")) == owner
    if not mine:
        with contextlib.suppress(OSError):
            os.link(aside, path)  # a living one: put it back; if that fails its owner finds out
    aside.unlink(missing_ok=True)
    return mine


def _flock(path: Path) -> tuple[int | None, bool]:
    """(descriptor of the lock, whether it is ours); without flock (None, True)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return descriptor, False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None, True
            raise
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, True
        except FileNotFoundError:
            pass
        os.close(descriptor)  # removed by the last owner between our open and our lock


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _runs(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@functools.cache
def machine() -> str:
    """What tells this running system from any other: name, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
