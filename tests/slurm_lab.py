"""A real Slurm of several nodes on this machine: each slurmd in a network namespace with a host name.

Debian's packages (slurm-wlm, munge), root, no systemd. Daemons are ended by the process ids they wrote.
One at a time on a machine: /etc/slurm/slurm.conf is where Snakemake's job step looks, since it drops
SLURM_CONF, and munge's default socket is where slurmctld does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from network_lab import Lab, ip
from network_lab import missing as missing_network

ETC = Path("/etc/slurm")
FILES = ("slurm.conf", "cgroup.conf", "gres.conf")
DAEMONS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "squeue", "scancel", "scontrol")


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    why = missing_network(*DAEMONS)
    if why is None and any((ETC / name).exists() for name in FILES):
        why = "this machine has a Slurm of its own"
    return why


CONFIGURATION = """\
ClusterName=snakegpt
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
MinJobAge=300
KillWait=30
SlurmdTimeout=30
NodeName=node[1-{n}] NodeAddr=10.77.0.[11-{last}] CPUs=16 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


class Slurm(Lab):
    """Nodes node1 to nodeN and a login host `ctl` that commands are run on.

    Partitions cpu, and urgent, whose jobs preempt those of cpu.
    """

    def __init__(self, n_nodes: int, folder: Path) -> None:
        super().__init__(n_nodes)
        self.folder = folder

    def __enter__(self) -> Slurm:
        super().__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        hub, folder, n = self.name(0), self.folder, self.n_nodes
        ip("-n", hub, "addr", "add", "10.77.0.1/24", "dev", "br0")
        for node in range(n + 1):
            with (Path("/etc/netns") / self.name(node) / "hosts").open("a") as hosts:
                hosts.write("10.77.0.1 ctl\n")
        for name in ("state", "run", "log", *(f"spool-node{k}" for k in range(1, n + 1))):
            (folder / name).mkdir(parents=True)
        text = CONFIGURATION.format(folder=folder, n=n, last=10 + n)
        (folder / "slurm.conf").write_text(text)
        # Otherwise slurmd looks for /sys/fs/cgroup, which `ip netns exec` hides.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Any device file passes for a GPU.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        ETC.mkdir(exist_ok=True)
        for name in FILES:
            (ETC / name).symlink_to(folder / name)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        Path("/run/munge").mkdir(exist_ok=True)
        run, log = folder / "run", folder / "log"
        subprocess.run(
            ["munged", "--force", f"--key-file={key}", f"--pid-file={run}/munged.pid",
             f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed"],
            check=True,
        )  # fmt: skip
        self.command(0, ["slurmctld", "-i"])
        for node in range(1, n + 1):
            self.command(node, ["slurmd", "-N", f"node{node}"])
        self.wait_for_nodes()

    def wait_for_nodes(self, limit_s: float = 60) -> None:
        """Until all nodes are idle."""
        deadline = time.monotonic() + limit_s
        states = ["sinfo", "-h", "-N", "-p", "cpu", "-o", "%T"]
        while self.command(0, states).split() != ["idle"] * self.n_nodes:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nodes are not idle: {self.command(0, ['sinfo', '-N'])}")
            time.sleep(0.1)

    def lose_node(self, node: int) -> None:
        """As when its power fails: it falls silent, without so much as closing a connection."""
        ip("-n", self.name(0), "link", "set", f"p0-{node}", "down")
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def freeze(self, node: int) -> None:
        """As when its kernel hangs: nothing on it moves, Slurm's daemons neither, and connections stay."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self, node: int) -> None:
        """Let a frozen node go on; slurmd ends what Slurm gave up meanwhile."""
        for pid in self.pids(node):
            os.kill(pid, signal.SIGCONT)
        self.wait_for_nodes(120)

    def bring_back(self, node: int) -> None:
        ip("-n", self.name(0), "link", "set", f"p0-{node}", "up")
        self.command(node, ["slurmd", "-N", f"node{node}"])
        self.wait_for_nodes()

    def __exit__(self, *failure: object) -> None:
        pid = self.folder / "run/munged.pid"  # the one daemon in no namespace
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGTERM)
        for name in FILES:
            link = ETC / name
            if link.is_symlink() and link.resolve().parent == self.folder.resolve():
                link.unlink()
        super().__exit__(*failure)
        shutil.rmtree(self.folder, ignore_errors=True)

    def host(self, node: int) -> str:
        return f"node{node}" if node else "ctl"

    def command(self, node: int, words: list[str], limit_s: float = 60) -> str:
        """What a command says on a node, 0 being the login host; its errors raise."""
        script = 'hostname "$0"; exec "$@"'
        inside = ["ip", "netns", "exec", self.name(node), "unshare", "--uts", "bash", "-c"]
        done = subprocess.run(
            [*inside, script, self.host(node), *words],
            capture_output=True, text=True, timeout=limit_s, env=clean_environment(),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout


def clean_environment() -> dict[str, str]:
    """No variables of a Slurm that this test itself may run in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
