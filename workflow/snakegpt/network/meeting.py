"""Nodes meet at node 0, tell each other what they found and wait for each other, never for ever.

By torch's TCPStore, which is there wherever training is. Whoever does not come or does not answer is named.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from snakegpt.errors import UserError
from snakegpt.nodes import Place

Value = TypeVar("Value")

POLL_S = 0.02
FAILED = "failed"


class Meeting:
    """This node's view of a meeting of all of them. A meeting of one needs no network.

    wait_s  how long a node that does not come or does not answer is waited for
    """

    def __init__(self, place: Place, wait_s: float = 60.0) -> None:
        self.place, self.wait_s = place, wait_s
        self.names = [f"node {k}" for k in range(place.nodes)]
        self._silent = False  # node 0, which then is not asked again
        self._store = self._open() if place.nodes > 1 else None
        self.names = [
            f"node {k} ({name})" for k, name in enumerate(self.share("name", socket.gethostname()))
        ]

    def _open(self) -> TCPStore:
        place = self.place
        if not place.leads:
            require_reachable(place.host, place.port, self.wait_s)
        limit = datetime.timedelta(seconds=self.wait_s)
        try:
            return self._ask(
                lambda: TCPStore(
                    "127.0.0.1" if place.leads else place.host,
                    place.port,
                    world_size=place.nodes,
                    is_master=place.leads,
                    timeout=limit,
                    wait_for_workers=False,
                )
            )
        except RuntimeError as error:
            raise UserError(
                f"node {place.node} cannot open the meeting at {place.host}:{place.port}:"
                f" {str(error).splitlines()[0]}\n  choose another port in SNAKEGPT_RENDEZVOUS"
            ) from None

    def share(self, name: str, value: Value, *, wait_s: float | None = None) -> list[Value]:
        """Tell all nodes a JSON value under a name of its own; returns all nodes' values.

        raises   UserError that names the nodes which did not answer in time, or says what failed there
        """
        if self._store is None:
            return [value]
        self.tell(f"{name}/{self.place.node}", value)
        keys = [f"{name}/{k}" for k in range(self.place.nodes)]
        self.wait_for(keys, wait_s=wait_s)
        return [json.loads(self._get(key)) for key in keys]

    def tell(self, key: str, value: Any = None) -> None:
        if self._store:
            with self._reaching():
                self._set(key, value)

    def close(self) -> None:
        """The last thing of a node: node 0, with whom the store ends, waits for all others' last."""
        self.tell(f"done/{self.place.node}")
        if self._store and self.place.leads:
            self.wait_for([f"done/{k}" for k in range(self.place.nodes)])

    def wait_for(self, keys: list[str], *, wait_s: float | None = None) -> None:
        """Wait until all keys are told; the last word of a key says which node tells it."""
        limit_s = self.wait_s if wait_s is None else wait_s
        deadline = time.monotonic() + limit_s
        waiting = list(keys)
        with self._reaching():
            while waiting := [key for key in waiting if not self._is_told(key)]:
                if self._is_told(FAILED):
                    raise UserError(json.loads(self._get(FAILED)))
                if time.monotonic() > deadline:
                    silent = [self.names[int(key.rsplit("/", 1)[1])] for key in waiting]
                    what = waiting[0].split("/")[0]
                    raise UserError(
                        f"no answer from {', '.join(silent)} within {limit_s:.0f} s ({what}).\n"
                        "  is the command running there, with the same rendezvous? does the node hang?"
                    )
                time.sleep(POLL_S)

    def _is_told(self, key: str) -> bool:
        assert self._store
        store = self._store
        return self._ask(lambda: store.check([key]))

    def _get(self, key: str) -> bytes:
        assert self._store
        store = self._store
        with self._reaching():
            return self._ask(lambda: store.get(key))

    def _set(self, key: str, value: Any) -> None:
        assert self._store
        store = self._store
        self._ask(lambda: store.set(key, json.dumps(value)))

    def _ask(self, question: Callable[[], Value]) -> Value:
        """The answer of node 0's store, in bounded time.

        torch (2.13) waits for ever for a store whose process stands still: its host goes on accepting
        connections. So another thread asks, and stays behind if there is no answer.
        """
        if self.place.leads:
            return question()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except BaseException as error:
                answers.put((None, error))

        if not self._silent:
            threading.Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=0 if self._silent else self.wait_s)
        except queue.Empty:
            self._silent = True  # whoever asks again waits for the question before
            raise UserError(
                f"no answer from {self.names[0]} within {self.wait_s:.0f} s, though its host accepts"
                f" connections at {self.place.host}:{self.place.port}.\n"
                "  does the command hang there, or is this the port of something else?"
            ) from None
        if error:
            raise error
        return cast(Value, answer)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's: the connection is gone
            raise UserError(
                f"{self.names[0]} is gone from the meeting: {str(error).splitlines()[0]}"
            ) from None

    def fail(self, text: str) -> None:
        """Let all nodes end with this error instead of waiting for one that will not answer."""
        if self._store and not self._silent:
            with contextlib.suppress(RuntimeError, UserError):  # node 0 ended before, or hangs
                self._set(FAILED, text)
                time.sleep(10 * POLL_S if self.place.leads else 0)  # the store ends with node 0


@contextlib.contextmanager
def told_to_all(meeting: Meeting) -> Iterator[None]:
    """What ends this node ends the others, with the same words, instead of leaving them waiting."""
    try:
        yield
        meeting.close()
    except UserError as error:
        meeting.fail(str(error))
        raise
    except BaseException as error:
        meeting.fail(f"{meeting.names[meeting.place.node]} failed: {type(error).__name__}: {error}")
        raise


def require_reachable(host: str, port: int, wait_s: float) -> None:
    """Wait until something listens at an address.

    raises   UserError that tells a name that does not resolve, a missing route, a port that nothing
             listens on, and one that swallows packets apart
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        raise UserError(
            f"rendezvous host {host} does not resolve: {error.strerror or error}.\n"
            "  name node 0 as this node reaches it, or give its address"
        ) from None
    deadline = time.monotonic() + wait_s
    where = f"{host}:{port}" + (f" ({address[0]})" if address[0] != host else "")
    while True:
        try:
            left_s = max(deadline - time.monotonic(), POLL_S)
            with socket.create_connection((str(address[0]), port), timeout=min(left_s, 5.0)):
                return
        except TimeoutError:
            reason = (
                f"{where} does not answer: a firewall that drops packets, or a host that is down"
            )
        except ConnectionRefusedError:
            reason = f"nothing listens at {where}: node 0 is not there yet, or the port is blocked"
        except OSError as error:
            raise UserError(
                f"no route leads to {where}: {error.strerror}.\n"
                "  give an address of node 0 in a network that this node is in"
            ) from None
        if time.monotonic() >= deadline:
            raise UserError(f"{reason} (waited {wait_s:.0f} s).")
        time.sleep(0.1)
