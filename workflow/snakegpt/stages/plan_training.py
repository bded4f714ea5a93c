"""Say what a training run will take, as a table and as plan.json, before anything is spent.

Reads: tokenizer.json. Writes, UTF-8: plan.json (parameters, FLOPs, tokens, steps, epochs, memory of a rank
by part, disk, time here and on the GPUs of a table, a verdict) and, where it could be measured,
calibration.json (seconds of a step and peak memory of some real updates on made-up tokens). By hand:

    python -m snakegpt.stages.plan_training --tokenizer results/tokenizers/gpt2/tokenizer.json \\
        --settings '{"model": {"layers": 12}, "training": {"steps": 1000}}' --out /tmp/plan
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from snakegpt import distributed, launching, plan_text, planning
from snakegpt.calibration import LEAST_STEPS, calibrate
from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser, write_json
from snakegpt.distributed import Group
from snakegpt.errors import UserError, reports_errors
from snakegpt.hardware import measure_matmul
from snakegpt.metrics import require_writers
from snakegpt.model import Shape, flops_per_token, n_parameters
from snakegpt.nodes import choose_ranks_per_node
from snakegpt.outcomes import reporting_outcome
from snakegpt.placement import (
    choose_passes,
    in_one_order,
    rows_of_a_step,
    shape_of,
    shares,
    threads_of_rank,
)
from snakegpt.progress import quantity, say
from snakegpt.settings import Execution, Model, Training, Validation, model_problems
from snakegpt.updates import Launch

REVISION = 3  # bump when the bytes of plan.json change by code outside SCIENCE
SCIENCE = ("snakegpt.planning", "snakegpt.calibration")

CALIBRATION_LIMIT_S = 20.0


def plan_training(
    model: Model,
    training: Training,
    execution: Execution,
    tokenizer: Path,
    out: Path,
    *,
    label: str,
    threads: int,
    corpus_bytes: int | None,
    validation_fraction: float,
    prices: dict[str, float],
    steps_done: int = 0,
    arguments: list[str],
) -> None:
    """Plan a run on this machine, print the plan and write it to plan.json in `out`.

    corpus_bytes  raw size of the corpus; None while it is not locked
    prices        of an hour of one GPU, by its name in the table
    steps_done    by the run that this one continues
    arguments     this command's own, for the ranks that calibrate together
    raises        UserError if settings and machine do not fit each other, or the disk is too small
    """
    if problems := model_problems(model, "model"):
        raise UserError("\n".join(problems))
    require_writers(execution.tensorboard, execution.wandb)
    described = read_json(tokenizer, "n_vocab", "kind")
    shape = shape_of(model, described["n_vocab"])
    rows = rows_of_a_step(model, training)
    execution = in_one_order(execution, rows)
    placement = _place(training, execution, shape, rows, threads)
    disk, available = shutil.disk_usage(out), _available_memory(placement.device)
    corpus_disk = planning.disk_bytes(shape, corpus_bytes, None, execution.keep_states)
    planning.refuse_what_cannot_fit(corpus_disk, disk.free, disk.total, "this disk")
    needed = planning.memory_bytes(shape, placement, training.optimizer)["total"]
    here = placement.ranks // placement.nodes
    together = needed * (here if placement.device == "cpu" else 1)
    calibrates = distributed.is_rank()
    if not calibrates:
        torch.set_num_threads(threads)
        say(f"{label}  measures matrix products on {placement.device}")
        rate = measure_matmul(placement.device, placement.precision)
        rate *= placement.ranks if placement.device == "cuda" else placement.nodes
        why_not = _why_not_tried(shape, execution, placement, together, available, rate)
        calibrates = why_not is None
        if why_not:
            say(f"{label}  {why_not}")
    if calibrates and placement.ranks > 1 and not distributed.is_rank():
        module = "snakegpt.stages.plan_training"
        try:
            launching.launch(module, arguments, ranks=placement.ranks, threads=threads)
            return
        except SystemExit as failure:  # a rank had too little memory, say; training has ways out
            say(f"{failure}\n{label}  plans without the steps that were tried: they failed")
            calibrates = False
    if placement.device == "cpu":
        distributed.keep_freed_memory()
    with distributed.joined(placement.device) as group:
        measured = None
        if calibrates:
            torch.set_num_threads(placement.threads)
            mine = measure_matmul(placement.device, placement.precision)
            rate = float(group.sum(torch.tensor(mine, dtype=torch.float64)))
            measured = _calibrate(shape, training, execution, placement, group, label, rate)
        if not group.leads:
            return
        plan = planning.plan(
            shape,
            placement,
            training,
            tokenizer_kind=described["kind"],
            corpus_bytes=corpus_bytes,
            validation_fraction=validation_fraction,
            matmul_flops_per_s=rate,
            calibration=measured,
            prices=prices,
            keep_states=execution.keep_states,
            steps_done=steps_done,
        )
        plan |= {"free_disk_bytes": disk.free, "available_memory_bytes": available}
        for line in (label, *plan_text.table(plan)):
            say(line)
        planning.refuse_what_cannot_fit(plan["disk_bytes"], disk.free, disk.total, "this disk")
        for warning in plan_text.warnings(plan):
            say(f"  warning: {warning}")
        if measured is not None:
            write_json(out / "calibration.json", measured)
        write_json(out / "plan.json", plan)


def _place(
    training: Training, execution: Execution, shape: Shape, rows: int, threads: int
) -> planning.Placement:
    """Devices, ranks and micro-batches as train_model would choose them."""
    device = distributed.choose_device(execution.device)
    divisible = shares(execution, rows)
    nodes = execution.nodes
    ranks = nodes * choose_ranks_per_node(
        execution, nodes=nodes, device=device, rows=divisible, threads=threads
    )
    distributed.require_divisor(ranks, divisible)
    share = rows // ranks
    passes = choose_passes(training, execution, shape, device=device, share=share)
    return planning.Placement(
        device=device,
        precision=str(passes.dtype).removeprefix("torch."),
        ranks=ranks,
        rows_per_rank=passes.micro_rows,
        accumulation=share // passes.micro_rows,
        threads=threads_of_rank(execution, threads, ranks // nodes),
        attention=passes.kernel,
        strategy=distributed.choose_strategy(
            execution.strategy, device=device, ranks=ranks, n_parameters=n_parameters(shape)
        ),
        loss=passes.loss,
        activation_checkpointing=execution.activation_checkpointing,
        nodes=nodes,
        slices=distributed.choose_slices(
            n_parameters(shape), ranks=ranks, local_ranks=ranks // nodes, device=device
        ),
    )


def _why_not_tried(
    shape: Shape,
    execution: Execution,
    placement: planning.Placement,
    needed_bytes: int,
    available_bytes: int,
    matmul_flops_per_s: float,
) -> str | None:
    """Why no steps are tried on this machine; None if they are."""
    if execution.calibration_steps is None:
        return "tries no steps (execution.calibration_steps)"
    if placement.nodes > 1:
        return f"tries no steps: they are of {placement.nodes} nodes, and this is one"
    if needed_bytes > available_bytes:
        return f"has no room to try it: {quantity(needed_bytes, 'B')} are needed"
    tokens = placement.ranks * placement.rows_per_rank * shape.context
    reached = planning.EFFICIENCY[placement.device] * matmul_flops_per_s
    least_s = (LEAST_STEPS + 1) * tokens * flops_per_token(shape) / reached
    if least_s > CALIBRATION_LIMIT_S:
        return f"tries no steps: {LEAST_STEPS + 1} small ones would take {least_s:.0f} s"
    return None


def _calibrate(
    shape: Shape,
    training: Training,
    execution: Execution,
    placement: planning.Placement,
    group: Group,
    label: str,
    matmul_flops_per_s: float,
) -> dict[str, Any]:
    share = placement.rows_per_rank * placement.accumulation
    passes = choose_passes(training, execution, shape, device=placement.device, share=share)
    launch = Launch.of(
        label,
        placement.device,
        execution,
        passes,
        micro_rows=placement.rows_per_rank,
        threads=placement.threads,
        strategy=placement.strategy,
        deterministic=execution.deterministic,
        activation_checkpointing=placement.activation_checkpointing,
    )
    steps = execution.calibration_steps
    assert steps is not None
    reached = planning.EFFICIENCY[placement.device] * matmul_flops_per_s
    if group.leads:
        say(f"{label}  tries {steps} steps, or {CALIBRATION_LIMIT_S:.0f} s of them")
    return calibrate(
        shape,
        training,
        launch,
        group,
        steps=steps,
        expected_step_s=training.batch_tokens * flops_per_token(shape) / reached,
        limit_s=CALIBRATION_LIMIT_S,
    )


def _available_memory(device: str) -> int:
    """Bytes that training could take: of one GPU, or of this machine."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, {"tokenizer": "tokenizer.json"}).parse_args(argv)
    how = how_to_run(args, "plan_training", "corpus_bytes", "validation_fraction")
    args.out.mkdir(parents=True, exist_ok=True)
    with reporting_outcome():
        plan_training(
            block(Model, args.settings.get("model"), "model"),
            block(Training, args.settings.get("training"), "training"),
            how.settings,
            only_path(args.tokenizer, "tokenizer"),
            args.out,
            label=how.label,
            threads=how.threads,
            corpus_bytes=how.extras["corpus_bytes"],
            validation_fraction=how.extras["validation_fraction"] or Validation().fraction,
            prices=args.settings.get("prices") or {},
            steps_done=args.settings.get("steps_done") or 0,
            arguments=sys.argv[1:] if argv is None else argv,
        )


if __name__ == "__main__":
    main()
