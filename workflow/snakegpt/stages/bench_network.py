"""Measure what the network does for the ranks that training would use on this machine.

Reads: tokenizer.json (for the size of the model). Writes: network.json, UTF-8: all-reduces from 1 KB to
the size of the gradients, bandwidths as nccl-tests defines them, latency, TCP over loopback by iperf3
where that is installed, and the launch environment that follows. By hand:

    python -m snakegpt.stages.bench_network --tokenizer results/tokenizers/gpt2/tokenizer.json \\
        --settings '{"model": {"layers": 4, "channels": 128}}' --execution '{"ranks": 2}' --out /tmp/net
"""

from __future__ import annotations

import faulthandler
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from snakegpt import distributed, network
from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.model import n_parameters
from snakegpt.network_interfaces import interface_towards
from snakegpt.placement import shape_of
from snakegpt.progress import quantity, say
from snakegpt.settings import Execution, Model

REVISION = 1  # bump when what is measured changes by code outside SCIENCE
SCIENCE = ("snakegpt.network", "snakegpt.network_interfaces")

LIMIT_S = 4.0  # for the all-reduces; a message that takes long is repeated less often
HANGS_AFTER_S = 180.0  # a rank that is not done by then ends, and with it the others
LOOPBACK = "127.0.0.1"
DIVISIBLE_ROWS = 840  # which every number of ranks up to eight divides


def bench_network(
    model: Model,
    execution: Execution,
    machine: dict[str, Any],
    tokenizer: Path,
    out: Path,
    *,
    label: str,
    threads: int,
    batch_tokens: int | None,
    arguments: list[str],
) -> None:
    """Measure as one rank, or start the ranks that do; rank 0 writes network.json to `out`.

    machine       what the figures belong to; written down as given
    batch_tokens  of a training step, whose rows the ranks share; None: as many ranks as fit the machine
    arguments     this command's own, for the ranks
    raises        UserError if a sum came out wrong: no training on this machine can be trusted then
    """
    described = read_json(tokenizer, "n_vocab")
    gradient_bytes = 4 * n_parameters(shape_of(model, described["n_vocab"]))
    device = distributed.choose_device(execution.device)
    rows = max(1, batch_tokens // model.context) if batch_tokens else DIVISIBLE_ROWS
    ranks = distributed.choose_ranks(execution.ranks, device=device, rows=rows, threads=threads)
    backend = "nccl" if device == "cuda" else "gloo"
    interface = interface_towards(LOOPBACK)
    environment, advice = network.recommend(backend, ranks, interface)
    if ranks > 1 and not distributed.is_rank():
        say(f"{label}  sums {quantity(gradient_bytes, 'B')} over {ranks} ranks by {backend}")
        module = "snakegpt.stages.bench_network"
        distributed.launch(module, arguments, ranks=ranks, threads=threads, environment=environment)
        return
    curve: list[dict[str, Any]] = []
    latency_s, reason = None, {}
    with distributed.joined(device) as group:
        if group.ranks == 1:
            reason["all_reduce"] = "training uses one process here, so there is nothing to sum"
        else:
            faulthandler.dump_traceback_later(
                HANGS_AFTER_S, exit=True
            )  # bounds the wait for others
            torch.set_num_threads(max(1, threads // group.ranks))
            at = f"cuda:{group.local_rank}" if device == "cuda" else device
            latency_s = network.all_reduce_latency(at)
            curve = network.all_reduce_curve(at, gradient_bytes, limit_s=LIMIT_S)
            faulthandler.cancel_dump_traceback_later()
        leads = group.leads
    if not leads:
        return
    tcp, reason_without = network.iperf3(LOOPBACK)
    if reason_without:
        reason["iperf3"] = reason_without
    result: dict[str, Any] = {
        "machine": machine,
        "interface": asdict(interface),
        "backend": backend,
        "ranks": ranks,
        "gradient_bytes": gradient_bytes,
        "all_reduce": curve,
        "latency_s": latency_s,
        "time": "mean of the iterations, of the slowest rank",
        "iperf3": tcp,
        "reason": reason,
        "environment": environment,
        "advice": advice + network.findings(gradient_bytes, curve, latency_s),
    }
    write_json(out / "network.json", result)
    for line in (*result["advice"], *(f"{what}: {why}" for what, why in reason.items())):
        say(f"{label}  {line}")
    wrong = sum(row["n_wrong"] for row in curve)
    if wrong:
        raise UserError(
            f"{wrong:,} elements of all-reduces over {ranks} ranks came out wrong ({backend}).\n"
            "  gradients would too: look at this machine's memory, driver and network first"
        )


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, {"tokenizer": "tokenizer.json"}).parse_args(argv)
    how = how_to_run(args, "bench_network", "batch_tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    with distributed.reporting_outcome():
        bench_network(
            block(Model, args.settings.get("model"), "model"),
            how.settings,
            args.settings.get("machine") or {},
            only_path(args.tokenizer, "tokenizer"),
            args.out,
            label=how.label,
            threads=how.threads,
            batch_tokens=how.extras["batch_tokens"],
            arguments=sys.argv[1:] if argv is None else argv,
        )


if __name__ == "__main__":
    main()
