"""Run 20 steps on 1, 2, 4, ... ranks and say how training scales, and how long all of it will take.

Reads: manifest.json of a token set, its shards beside it. Writes: scaling.json, UTF-8: for each number of
ranks the seconds of a step and its parts, weak and strong efficiency, and a verdict. By hand:

    python -m snakegpt.stages.measure_scaling --tokens results/tokens/shakespeare-gpt2/manifest.json \\
        --settings '{"model": {"layers": 2, "heads": 2, "channels": 64, "context": 64},
                     "training": {"batch_tokens": 1024}}' --execution '{"ranks": 2}' --out /tmp/scaling

On several nodes as bench_network, by Slurm or with SNAKEGPT_NODE and SNAKEGPT_RENDEZVOUS on each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from snakegpt import distributed, launching, scaling
from snakegpt.command import block, how_to_run, only_path, stage_parser, write_json
from snakegpt.errors import RETRY, Interrupted, UserError, reports_errors
from snakegpt.model import n_parameters
from snakegpt.network.interfaces import require_known
from snakegpt.network.meeting import Meeting, told_to_all
from snakegpt.nodes import ALONE, choose_ranks_per_node, on_every_node, place_of
from snakegpt.outcomes import reporting_outcome
from snakegpt.placement import choose_passes, shape_of
from snakegpt.progress import columns, count, say
from snakegpt.settings import Execution, Model, Training, exchange_problem
from snakegpt.tokens import open_sets, read_manifest
from snakegpt.updates import Launch

REVISION = 2  # bump when what is measured changes by code outside SCIENCE
SCIENCE = ("snakegpt.scaling",)

MODULE = "snakegpt.stages.measure_scaling"
RESULT = "SNAKEGPT_SCALING"  # the file that rank 0 of a run writes to
LIMIT_S = 20.0  # of each timed run
CONNECT_S = 60.0  # nodes have just met, so that one that does not come by then hangs
SLOWEST_RUN_S = 600.0


def measure_scaling(
    model: Model,
    training: Training,
    execution: Execution,
    machine: dict[str, Any],
    tokens: Path,
    out: Path,
    *,
    label: str,
    threads: int,
    network: Path | None,
    arguments: list[str],
) -> None:
    """Measure as one rank, as the agent of a node, or start the agents; node 0 writes to `out`."""
    manifest = read_manifest(tokens)
    shape = shape_of(model, manifest["tokenizer"]["n_vocab"])
    rows = training.batch_tokens // model.context
    device = distributed.choose_device(execution.device)
    if distributed.is_rank():
        _as_rank(model, training, execution, manifest, tokens, device, threads, rows)
        return
    place = place_of(os.environ)
    if place is None and execution.nodes > 1:
        shared = out.parent / f"{out.name}-ranks"
        nodes = execution.nodes
        on_every_node(MODULE, arguments, nodes=nodes, threads=threads, shared=shared)
        return
    place = place or ALONE
    per_node = choose_ranks_per_node(
        execution, nodes=place.nodes, device=device, rows=rows, threads=threads
    )
    environment = {}
    if execution.network_environment:
        environment = launching.advised_environment(network, place.nodes, label=label)
    meeting = Meeting(place)
    found: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    counts = _counts(per_node, place.nodes, rows)
    with told_to_all(meeting):
        require_known(os.environ)
        for launch, ranks in enumerate(counts, start=1):
            run = _run(meeting, ranks, per_node, launch, arguments, environment, threads)
            what = "measured"
            if "failure" not in run:
                found.append(run)
            elif ranks == counts[-1]:
                raise UserError(f"{ranks} ranks failed: {run['failure']}")
            else:  # a model that only many ranks can hold
                failed.append({"ranks": ranks, "reason": _in_a_line(run["failure"])})
                what = f"failed: {failed[-1]['reason']}"
            if place.leads:
                say(f"{label}  {ranks} of {per_node * place.nodes} ranks {what}")
    if not place.leads:
        return
    weak, strong = ([run[kind] for run in found] for kind in ("weak", "strong"))
    whole = training.gradient_exchange == "float32"
    gradient_bytes = (4 if whole else 2) * n_parameters(shape)
    strategy = found[-1]["strategy"]
    halved = training.model_copy(update={"gradient_exchange": "bfloat16"})
    problem = exchange_problem(halved, strategy, deterministic=execution.deterministic)
    said = scaling.verdict(
        strong,
        gradient_bytes=gradient_bytes,
        batch_tokens=training.batch_tokens,
        steps=training.steps,
        strategy=strategy,
        asked_for=execution.strategy != "auto",
        halvable=whole and problem is None,
    )
    for run in failed:
        said["text"] += f" Not measured: {count(run['ranks'], 'rank')}, {run['reason']}."
    result = {
        "machine": machine,
        "nodes": place.nodes,
        "gradient_bytes": gradient_bytes,
        "weak": weak,
        "strong": strong,
        "failed": failed,
        "efficiencies": scaling.efficiencies(weak, strong),
        "verdict": said,
    }
    write_json(out / "scaling.json", result)
    for line in columns(scaling.table(weak, strong), ">>>>>>>>"):
        say(f"{label}  {line}")
    say(f"{label}  {said['text']}")


def _counts(per_node: int, nodes: int, rows: int) -> list[int]:
    """Numbers of ranks to measure: on one node up to all of its ranks, then on whole nodes.

    Only numbers that share the rows of a step evenly, as training asks for.
    """
    found = scaling.counts(per_node)
    found += [per_node * n for n in scaling.counts(nodes)[1:]] if nodes > 1 else []
    return [n for n in found if rows % n == 0]


def _run(
    meeting: Meeting,
    ranks: int,
    per_node: int,
    launch: int,
    arguments: list[str],
    environment: dict[str, str],
    threads: int,
) -> dict[str, Any]:
    """Runs on so many ranks, on as few nodes as hold them; every node waits for the result.

    returns  what rank 0 wrote, or `failure`: why there is nothing, in words
    raises   Interrupted if a node was asked to stop
    """
    place = meeting.place
    local = min(ranks, per_node)
    within = replace(place, nodes=ranks // local)
    mine: dict[str, Any] = {}
    if place.node < within.nodes:
        with tempfile.TemporaryDirectory(prefix="snakegpt-") as scratch:
            result = Path(scratch) / "scaling.json"
            # A rank has the threads that it will have when all of them run.
            share = max(1, threads // per_node) * local
            outcome = launching.run_ranks(
                MODULE,
                arguments,
                within,
                ranks=local,
                threads=share,
                launch=launch,
                environment={**environment, RESULT: str(result)},
                start_timeout_s=CONNECT_S,
            )
            if outcome.status:
                mine.update(failure=outcome.text, stopped=outcome.status == RETRY)
            elif place.leads:
                mine["run"] = json.loads(result.read_text(encoding="utf-8"))
    everyone = meeting.share(f"scaling-{launch}", mine, wait_s=SLOWEST_RUN_S)
    failures = [each for each in everyone if "failure" in each]
    if any(each["stopped"] for each in failures):
        raise Interrupted("stopped; the same command measures anew")
    run: dict[str, Any] = failures[0] if failures else everyone[0]["run"]
    return run


def _in_a_line(failure: str) -> str:
    """What went wrong, of a message or of a traceback, which says it last."""
    lines = failure.strip().splitlines()
    return lines["Traceback" in failure and -1].strip().rstrip(".")


def _as_rank(
    model: Model,
    training: Training,
    execution: Execution,
    manifest: dict[str, Any],
    tokens: Path,
    device: str,
    threads: int,
    rows: int,
) -> None:
    shape = shape_of(model, manifest["tokenizer"]["n_vocab"])
    with distributed.joined(device) as group:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        passes = choose_passes(training, execution, shape, device=device, share=rows // group.ranks)
        strategy = distributed.choose_strategy(
            execution.strategy,
            device=device,
            ranks=group.ranks,
            n_parameters=n_parameters(shape),
        )
        launch = Launch.of("measure_scaling", device, execution, passes, strategy=strategy)
        train = open_sets(tokens, manifest, "train")
        found = {
            kind: scaling.measure(
                shape,
                training,
                train,
                launch,
                group,
                end_of_text=manifest["tokenizer"]["end_of_text"],
                rows=n_rows,
                limit_s=LIMIT_S,
            )
            for kind, n_rows in (("weak", passes.micro_rows * group.ranks), ("strong", rows))
        }
        if group.leads:
            written = json.dumps({**found, "strategy": strategy})
            Path(os.environ[RESULT]).write_text(written, encoding="utf-8")


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {"tokens": "manifest.json of the tokens, shards beside it"}
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "measure_scaling", "network")
    network = how.extras["network"]
    args.out.mkdir(parents=True, exist_ok=True)
    with reporting_outcome():
        measure_scaling(
            block(Model, args.settings.get("model"), "model"),
            block(Training, args.settings.get("training"), "training"),
            how.settings,
            args.settings.get("machine") or {},
            only_path(args.tokens, "tokens"),
            args.out,
            label=how.label,
            threads=how.threads,
            network=Path(network) if network else None,
            arguments=sys.argv[1:] if argv is None else argv,
        )


if __name__ == "__main__":
    main()
