"""A store that several machines share, at an fsspec URL: asked on a miss, given what was made.

Laid out like a local one (objects/ab/ab12..., actions/cd/cd34....json). Objects travel first and the
record last, so what is cut off at any point is a miss that the next pull or push continues. Nothing
counts before its bytes have been hashed here. A remote that fails costs a run one warning, never
the run: it goes on without for some minutes.

Plain folders (and what else fsspec has) get files beside and by rename. Object stores, whose puts are
atomic, are reached through obstore: one client for S3, Google and Azure, with one way to say how long
to wait, which takes credentials and endpoint from the environment (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY, ...).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from snakegpt.artefacts import HashedFile
from snakegpt.durable import sync
from snakegpt.identity import file_digest
from snakegpt.progress import Progress, say
from snakegpt.store.arrivals import Unfit, check_listings, listings, record_from
from snakegpt.store.objects import Store

THREADS = 4  # objects that travel at once
CHUNK_BYTES = 1 << 23  # asked for at once, and so what a broken connection costs
CONNECT_S = 3.0
ANSWER_S = 15.0  # silence that a reader bears; a writer waits for its own bytes to leave as well
SENT_S = 120.0
REQUEST_S = 86400.0  # of a request as a whole, however slow the line
RETRIES_S = 5.0  # a request that failed is not tried again after that
OFF_S = 300.0  # a run goes on without a remote that failed

Item = TypeVar("Item")


class RemoteError(Exception):
    """The remote store cannot be reached or refuses; the message is the reason."""


class Remote:
    """What a store does with its remote.

    raises   RemoteError if it fails, Unfit if what it has is damaged; `try_pull` and `try_push` warn
             instead
    """

    def __init__(self, store: Store, url: str) -> None:
        self.store, self.url = store, url
        self._unfit: set[str] = set()  # names found to be damaged there: a push replaces them
        self._stopped = threading.Event()

    # ---- for the runner ----

    def try_pull(self, key: str, label: str) -> dict[str, Any] | None:
        """The record of an action that is whole in the store now, or None."""
        if self._is_off("read"):
            return None
        try:
            record = self.pull(key, label)
            if record:
                say(f"{label}  pulled from {self.url}")
            return record
        except Unfit as error:
            say(f"warning: {label} is not taken from the remote store {self.url}: {error}")
        except RemoteError as error:
            self._turn_off("read", error)
        except OSError as error:  # of this machine's store: the stage may still find its way
            say(f"warning: {label} cannot be taken from the remote store: {error}")
        return None

    def try_push(self, record: dict[str, Any], label: str) -> None:
        """Give away what a finished action made."""
        if self._is_off("read", "written"):
            return
        try:
            self.push(record, label)
        except (Unfit, OSError) as error:
            say(f"warning: {label} is not given to the remote store {self.url}: {error}")
        except RemoteError as error:
            self._turn_off("written", error)

    # One process of a run warns for all of them: they share the store, where it leaves a mark.

    def _mark(self, how: str) -> Path:
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return self.store.root / "tmp" / f"remote-{name}-not-{how}"

    def _is_off(self, *hows: str) -> bool:
        return any(_is_recent(self._mark(how)) for how in hows)

    def _turn_off(self, how: str, reason: RemoteError) -> None:
        mark = self._mark(how)
        with contextlib.suppress(OSError):
            if not _is_recent(mark):
                mark.unlink(missing_ok=True)
            try:
                mark.open("x").close()
            except FileExistsError:
                return
        say(
            f"warning: the remote store {self.url} cannot be {how}: {reason}\n"
            f"  runs go on without it and try again in {OFF_S / 60:.0f} minutes"
        )

    def turn_on(self) -> None:
        """Forget earlier failures: somebody asks by hand."""
        for how in ("read", "written"):
            self._mark(how).unlink(missing_ok=True)

    # ---- pulling ----

    def record_of(self, key: str) -> dict[str, Any] | None:
        """An action's record there, or None if it has none."""
        return self._record_at(_Place(self.url, ANSWER_S), key)

    def pull(self, key: str, label: str) -> dict[str, Any] | None:
        """Bring an action's objects and then its record; None if the remote does not have it."""
        place = _Place(self.url, ANSWER_S)
        record = self._record_at(place, key)
        if record is None:
            return None
        with self.store.claim(key, lambda: say(f"{label}  waits for another run of it")):
            found = self.store.look_up(key)  # what we waited for
            if found:
                return found
            parts = self.store.root / "tmp" / f"pull-{key}"  # a process that is killed leaves it
            parts.mkdir(parents=True, exist_ok=True)
            outputs = record["outputs"]
            self._fetch(place, listings(outputs), parts, label)
            check_listings(self.store, outputs)
            self._fetch(place, self.store.objects_of(outputs), parts, label)
            with contextlib.suppress(Unfit):  # nothing but explanation hangs on it
                self._fetch(place, _diff(record), parts, label)
            self.store.record(key, record)
            shutil.rmtree(parts, ignore_errors=True)
        return record

    def _record_at(self, place: _Place, key: str) -> dict[str, Any] | None:
        try:
            return record_from(place.read(_action_name(key)), key)
        except FileNotFoundError:
            return None
        except Unfit:
            self._unfit.add(key)
            raise

    def _fetch(
        self, place: _Place, objects: Iterable[tuple[str, int]], parts: Path, label: str
    ) -> None:
        missing = {pair for pair in objects if not self.store.holds(*pair)}
        meter = _Meter(f"{label}  is pulled", sum(n_bytes for _, n_bytes in missing))

        def fetch(pair: tuple[str, int]) -> None:
            sha256, n_bytes = pair
            part = parts / sha256
            try:
                found = self._download(place, part, sha256, n_bytes, meter)
            except Unfit:
                self._unfit.add(sha256)
                part.unlink(missing_ok=True)
                raise
            if found:
                self.store.take_in(part, sha256, n_bytes)

        self._each(fetch, missing)

    def _download(
        self, place: _Place, part: Path, sha256: str, n_bytes: int, meter: _Meter
    ) -> bool:
        """Fill a file with an object, behind what an earlier process left of it; False if stopped."""
        resumed = part.exists() and 0 < part.stat().st_size <= n_bytes
        with HashedFile(part, resumed=resumed) as file:
            meter.add(file.n_bytes)
            for chunk in place.chunks(_object_name(sha256), file.n_bytes, n_bytes):
                file.write(chunk)
                meter.add(len(chunk))
                if self._stopped.is_set():
                    return False
        if file.sha256 == sha256:
            return True
        meter.add(-n_bytes)
        if resumed:  # a crash of this machine may have spoiled what was left
            part.unlink()
            return self._download(place, part, sha256, n_bytes, meter)
        raise Unfit(f"object {sha256} has other bytes there, of sha256 {file.sha256}")

    # ---- pushing ----

    def push(self, record: dict[str, Any], label: str) -> bool:
        """Send what the remote does not have of an action: its objects, then its record.

        returns  False if the remote has the action already, with these outputs or others
        """
        key = record["key"]
        place = _Place(self.url, SENT_S)
        try:
            there = None if key in self._unfit else self._record_at(place, key)
        except Unfit:
            there = None
        if there and there["outputs"] != record["outputs"] and not self._unfit:
            return False  # the first one stands: what follows from it may be there
        diff = [pair for pair in _diff(record) if self.store.holds(*pair)]
        objects = {*self.store.objects_of(record["outputs"]), *diff}
        meter = _Meter(f"{label}  is pushed", sum(n_bytes for _, n_bytes in objects))

        def send(pair: tuple[str, int]) -> None:
            sha256, n_bytes = pair
            name = _object_name(sha256)
            if not self._stopped.is_set() and (
                sha256 in self._unfit or place.size(name) != n_bytes
            ):
                source = self.store.object_path(sha256)
                if not source.exists() or file_digest(source) != sha256:
                    raise Unfit(f"object {sha256} is damaged or gone here")
                place.put(source, name)
            meter.add(n_bytes)

        self._each(send, objects)
        if there is None or there["outputs"] != record["outputs"]:
            place.put(self.store.action_path(key), _action_name(key))
        return there is None

    def _each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """`work` of every item, a few at once; the first error stops the others at their next step."""
        self._stopped.clear()
        with ThreadPoolExecutor(THREADS) as pool:
            waiting = [pool.submit(work, item) for item in items]
            try:
                for done in as_completed(waiting):
                    done.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _Place:
    """Files at a URL.

    answer_s  how long a server may be silent
    raises    RemoteError for whatever goes wrong, FileNotFoundError where a reader finds no file
    """

    def __init__(self, url: str, answer_s: float) -> None:
        import fsspec  # a tenth of a second that a hit does not have

        protocol, _, rest = url.partition("://")
        with _failing():
            self.is_atomic = rest != "" and protocol in _object_stores()
            if self.is_atomic:
                self._files, self._root = _object_store(protocol, answer_s), rest.rstrip("/")
            else:
                self._files, self._root = fsspec.core.url_to_fs(url)
                # A share that is not mounted is no empty store.
                if not self._files.isdir(self._root):
                    raise RemoteError(f"there is no folder {self._root}; make it first")

    def read(self, name: str) -> bytes:
        with _failing():
            return bytes(self._files.cat_file(self._path(name)))

    def chunks(self, name: str, start: int, n_bytes: int) -> Iterator[bytes]:
        """The bytes of an object from `start` on.

        raises   Unfit if it is missing or shorter than `n_bytes`
        """
        while start < n_bytes:
            end = min(start + CHUNK_BYTES, n_bytes)
            try:
                with _failing():
                    chunk = self._files.cat_file(self._path(name), start=start, end=end)
            except (FileNotFoundError, RemoteError):
                # Some servers refuse to read behind the end, where others send nothing.
                if (self.size(name) or 0) >= n_bytes:
                    raise
                chunk = b""
            if not chunk:
                found = self.size(name)
                what = "is missing" if found is None else f"has {found:,} bytes, not {n_bytes:,},"
                raise Unfit(f"object {Path(name).name} {what} there")
            start += len(chunk)
            yield chunk

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        try:
            with _failing():
                return int(self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def put(self, source: Path, name: str) -> None:
        """Send a file, whole or not at all."""
        target = self._path(name)
        try:
            with _failing():
                if self.is_atomic:
                    self._files.put_file(str(source), target)
                    return
                aside = self._path(f"tmp/{uuid.uuid4().hex}")
                for path in (aside, target):
                    self._files.makedirs(os.path.dirname(path), exist_ok=True)
                try:
                    self._files.put_file(str(source), aside)
                    if getattr(self._files, "local_file", False):
                        os.chmod(aside, 0o444)
                        sync(Path(aside))
                    self._files.mv(aside, target)
                except BaseException:
                    with contextlib.suppress(Exception):
                        self._files.rm_file(aside)
                    raise
        except FileNotFoundError as error:  # no such bucket
            raise RemoteError(_reason(error)) from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _object_stores() -> set[str]:
    from obstore.fsspec import SUPPORTED_PROTOCOLS

    return SUPPORTED_PROTOCOLS - {"file", "memory"}


def _object_store(protocol: str, answer_s: float) -> Any:
    from obstore.fsspec import FsspecStore

    def seconds(number: float) -> datetime.timedelta:
        return datetime.timedelta(seconds=number)

    make: Any = FsspecStore  # its overloads want the protocol as a literal
    waits = {
        "connect_timeout": seconds(CONNECT_S),
        "read_timeout": seconds(answer_s),
        "timeout": seconds(REQUEST_S),
        "allow_http": True,  # where the endpoint says http://
    }
    retries = {"max_retries": 2, "retry_timeout": seconds(RETRIES_S)}
    return make(
        protocol,
        client_options=waits,
        retry_config=retries,
        skip_instance_cache=True,  # credentials are read when it is made
    )


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, RemoteError):
        raise
    except Exception as error:  # every client has its own, and none may end a run
        raise RemoteError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """One line without what servers repeat of a request; never a secret."""
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return "access is denied; check the credentials in the environment"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = (str(error) or type(error).__name__).splitlines()[0].partition(": <?xml")[0]
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return "there are no credentials in the environment"  # and this is no machine of the cloud
    return text if len(text) <= 300 else f"{text[:297]}..."


class _Meter:
    """Bytes that several threads moved."""

    def __init__(self, label: str, total: int) -> None:
        self._progress = Progress(label, total, "bytes")
        self._lock = threading.Lock()
        self._done = 0

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            if n_bytes > 0 and self._progress.total > CHUNK_BYTES:
                self._progress.update(self._done)


def _object_name(sha256: str) -> str:
    return f"objects/{sha256[:2]}/{sha256}"


def _action_name(key: str) -> str:
    return f"actions/{key[:2]}/{key}.json"


def _diff(record: dict[str, Any]) -> list[tuple[str, int]]:
    diff = record["provenance"].get("diff")
    return [(diff["sha256"], diff["bytes"])] if diff else []


def _is_recent(mark: Path) -> bool:
    try:
        return abs(time.time() - mark.stat().st_mtime) < OFF_S  # also after a jump of the clock
    except OSError:
        return False
