"""Ranks under torchrun, which runs inside the calling process: one import of torch fewer than by its name.

`run_ranks` starts the ranks of this node, alone or together with those of other nodes; `launch` those of a
run on one machine, again and again as long as that helps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from snakegpt.distributed import SAVE_TIMEOUT_S
from snakegpt.durable import write_text_atomically
from snakegpt.errors import RETRY, USER_ERROR
from snakegpt.nodes import ALONE, SHARED_OUTCOME, Place
from snakegpt.outcomes import AGENT, OUTCOME, Outcome, read_outcome
from snakegpt.progress import count, say

START_TIMEOUT_S = 900.0  # torchrun's own
STOPPED = "stopped; the same command goes on from the last saved state, if there is one"


def run_ranks(
    module: str,
    arguments: list[str],
    place: Place = ALONE,
    *,
    ranks: int,
    threads: int,
    launch: int = 1,
    environment: Mapping[str, str] | None = None,
    logs: Path | None = None,
    share_outcome: bool = False,
    stop_timeout_s: float = SAVE_TIMEOUT_S,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Outcome:
    """Run `python -m module *arguments` once a rank of this node, together with those of the others.

    ranks           of this node, the same number on each
    threads         cores of this node to share out
    launch          number of this launch: each has a port of its own, so that none meets the one before
    environment     variables for the ranks alone; what is set already gives way to them
    logs            folder for what the ranks but 0 print, which prints here; None: they are not kept
    share_outcome   leave how the ranks ended to the one who called all nodes, if there is one
    stop_timeout_s  between the signal that asks ranks to save and leave, and SIGKILL
    start_timeout_s that nodes wait for one that does not come
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="snakegpt-") as scratch:
        outcome = Path(os.environ.get(SHARED_OUTCOME, "")) if share_outcome else Path()
        shared = outcome.parent.is_dir() and outcome.suffix == ".json"
        if not shared:
            outcome = Path(scratch) / "outcome.json"
        variables = {
            **(environment or {}),
            OUTCOME: str(outcome),
            AGENT: str(os.getpid()),
            "OMP_NUM_THREADS": str(max(1, threads // ranks)),
            # Every attempt is a rendezvous of its own, and its ranks have a store of their own: in one
            # that is shared they may read the address of a dead rank (pytorch #135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
        # Rank 0 talks; the others, which have nothing to say but errors, write to files.
        quiet = range(0 if place.node else 1, ranks)
        command = ["--standalone"]
        if place.nodes > 1:
            command = ["--nnodes", str(place.nodes), "--node-rank", str(place.node)]
            command += ["--master-addr", place.host, "--master-port", str(place.port + launch)]
            command += ["--rdzv-conf", f"timeout={math.ceil(start_timeout_s)}"]
        command += ["--nproc-per-node", str(ranks), "--max-restarts", "0"]
        command += ["--shutdown-timeout", str(math.ceil(stop_timeout_s))]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        command += ["--log-dir", str(logs or scratch)]
        if quiet:
            command += ["--redirects", ",".join(f"{rank}:3" for rank in quiet)]
        command += ["--module", module, *arguments]
        # The agent's own lines and traceback would bury what the ranks say, which follows in full.
        logging.disable(logging.CRITICAL)
        try:
            with _environment(variables):
                torchrun.main(command)
            return Outcome()
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            killed_by = next((-c for c in codes if c < 0 and -c != signal.SIGTERM), None)
            return replace(_ended(outcome, place, killed_by), shared=shared)
        except SignalException:
            # Asked to stop: nothing is started again, whatever else a rank met on its way out.
            found = read_outcome(outcome)
            status = USER_ERROR if found.get("status") == USER_ERROR else RETRY
            text = str(found.get("text", STOPPED))
            return Outcome(status, text, shared=shared and bool(found))
        except (OSError, RuntimeError) as error:  # torch.distributed's own errors are RuntimeErrors
            return Outcome(1, f"{_where(place)}: {_first_line(error)}")
        finally:
            logging.disable(logging.NOTSET)


def _ended(outcome: Path, place: Place, killed_by: int | None) -> Outcome:
    """What the ranks left, or what became of them where they could leave nothing."""
    found = read_outcome(outcome)
    rank = f"a rank on {_where(place)}" if place.nodes > 1 else "a rank"
    # A kill is the cause, and the errors of other ranks whose connections it closed are noise, but for
    # what a watchdog or a mistake in the settings ended them with.
    if killed_by is not None and not found.get("again") and found.get("status", 1) == 1:
        name = signal.Signals(killed_by).name
        why = " (by hand, or for lack of memory)" if name == "SIGKILL" else ""
        found = {"status": 1, "text": f"{rank} was killed by {name}{why}", "again": True}
        write_text_atomically(outcome, json.dumps(found))
    status, text = int(found.get("status", 1)), str(found.get("text", f"{rank} failed"))
    return Outcome(status, text, bool(found.get("again")))


def _where(place: Place) -> str:
    return f"node {place.node} ({socket.gethostname()})"


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables set while a block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def launch(
    module: str,
    arguments: list[str],
    *,
    restarts: int = 0,
    progress: Callable[[], int] = lambda: 0,
    **how: Any,
) -> None:
    """`run_ranks` on this machine alone, and again after an end that another attempt may not have.

    restarts  times that all ranks are started again after one has died ...
    progress  ... counted anew when this number, asked after each end, has grown
    how       as `run_ranks` takes it
    raises    UserError and Interrupted as the ranks raised them; SystemExit(1) if one failed or was
              killed, after saying why once
    """
    left, reached = restarts, progress()
    while True:
        ended = run_ranks(module, arguments, **how)
        if ended.status == RETRY and ended.again:
            say(f"{ended.text}; starts again")
            continue
        if ended.status in (0, RETRY, USER_ERROR):
            return ended.raise_for_status()
        now = progress()
        # An error where nothing was reached since the start would only come again.
        left = restarts if now > reached else left * ended.again
        if not left:
            raise SystemExit(
                f"error: {ended.text}\n  the same command resumes from the last saved state"
            )
        left, reached = left - 1, now
        say(f"error: {ended.text}\n  starts again from the last saved state")


# ---- what the network's measurement advises ----


def network_environment(network: Mapping[str, Any]) -> dict[str, str]:
    """The launch variables that bench_network recommends here, as far as they are about the network."""
    prefixes = ("GLOO_", "NCCL_", "TORCH_NCCL_")
    by_host = network.get("environment_by_host") or {}
    found = {**(network.get("environment") or {}), **by_host.get(socket.gethostname(), {})}
    return {name: str(value) for name, value in found.items() if name.startswith(prefixes)}


def advised_environment(network: Path | None, nodes: int, *, label: str) -> dict[str, str]:
    """The launch variables of network.json for this host, said in the log; what the caller set wins.

    A measurement of another number of nodes says nothing about these: the interface that leads from one
    node to itself leads to no other.
    """
    if network is None or not network.exists():
        return {}
    measured = json.loads(network.read_text(encoding="utf-8"))
    n_measured = max(1, len(measured.get("nodes") or ()))
    if n_measured != nodes:
        say(
            f"{label}  {network} was measured on {count(n_measured, 'node')}, this is"
            f" {count(nodes, 'node')}: its advice is left aside"
        )
        return {}
    found = network_environment(measured)
    here = psutil.net_if_addrs()
    absent = [n for n, v in found.items() if n.endswith("_IFNAME") and v.lstrip("=") not in here]
    if absent:
        hosts = ", ".join(node.get("host", "?") for node in measured.get("nodes") or ())
        say(
            f"{label}  {network} was measured on {hosts}; {socket.gethostname()} has no interface"
            f" {found[absent[0]].lstrip('=')}: its advice is left aside"
        )
        return {}
    if found:
        taken = {n: v for n, v in found.items() if n not in os.environ}
        left = [f"{n}={os.environ[n]} of the environment wins" for n in found if n not in taken]
        words = [*(f"{n}={v}" for n, v in taken.items()), *left]
        say(f"{label}  launches with {', '.join(words)} ({network})")
        return taken
    return {}
