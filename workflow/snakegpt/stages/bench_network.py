"""Measure what the network and each node do for the ranks that training would use, and advise by it.

Reads: tokenizer.json (for the size of the model; without it GPT-2's vocabulary counts). Writes:
network.json, UTF-8: collectives from 1 KB to the size of the gradients, bandwidths as nccl-tests defines
them; between several nodes every link by iperf3 or plain TCP, what each node has and how fast it is; the
launch environment that follows, each setting tried against the defaults. By hand:

    python -m snakegpt.stages.bench_network --tokenizer results/tokenizers/gpt2/tokenizer.json \\
        --settings '{"model": {"layers": 4, "channels": 128}}' --execution '{"ranks": 2}' --out /tmp/net

and on any set of hosts, one command on each, here on the second of three:

    SNAKEGPT_NODE=1/3 SNAKEGPT_RENDEZVOUS=10.0.0.1:29500 python -m snakegpt.stages.bench_network --out /tmp/net

node 0 writes. Ports from that of the rendezvous to 19 above it must be open between them, and what the
kernel gives to the ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from snakegpt import distributed
from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.model import n_parameters
from snakegpt.network import bench, collectives
from snakegpt.nodes import ALONE, choose_ranks_per_node, on_every_node, place_of
from snakegpt.outcomes import reporting_outcome
from snakegpt.placement import shape_of
from snakegpt.progress import quantity, say
from snakegpt.settings import Execution, Model

REVISION = 2  # bump when what is measured changes by code outside SCIENCE
SCIENCE = (
    "snakegpt.network.advice",
    "snakegpt.network.bench",
    "snakegpt.network.collectives",
    "snakegpt.network.interfaces",
    "snakegpt.network.iperf",
    "snakegpt.network.links",
    "snakegpt.network.nodes",
)

MODULE = "snakegpt.stages.bench_network"
DIVISIBLE_ROWS = 840  # which every number of ranks up to eight divides
GPT2_VOCABULARY = 50_257


def bench_network(
    model: Model,
    execution: Execution,
    machine: dict[str, Any],
    tokenizer: Path | None,
    out: Path,
    *,
    label: str,
    threads: int,
    batch_tokens: int | None,
    arguments: list[str],
) -> None:
    """Measure as one rank, as the agent of a node, or start the agents; node 0 writes to `out`.

    machine       what the figures belong to; written down as given
    batch_tokens  of a training step, whose rows the ranks share; None: as many ranks as fit the machine
    arguments     this command's own, for agents and ranks
    raises        UserError if a sum came out wrong: no training on these machines can be trusted then
    """
    n_vocab = read_json(tokenizer, "n_vocab")["n_vocab"] if tokenizer else GPT2_VOCABULARY
    gradient_bytes = 4 * n_parameters(shape_of(model, n_vocab))
    device = distributed.choose_device(execution.device)
    if distributed.is_rank():
        ranks, local_rank = (int(os.environ[n]) for n in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
        torch.set_num_threads(max(1, threads // ranks))
        result = Path(os.environ[bench.RESULT])
        collectives.measure_as_rank(device, local_rank, gradient_bytes, result)
        return
    place = place_of(os.environ)
    if place is None and execution.nodes > 1:
        shared = out.parent / f"{out.name}-ranks"
        on_every_node(MODULE, arguments, nodes=execution.nodes, threads=threads, shared=shared)
        return
    place = place or ALONE
    rows = max(1, batch_tokens // model.context) if batch_tokens else DIVISIBLE_ROWS * place.nodes
    ranks = choose_ranks_per_node(
        execution, nodes=place.nodes, device=device, rows=rows, threads=threads
    )
    task = bench.Task(
        module=MODULE,
        arguments=arguments,
        label=label,
        device=device,
        ranks=ranks,
        threads=threads,
        gradient_bytes=gradient_bytes,
        folder=out,
        seconds=execution.network_test_s,
        udp_bit_per_s=execution.network_udp_mbit and execution.network_udp_mbit * 1e6,
    )
    total = ranks * place.nodes
    if place.leads and total > 1:
        say(f"{label}  sums {quantity(gradient_bytes, 'B')} over {total} ranks by {task.backend}")
    found = bench.measure(task, place)
    if not place.leads:
        return
    write_json(out / "network.json", {"machine": machine, **found})
    for line in (
        *found["advice"],
        *(f"warning: {text}" for text in found["warnings"]),
        *(f"{what}: {why}" for what, why in found["reason"].items()),
    ):
        say(f"{label}  {line}")
    wrong = sum(row["n_wrong"] for row in found["all_reduce"])
    if wrong:
        raise UserError(
            f"{wrong:,} elements of all-reduces over {total} ranks came out wrong ({task.backend}).\n"
            "  gradients would too: look at this machine's memory, driver and network first"
        )


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, {"tokenizer": "tokenizer.json"}).parse_args(argv)
    how = how_to_run(args, "bench_network", "batch_tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    with reporting_outcome():
        bench_network(
            block(Model, args.settings.get("model"), "model"),
            how.settings,
            args.settings.get("machine") or {},
            only_path(args.tokenizer, "tokenizer") if args.tokenizer else None,
            args.out,
            label=how.label,
            threads=how.threads,
            batch_tokens=how.extras["batch_tokens"],
            arguments=sys.argv[1:] if argv is None else argv,
        )


if __name__ == "__main__":
    main()
