"""Slurm is asked before anything is submitted; here programs that answer as Slurm's do stand for it.

tests/test_cluster.py has the real ones.
"""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

import pytest
import snakemake_executor_plugin_slurm
from snakegpt import slurm
from snakegpt.errors import UserError
from snakegpt.slurm import keep_unanswered_jobs, require_taken, retry_preempted_jobs
from snakemake_executor_plugin_slurm import Executor


class Resources(dict):
    __getattr__ = dict.__getitem__


def job(rule="train_model", experiment="gpt2", **resources):
    given = {"slurm_partition": "gpu", "mem_mb": 8000, "runtime": 60, **resources}
    return SimpleNamespace(
        rule=SimpleNamespace(name=rule),
        wildcards={"experiment": experiment},
        resources=Resources(given),
        threads=8,
        is_group=lambda: False,
    )


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Let sbatch and sinfo answer so; returns the file that sbatch notes its calls in."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def answer(sbatch="", down=""):
        calls = tmp_path / "calls"
        programs = {
            "sbatch": f'echo "$@" >> {calls}\n{sbatch}',
            "sinfo": f'case "$*" in *states*) echo "{down}" ;; *) echo "gpu 4 x 64 CPUs, 500000 MB, gpu:4" ;; esac',
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        return calls

    return answer


SETTINGS = SimpleNamespace(requeue=True, no_requeue=False, qos=None, reservation=None)
REFUSES = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"


def test_each_kind_of_job_is_asked_for_once_as_the_plugin_would(answers):
    calls = answers()
    nodes = {"mpi": "srun", "nodes": 2, "tasks": 2, "gres": "gpu:4", "tasks_per_gpu": 0}
    parts = [job("encode_tokens", None) for _ in range(3)]
    require_taken([*parts, job(**nodes), job(experiment="other", **nodes)], SETTINGS)
    encode, train = calls.read_text().splitlines()
    assert "--partition=gpu -t 60 --mem 8000 --requeue --ntasks=1 --cpus-per-task=8" in encode
    assert "--nodes=2 --requeue --ntasks=2" in train
    assert "--gres=gpu:4" in train
    assert "--test-only" in encode and "--test-only" in train


def test_a_job_that_slurm_refuses_is_told_with_what_there_is(answers):
    answers(REFUSES)
    with pytest.raises(UserError) as told:
        require_taken([job(gres="gpu:8")], SETTINGS)
    said = str(told.value)
    assert "refuses jobs of rule train_model: allocation failure: Requested node" in said
    assert "--gres=gpu:8" in said
    assert "gpu 4 x 64 CPUs, 500000 MB, gpu:4" in said


def test_a_machine_without_slurm_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch is not installed on \S+(.|\n)*login node"):
        require_taken([job()], SETTINGS)


def test_nodes_that_are_down_make_it_a_warning(answers, capsys):
    answers(REFUSES, down="node[7-8]")
    require_taken([job()], SETTINGS)
    assert "if that is for want of node[7-8], jobs will wait" in capsys.readouterr().err


def test_a_wrong_name_is_refused_whoever_is_down(answers):
    answers("echo 'allocation failure: Invalid partition name specified' >&2; exit 1", down="node7")
    with pytest.raises(UserError, match="Invalid partition name specified"):
        require_taken([job()], SETTINGS)


@pytest.mark.parametrize(
    ("sbatch", "said"),
    [
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", "Unable to"),
        ("sleep 5", "sbatch waited for 0 s"),
    ],
)
def test_a_controller_that_does_not_answer_is_told(answers, monkeypatch, sbatch, said):
    answers(sbatch)
    monkeypatch.setattr(slurm, "ANSWER_S", 0.2)
    with pytest.raises(UserError, match=f"controller does not answer: {said}"):
        require_taken([job()], SETTINGS)


@pytest.mark.parametrize(("answers", "kept"), [(0, ["a", "b"]), (1, ["b"])])
def test_jobs_that_slurm_said_nothing_of_are_kept(monkeypatch, answers, kept):
    """The plugin's own check yields the jobs that still run, and none when its question failed."""

    async def check(self, active_jobs):
        self._status_query_calls += answers
        for job in active_jobs[1:] if answers else []:
            yield job

    monkeypatch.setattr(Executor, "check_active_jobs", check)
    keep_unanswered_jobs()
    executor = SimpleNamespace(_status_query_calls=3)

    async def left():
        return [job async for job in Executor.check_active_jobs(executor, ["a", "b"])]

    assert asyncio.run(left()) == kept


@pytest.mark.parametrize(
    ("command", "state"), [("squeue --states=all", "CANCELLED"), ("sacct -X", "PREEMPTED")]
)
def test_a_job_that_was_preempted_for_good_counts_as_cancelled_and_is_told_once(
    monkeypatch, capsys, command, state
):
    """sacct says PREEMPTED of a job that is requeued, too."""

    async def query(command, logger):
        return {"7": "PREEMPTED", "8": "RUNNING"}, 0.1

    monkeypatch.setattr(snakemake_executor_plugin_slurm, "query_job_status", query)
    retry_preempted_jobs()
    for _ in range(2):
        asked = snakemake_executor_plugin_slurm.query_job_status(command, None)
        assert asyncio.run(asked) == ({"7": state, "8": "RUNNING"}, 0.1)
    said = capsys.readouterr().err
    assert said.count("Slurm preempted job 7") == (state == "CANCELLED")


def test_a_question_that_failed_stays_unanswered(monkeypatch):
    async def query(command, logger):
        return None, None

    monkeypatch.setattr(snakemake_executor_plugin_slurm, "query_job_status", query)
    retry_preempted_jobs()
    assert asyncio.run(snakemake_executor_plugin_slurm.query_job_status("squeue", None)) == (
        None,
        None,
    )
