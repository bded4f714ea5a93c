"""Several nodes: where this process stands among them, one agent a node, and the command that runs on each.

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

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from snakegpt.distributed import SAVE_TIMEOUT_S, choose_ranks
from snakegpt.errors import UserError
from snakegpt.outcomes import raise_outcome, read_outcome
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


ALONE = Place(0, 1, "127.0.0.1", 0)


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
            "  run it with --workflow-profile profiles/slurm; or by hand, the stage's command on every node with\n"
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
    found = read_outcome(outcome)
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
