"""Several nodes: where this process stands among them, one agent a node, and the ranks under each.

A stage that finds `nodes` above one in its execution settings is the first of three kinds of process:

    stage       in the rule's shell, on one node; calls `on_every_node`
    node agent  the same command on every node, told its place by two variables; calls `run_ranks`
    rank        the same command under torchrun, with torchrun's own variables

The variables are all that a scheduler has to give, so the same works by srun, by hand on any hosts, and
in a Kubernetes Indexed Job:

    SNAKEGPT_NODE=1/3                      this node's number, from 0, and how many there are
    SNAKEGPT_RENDEZVOUS=10.0.0.1:29500     node 0 as the others reach it, and the first of some free ports

Node 0 is always where rank 0 runs: torchrun's static rendezvous, where its c10d one would number nodes as
they arrive.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from snakegpt.distributed import (
    AGENT,
    OUTCOME,
    SAVE_TIMEOUT_S,
    STOPPED_EARLY,
    choose_ranks,
    network_environment,
)
from snakegpt.durable import write_text_atomically
from snakegpt.errors import RETRY, USER_ERROR, Interrupted, UserError
from snakegpt.progress import count, say
from snakegpt.settings import Execution

NODE = "SNAKEGPT_NODE"
RENDEZVOUS = "SNAKEGPT_RENDEZVOUS"
SHARED_OUTCOME = (
    "SNAKEGPT_SHARED_OUTCOME"  # set for node agents: a file that the one who called reads
)
# Jobs that share a node must not share ports, so these follow from the job's number; below 32,768, from
# where on Linux gives ports to clients.
FIRST_PORT, PORTS, PORTS_PER_JOB = 20_000, 12_000, 20
# What a node may take, beyond the time to save, to end after another one has.
MARGIN_S = 60
START_TIMEOUT_S = 900.0  # torchrun's own
# Of a job's ports: the first is the nodes' own meeting, then come torchrun's, then those of measurements.
MEASURING_PORT = 10


@dataclass(frozen=True)
class Place:
    """Where a process stands among the nodes of a run."""

    node: int
    nodes: int
    host: str
    port: int

    @property
    def leads(self) -> bool:
        return self.node == 0


def place_of(environment: Mapping[str, str]) -> Place | None:
    """This node's place from its two variables; None where nobody set them.

    raises   UserError if they are malformed or only one is set
    """
    node, rendezvous = environment.get(NODE), environment.get(RENDEZVOUS)
    if node is None and rendezvous is None:
        return None
    where = f"{NODE}={node} {RENDEZVOUS}={rendezvous}"
    try:
        number, count = (int(word) for word in str(node).split("/"))
        host, _, port = str(rendezvous).rpartition(":")
        place = Place(number, count, host.strip("[]"), int(port))
    except ValueError:
        place = None
    if place is None or not place.host or not 0 <= place.node < place.nodes:
        raise UserError(
            f"{where} says no place among nodes.\n"
            f"  wanted on each node: {NODE}=NUMBER/NODES, from 0, and {RENDEZVOUS}=HOST:PORT of node 0"
        )
    return place


def on_every_node(
    module: str,
    arguments: list[str],
    *,
    nodes: int,
    threads: int,
    shared: Path,
    stop_timeout_s: float = SAVE_TIMEOUT_S,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Run `python -m module *arguments` once on every node of this Slurm job, to the end of all.

    threads         cores of each node
    shared          folder that all nodes see, for the ranks' logs and the first failure
    stop_timeout_s  that ranks have to save; a node that has not ended a minute later than that, counted
                    from the end of the first one, hangs: Slurm ends it, and it is named
    raises          UserError and Interrupted as a rank raised them, and UserError where there is no Slurm
                    job of as many nodes; SystemExit(1) if a node failed
    """
    job = environment.get("SLURM_JOB_ID")
    srun = shutil.which("srun")
    if job is None or srun is None:
        missing = "srun is not installed here" if srun is None else "this is no Slurm job"
        raise UserError(
            f"execution.nodes = {nodes}, but {missing}.\n"
            "  run it with --profile profiles/slurm; or by hand, the stage's command on every node with\n"
            f"  {NODE}=0/{nodes} (1/{nodes}, ...) and {RENDEZVOUS}=HOST:PORT of node 0; or set nodes to 1"
        )
    allocated = _allocated_nodes(job)
    if allocated < nodes:
        raise UserError(
            f"execution.nodes = {nodes}, but Slurm job {job} has {allocated}.\n"
            "  the profile asks for them: profiles/slurm; or set execution.nodes to what there is"
        )
    shared.mkdir(parents=True, exist_ok=True)
    outcome = shared / "outcome.json"
    for old in (outcome, *shared.glob("*.running")):
        old.unlink(missing_ok=True)
    port = FIRST_PORT + int(job) * PORTS_PER_JOB % PORTS
    # SLURM_LAUNCH_NODE_IPADDR is the address of the node that srun runs on as Slurm reaches it, which a
    # Debian host's own name (127.0.1.1 in /etc/hosts) is not.
    inner = (
        f'export {NODE}="$SLURM_NODEID/{nodes}" {RENDEZVOUS}="$SLURM_LAUNCH_NODE_IPADDR:{port}"\n'
        # A file that says its name stays of a node that never ended. Signals, which Slurm sends to all
        # processes, are the command's; the trap keeps this shell until it has ended.
        f"running={shlex.quote(str(shared.absolute()))}/$SLURM_NODEID.running; trap : TERM USR1\n"
        'echo "$SLURMD_NODENAME" > "$running"; "$@"; status=$?; rm -f "$running"; exit $status'
    )
    command = [srun, f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    # Slurm 22.05 and newer pass no --cpus-per-task on from the job. A node that ends badly must not have
    # the others killed before they have saved: --kill-on-bad-exit=0, torchrun ends them.
    command += [f"--cpus-per-task={threads}", "--kill-on-bad-exit=0"]
    command += [f"--wait={round(stop_timeout_s) + MARGIN_S}", "bash", "-c", inner, "bash"]
    command += [sys.executable, "-m", module, *arguments]
    # Unless asked for, none of c10d's warnings that it cannot look a client's address up.
    variables = {"TORCH_CPP_LOG_LEVEL": "ERROR", **environment, SHARED_OUTCOME: str(outcome)}
    # srun must end last, so this process outlives the signals that Slurm sends to the steps' processes.
    previous = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        status = subprocess.run(command, env=variables).returncode
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not status:
        return
    found = _read(outcome)
    silent = [file.read_text(encoding="utf-8").strip() for file in shared.glob("*.running")]
    if not found and not silent:  # no rank failed, or nodes share no filesystem: they have said it
        raise SystemExit(status)
    more = [f"what each rank printed: {shared}"]
    if silent:
        more.insert(0, f"never ended: {', '.join(sorted(silent))}, which hangs or is gone")
    raise_outcome(found, status, "\n  ".join(more))


def _allocated_nodes(job: str) -> int:
    """Nodes of a Slurm job. Snakemake's jobstep plugin drops SLURM_NNODES, so squeue is asked."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%D"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        raise UserError(
            f"squeue does not say how many nodes Slurm job {job} has: is the controller down?"
        ) from None


def choose_ranks_per_node(
    execution: Execution, *, nodes: int, device: str, rows: int, threads: int
) -> int:
    """Ranks of this node, of some nodes whose ranks share the rows of a step.

    raises   UserError if the rows cannot be shared out, or this node lacks the GPUs
    """
    if nodes == 1:
        return choose_ranks(execution.ranks, device=device, rows=rows, threads=threads)
    where = socket.gethostname()
    if execution.ranks != "auto":
        raise UserError(
            f"execution.ranks = {execution.ranks} counts the ranks of one machine, and"
            f" execution.nodes = {nodes}.\n  leave ranks at auto and set execution.ranks_per_node"
        )
    if rows % nodes:
        raise UserError(
            f"the {rows:,} rows of a step (training.batch_tokens / model.context) cannot be shared by"
            f" {nodes} nodes.\n  choose a number of nodes that divides them, or other batch_tokens"
        )
    wanted = execution.ranks_per_node
    gpus = torch.cuda.device_count() if device == "cuda" else None
    if wanted != "auto" and gpus is not None and wanted > gpus:
        raise UserError(
            f"execution.ranks_per_node = {wanted}, but node {where} has {gpus} CUDA devices.\n"
            "  set it to what every node has, or to auto; the profile's gres says what Slurm gives"
        )
    if wanted != "auto" and rows // nodes % wanted:
        raise UserError(
            f"execution.ranks_per_node = {wanted} does not divide the {rows // nodes:,} rows that each of"
            f" {nodes} nodes has in a step (training.batch_tokens / model.context / nodes)."
        )
    return choose_ranks(wanted, device=device, rows=rows // nodes, threads=threads)


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this node ended: status 0, or why not, in words."""

    status: int = 0
    text: str = ""
    shared: bool = False  # it also stands where the one who called all nodes finds it

    def raise_for_status(self) -> None:
        """Nothing if all went well, else the exception that says why not, unless another will say it."""
        if not self.status:
            return
        if self.shared:
            raise SystemExit(self.status)
        raise_outcome({"status": self.status, "text": self.text}, self.status)


def run_ranks(
    module: str,
    arguments: list[str],
    place: Place,
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
            # Without it a restarted group may read the addresses of the dead one (pytorch #135712).
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
        command += ["--shutdown-timeout", str(round(stop_timeout_s))]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        command += ["--log-dir", str(logs or scratch)]
        if quiet:
            command += ["--redirects", ",".join(f"{rank}:3" for rank in quiet)]
        command += ["--module", module, *arguments]
        kept = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        # The agent's own lines and traceback would bury what the ranks say, which follows in full.
        logging.disable(logging.CRITICAL)
        try:
            torchrun.main(command)
            return Outcome()
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            killed_by = next((-c for c in codes if c < 0 and -c != signal.SIGTERM), None)
            return replace(_ended(outcome, place, killed_by), shared=shared)
        except SignalException:
            found = _read(outcome)
            return Outcome(RETRY, str(found.get("text") or STOPPED_EARLY), shared and bool(found))
        except (OSError, RuntimeError) as error:  # torch.distributed's own errors are RuntimeErrors
            return Outcome(1, f"node {place.node} ({socket.gethostname()}): {_first_line(error)}")
        finally:
            logging.disable(logging.NOTSET)
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _ended(outcome: Path, place: Place, killed_by: int | None) -> Outcome:
    found = _read(outcome)
    where = f"a rank on node {place.node} ({socket.gethostname()})"
    # A kill is the cause, and the errors of other ranks whose connections it closed are noise, but for
    # what a watchdog or a mistake in the settings ended them with.
    if killed_by is not None and not found.get("again") and found.get("status", 1) == 1:
        name = signal.Signals(killed_by).name
        why = " (by hand, or for lack of memory)" if name == "SIGKILL" else ""
        found = {"status": 1, "text": f"{where} was killed by {name}{why}"}
        write_text_atomically(outcome, json.dumps(found))
    return Outcome(int(found.get("status", 1)), str(found.get("text", f"{where} failed")))


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
    if found:
        taken = {n: v for n, v in found.items() if n not in os.environ}
        left = [f"{n}={os.environ[n]} of the environment wins" for n in found if n not in taken]
        words = [*(f"{n}={v}" for n, v in taken.items()), *left]
        say(f"{label}  launches with {', '.join(words)} ({network})")
        return taken
    return {}


def raise_outcome(found: Mapping[str, Any], status: int, more: str = "") -> None:
    """Turn how ranks ended into the exception that says so."""
    status, text = int(found.get("status", status)), str(found.get("text", ""))
    if status == USER_ERROR and text:
        raise UserError(text)
    if status == RETRY:
        raise Interrupted(text or STOPPED_EARLY)
    raise SystemExit("\n  ".join(filter(None, [f"error: {text or 'a node failed'}", more])))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read(outcome: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}
