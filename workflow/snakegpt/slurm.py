"""Ask Slurm whether it takes the jobs of a run, before the first one is submitted; and mend its plugin (2.8.0).

sbatch says no when a job's turn comes, hours into a run, and once more for every retry; some it takes and
lets wait for ever. Asked with --test-only it says no to both at once.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable
from typing import Any

from snakegpt.errors import UserError
from snakegpt.progress import say

ANSWER_S = 60.0  # Slurm's commands give up sooner by themselves, if they do at all
SILENCE = ("contact slurm controller", "Socket timed out")


def require_taken(jobs: Iterable[Any], settings: Any) -> None:
    """Stop a run with a job that Slurm would refuse.

    jobs      Snakemake's, those for this machine left out
    settings  of its Slurm executor
    raises    UserError that says which rule asks for what, what there is, and what Slurm says
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not installed on {socket.gethostname()}, and executor: slurm wants it.\n"
            "  call snakemake on a login node of the cluster; without the profile all runs on this machine"
        )
    # Jobs of a rule ask alike, or as their experiment has them.
    kinds = {(job.rule.name, job.wildcards.get("experiment")): job for job in jobs}
    rules = {_asked_for(job, settings): rule for (rule, _), job in kinds.items()}
    for asked_for, rule in rules.items():
        done = _ask(f"sbatch --test-only --output=/dev/null {asked_for} --wrap=true")
        if not done.returncode:
            continue
        text = (
            f"Slurm refuses jobs of rule {rule}: {_one_line(done.stderr)}\n"
            f"  asked for: {asked_for}\n"
            f"  there is: {_sinfo('%P %D x %c CPUs, %m MB, %G')} (partition, nodes, each)\n"
        )
        down = _sinfo("%N", "--states=down,drain,fail,maint")
        if "not available" in done.stderr and down:  # --test-only does not count them
            say(f"warning: {text}  if that is for want of {down}, jobs will wait")
            continue
        raise UserError(
            f"{text}  change the profile (default-resources, set-resources), or execution.nodes"
        )


def keep_unanswered_jobs() -> None:
    """Let Snakemake ask again for jobs that Slurm said nothing of, as while its controller restarts.

    The plugin drops all jobs when its question fails, and Snakemake waits for ever.
    """
    from snakemake_executor_plugin_slurm import Executor

    check = Executor.check_active_jobs

    async def check_and_keep(self: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
        answers = self._status_query_calls
        async for job in check(self, active_jobs):
            yield job
        if active_jobs and self._status_query_calls == answers:
            say(f"warning: Slurm does not say how {len(active_jobs)} jobs are; it is asked again")
            for job in active_jobs:
                yield job

    Executor.check_active_jobs = check_and_keep


def retry_preempted_jobs() -> None:
    """Let Snakemake submit a job again that Slurm preempted and does not start again itself.

    The plugin takes PREEMPTED for a state that Slurm will end, and waits for ever. To squeue a job is
    preempted for good (PreemptMode=CANCEL): one that is requeued is pending at once.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status
    told: set[str] = set()

    async def query_ends(command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        states, took_s = await query(command, logger)
        for job, state in (states or {}).items():
            if state == "PREEMPTED" and command.startswith("squeue"):
                states[job] = "CANCELLED"
                if job not in told:
                    told.add(job)
                    say(f"warning: Slurm preempted job {job} and does not start it again")
        return states, took_s

    plugin.query_job_status = query_ends


def _asked_for(job: Any, settings: Any) -> str:
    """The options that the plugin would give sbatch, made by the plugin."""
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    words: dict[str, str] = {"run_uuid": "", "slurm_logfile": "", "comment_str": "", "workdir": ""}
    for option in ("account", "partition"):
        value = job.resources.get(f"slurm_{option}")
        words[option] = f"--{option}={shlex.quote(str(value))}" if value else ""
    call: str = get_submit_command(job, words, settings=settings) + set_gres_string(job)
    return call.partition("--comment ''")[2].strip()


def _sinfo(columns: str, *options: str) -> str:
    command = ["sinfo", "--noheader", f"--format={columns}", *options]
    return "; ".join(filter(None, _ask(shlex.join(command)).stdout.splitlines()))


def _ask(command: str) -> subprocess.CompletedProcess[str]:
    """How a command of Slurm's ends.

    raises   UserError if the controller does not answer
    """
    silence = None
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=ANSWER_S)
        if any(words in done.stderr for words in SILENCE):
            silence = _one_line(done.stderr)
    except subprocess.TimeoutExpired:
        silence = f"{command.split()[0]} waited for {ANSWER_S:.0f} s"
    if silence:
        raise UserError(
            f"the Slurm controller does not answer: {silence}\n"
            "  nothing was submitted; `scontrol ping` says when it is up again"
        )
    return done


def _one_line(text: str) -> str:
    return "; ".join(text.split("\n")).strip("; ")
