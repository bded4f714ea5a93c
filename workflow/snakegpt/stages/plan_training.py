"""Say what a training run will take, as a table and as plan.json, before anything is spent.

Reads: tokenizer.json. Writes: plan.json, UTF-8: parameters, FLOPs, tokens, steps, epochs, memory of a
rank and disk in bytes, and a time that follows from half a second of matrix products measured here.
By hand:

    python -m snakegpt.stages.plan_training --tokenizer results/tokenizers/gpt2/tokenizer.json \\
        --settings '{"model": {"layers": 12}, "training": {"steps": 1000}}' --out /tmp/plan
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from snakegpt import distributed, planning
from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.model import Shape
from snakegpt.placement import choose_passes, shape_of
from snakegpt.progress import say
from snakegpt.settings import Execution, Model, Training, Validation

REVISION = 1  # bump when the bytes of plan.json change by code outside SCIENCE
SCIENCE = ("snakegpt.planning",)


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
) -> dict[str, Any]:
    """Plan a run on this machine, print the plan and write it to plan.json in `out`.

    corpus_bytes  raw size of the corpus; None while it is not locked
    raises        UserError if settings and machine do not fit each other, or the disk is too small
    """
    described = read_json(tokenizer, "n_vocab", "kind")
    shape = shape_of(model, described["n_vocab"])
    placement = _place(model, training, execution, shape, threads)
    torch.set_num_threads(placement.threads * placement.ranks)
    say(f"{label}  measures matrix products on {placement.device}")
    rate = planning.measure_matmul(placement.device, placement.precision)
    plan = planning.plan(
        shape,
        placement,
        batch_tokens=training.batch_tokens,
        steps=training.steps,
        validation_interval=training.validation_interval,
        validation_tokens=training.validation_tokens,
        tokenizer_kind=described["kind"],
        corpus_bytes=corpus_bytes,
        validation_fraction=validation_fraction,
        matmul_flops_per_s=rate * (placement.ranks if placement.device == "cuda" else 1),
    )
    disk = shutil.disk_usage(out)
    memory = _available_memory(placement.device)
    plan |= {"free_disk_bytes": disk.free, "available_memory_bytes": memory}
    for line in (label, *planning.table(plan)):
        say(line)
    planning.refuse_what_cannot_fit(plan["disk_bytes"], disk.free, disk.total, "this disk")
    for warning in planning.warnings(plan):
        say(f"  warning: {warning}")
    write_json(out / "plan.json", plan)
    return plan


def _place(
    model: Model, training: Training, execution: Execution, shape: Shape, threads: int
) -> planning.Placement:
    """Devices, ranks and micro-batches as train_model would choose them."""
    rows, rest = divmod(training.batch_tokens, model.context)
    if rest or not rows:
        raise UserError(
            f"training.batch_tokens = {training.batch_tokens:,} is not a multiple of"
            f" model.context = {model.context:,}; nearest that fit: {max(rows, 1) * model.context:,}"
            f" and {(max(rows, 1) + 1) * model.context:,}"
        )
    device = distributed.choose_device(execution.device)
    ranks = distributed.choose_ranks(execution.ranks, device=device, rows=rows, threads=threads)
    share = rows // ranks
    passes = choose_passes(training, execution, shape, device=device, share=share)
    return planning.Placement(
        device=device,
        precision=str(passes.dtype).removeprefix("torch."),
        ranks=ranks,
        rows_per_rank=passes.micro_rows,
        accumulation=share // passes.micro_rows,
        threads=max(1, threads // ranks),
        attention=passes.kernel,
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
    )


if __name__ == "__main__":
    main()
