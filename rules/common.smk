# What the rules share: the checked settings and functions that ask the pipeline. No rules here.
import atexit
import functools
import gc
import inspect
import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.enums import Quietness
from snakemake_interface_executor_plugins.settings import DeploymentMethod

# The checkout's own code runs, here and in jobs, whose Python may have another snakegpt (an image's) or
# none (a conda environment's).
CODE = str(Path(workflow.basedir, "workflow").resolve())
sys.path.insert(0, CODE)
# By the command itself, since Snakemake (9.27) takes the variable from jobs in conda environments.
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={shlex.quote(CODE)}${{{{PYTHONPATH:+:$PYTHONPATH}}}}; "
)

from snakegpt.durable import write_text_atomically
from snakegpt.errors import UserError, nearest
from snakegpt.identity import code_of, digest
from snakegpt.locks import read as read_locks
from snakegpt.pipeline import MACHINE, TARGETS, Pipeline, machine
from snakegpt.settings import load as load_settings
from snakegpt.store.command import store_of
from snakegpt.store.links import mend


def user_error_as_workflow_error(function, *arguments):
    """Snakemake prints its own errors without a traceback; ours are for people too."""
    try:
        return function(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


def make_pipeline():
    files = dict.fromkeys(os.path.relpath(file) for file in workflow.configfiles)
    settings = load_settings(config, list(files))
    return Pipeline(settings, read_locks("corpora.lock.json"))


# Snakemake makes millions of objects that stay; with 10,000 jobs, looking for cycles among them so
# often as Python does by itself takes a tenth of its time (measured).
gc.set_threshold(50_000, 20, 100)

# Jobs call the Python that runs Snakemake, also when its environment is not activated.
os.environ.update(PATH=f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}")

# What `--software-deployment-method apptainer` runs rules in; without that it is not looked at.
IMAGE = os.environ.get("SNAKEGPT_IMAGE", "envs/snakegpt.sif")


container: IMAGE


def require_image():
    """apptainer itself would say no at the first job, and not how to come by an image."""
    if DeploymentMethod.APPTAINER not in workflow.deployment_settings.deployment_method:
        return
    if "://" not in IMAGE and not Path(IMAGE).exists():
        raise UserError(
            f"the image {IMAGE} is not there.\n"
            "  apptainer build envs/snakegpt.sif envs/snakegpt.def makes it; or name another one, a file"
            " or docker://..., in SNAKEGPT_IMAGE"
        )


user_error_as_workflow_error(require_image)

# A job on another node reads this file again, and must see the machine that its measurements were asked
# for on: Slurm's jobs get this process's environment, a pod what is declared.
os.environ.setdefault(MACHINE, json.dumps(machine()))


envvars:
    MACHINE,


PIPELINE = user_error_as_workflow_error(make_pipeline)
SETTINGS = PIPELINE.settings
STORE = store_of(PIPELINE)

# Snakemake stops at a link to nothing; a missing result it knows how to make.
if workflow.is_main_process:
    n_mended = user_error_as_workflow_error(mend, STORE)
    if n_mended:
        print(
            f"{n_mended:,} results pointed to objects that are gone from the store;"
            " this run restores or rebuilds them",
            file=sys.stderr,
        )


def tell_reasons():
    """After a dry run, say why each of its stages would run and what that may cost.

    Snakemake calls no hook then, so this is called at exit, and looks whether there was one that
    did not fail. --lint, --report, --unlock and the like execute nothing, dry or not.
    """
    scheduler = workflow.scheduler
    if not workflow.dryrun or scheduler is None or scheduler.failed:
        return
    if Quietness.ALL in (workflow.output_settings.quiet or ()):
        return
    jobs = workflow.dag.needrun_jobs(exclude_finished=False)
    # Imported here, for a dry run alone.
    from snakegpt.store.explain import Explainer
    from snakegpt.store.forecast import of_jobs

    files = list(dict.fromkeys(map(os.path.relpath, workflow.configfiles)))
    asked = [(job.rule.name, dict(job.wildcards.items())) for job in jobs]
    for line in of_jobs(Explainer(STORE, PIPELINE, files), asked):
        print(line)


if workflow.is_main_process:
    atexit.register(tell_reasons)


def one_of(names):
    return "|".join(names) or "none_defined"


def encode_jobs():
    """Jobs that the parts of a corpus are encoded in, at most; None: one a part, as on one machine.

    A profile sets it as a resource of encode_parts: what it says in `config:` would be lost to a --config
    of the command line, and it is no setting of results.
    """
    resources = workflow.resource_settings.overwrite_resources.get("encode_parts", {})
    if "jobs" not in resources:
        return None
    jobs = resources["jobs"].raw
    if not (isinstance(jobs, int) and jobs > 0):
        raise UserError(
            f"resource jobs of rule encode_parts = {jobs!r}, a number from 1 on is wanted.\n"
            "  change it in set-resources of the profile, or leave it out for one job a part"
        )
    return jobs


ENCODE_JOBS = user_error_as_workflow_error(encode_jobs)


wildcard_constraints:
    corpus=one_of([*SETTINGS.corpora, *SETTINGS.mixtures]),
    tokenizer=one_of(SETTINGS.tokenizers),
    weights=one_of(SETTINGS.weights),
    experiment=one_of(SETTINGS.experiments),
    part=r"\d{6}",
    batch=r"\d{6}",


def request_of(stage, wildcards):
    return user_error_as_workflow_error(PIPELINE.request, stage, dict(wildcards.items()))


def signed(function):
    """Snakemake looks at the parameters of an input function a dozen times a job; once is enough."""
    function.__signature__ = inspect.signature(function)
    return function


def inputs_of(stage):
    """Named input files of a stage, also those that are no part of its key.

    No `ancient`: where such an input is made anew in the same run, Snakemake (9.27) compares no
    parameters and would leave a stale result standing. A job too many costs one look-up.
    """

    def inputs(wildcards):
        request = request_of(stage, wildcards)
        return {**request.inputs, **request.unhashed}

    return signed(inputs)


def settings_of(stage):
    """Science settings of a stage as JSON: a change is a rerun."""
    return signed(lambda wildcards: json.dumps(request_of(stage, wildcards).settings))


def code_of_stage(stage):
    """Digest of a stage's science code: a change is a rerun."""
    return digest(code_of(stage))


def arguments_of(stage):
    """The runner's arguments, for `{params.arguments:q}`.

    Execution settings come in here. Snakemake does not compare a parameter whose function asks for
    `output`, so changing them reruns nothing (tests/test_workflow.py holds it to that).
    """

    def arguments(wildcards, output):
        return on_a_command_line(words_for(request_of(stage, wildcards)))

    return signed(arguments)


def words_for(request):
    """The runner's arguments for a run."""
    words = [request.stage, request.name, "--output", request.folder]
    words += ["--store", SETTINGS.store.path]
    words += ["--check", SETTINGS.store.check, "--link", SETTINGS.store.link]
    if SETTINGS.store.remote:
        words += ["--remote", SETTINGS.store.remote]
        words += [] if SETTINGS.store.push else ["--no-push"]
    words += ["--settings", json.dumps(request.settings)]
    words += ["--execution", json.dumps(request.execution)]
    for role, paths in request.inputs.items():
        words += ["--input", role, *paths]
    for role, paths in request.unhashed.items():
        words += ["--unhashed", role, *paths]
    return words


def on_a_command_line(words):
    """Arguments as they are, or the name of a file that holds them.

    A job's whole command is one word to the shell, and Linux takes 128 KiB of that: a corpus of a
    thousand files or an index of a thousand parts has more.
    """
    if sum(map(len, words)) < 60_000:  # half, for quotes and the rest of the command
        return words
    return in_a_file(words)


def in_a_file(given):
    """The runner's arguments for one run, or a list of them for several, as the name of a file with them."""
    file = Path(".snakemake", "snakegpt", f"{digest(given)}.json")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(given))
    return [f"@{file}"]


# ---- parts in batches ----


@functools.cache
def batches(corpus):
    """The parts of a corpus, neighbours together, in as many batches as there may be jobs."""
    parts = list(PIPELINE.parts(corpus))
    n = min(ENCODE_JOBS or len(parts), len(parts))
    bounds = [len(parts) * k // n for k in range(n + 1)]
    return [parts[begin:end] for begin, end in zip(bounds, bounds[1:])]


@functools.cache
def batch_of_part(corpus):
    return {part: batch for batch, parts in enumerate(batches(corpus)) for part in parts}


def requests_of_batch(wildcards):
    names = {"corpus": wildcards.corpus, "tokenizer": wildcards.tokenizer}
    return [
        request_of("encode_tokens", {**names, "part": part})
        for part in batches(wildcards.corpus)[int(wildcards.batch)]
    ]


def inputs_of_batch(wildcards):
    """Those of any part: what differs between them is inside the corpus."""
    request = requests_of_batch(wildcards)[0]
    return {**request.inputs, **request.unhashed}


def settings_of_batch(wildcards):
    return digest([request.settings for request in requests_of_batch(wildcards)])


def arguments_of_batch(wildcards, output):
    return in_a_file([words_for(request) for request in requests_of_batch(wildcards)])


def inputs_of_part():
    """What encode_tokens reads, and where parts are encoded together the mark that their job leaves."""
    inputs = inputs_of("encode_tokens")
    if ENCODE_JOBS is None:
        return inputs

    def with_batch(wildcards):
        batch = batch_of_part(wildcards.corpus)[wildcards.part]
        folder = f"results/tokens/{wildcards.corpus}-{wildcards.tokenizer}"
        return {**inputs(wildcards), "batch": f"{folder}/batch_{batch:06d}.done"}

    return signed(with_batch)


# ---- what the machine is asked for ----


# Ranks beyond eight on one CPU only divide small batches further (see distributed.choose_ranks).
TRAINING_THREADS = 8

# A stage that uses GPUs uses all of a machine's; the profile's limit of one lets one run at a time.
GPU = 1


def several_nodes(wildcards):
    """Nodes that an experiment trains on, or None for one: Snakemake drops a resource that is None."""
    nodes = SETTINGS.experiment(wildcards.experiment).execution.nodes
    return nodes if nodes > 1 else None


def launcher_of_nodes(wildcards):
    """Tells the Slurm executor to run the rule's command in the batch script, which calls srun itself.

    Without the resource `mpi` it runs everything under an srun of one task, and none of several nodes
    can be started from there.
    """
    return "srun" if several_nodes(wildcards) else None


def before_training(wildcards):
    """What training waits for: the plan, so that it is read before anything is spent, and the network."""
    return {
        "plan": f"results/plans/{wildcards.experiment}/plan.json",
        "network": f"results/networks/{wildcards.experiment}/network.json",
    }


def prepare_slurm():
    """Called before anything runs, not in dry runs: those need no cluster."""
    if workflow.executor_plugin.name != "slurm":
        return
    from snakegpt.slurm import keep_unanswered_jobs, require_taken, retry_preempted_jobs

    jobs = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
    user_error_as_workflow_error(require_taken, jobs, workflow.executor_settings)
    keep_unanswered_jobs()
    retry_preempted_jobs()


def refuse_unknown_targets():
    """Name the nearest target before Snakemake says that it misses a rule. Called last.

    Snakemake tells a Snakefile nothing of its targets, so they are looked for in the command line.
    """
    rules_by_name = [rule.name for rule in workflow.rules]
    for word in sys.argv[1:]:
        if word.partition("_")[0] in TARGETS and word.isidentifier():
            if word not in rules_by_name:
                raise UserError(f"unknown target '{word}'.{nearest(word, rules_by_name)}")
