"""Train a GPT on tokens, on one process or many; interrupted, the same command goes on where it was.

Reads: manifest.json of a token set, its shards beside it. Writes: weights.safetensors (last) and
best.safetensors (lowest validation loss), float32 under the names of transformers' GPT2LMHeadModel;
config.json, which transformers loads; metrics.jsonl, one JSON object a line. By hand:

    python -m snakegpt.stages.train_model --tokens results/tokens/shakespeare-gpt2/manifest.json \\
        --settings '{"model": {"layers": 2, "heads": 2, "channels": 64, "context": 64},
                     "training": {"batch_tokens": 1024, "steps": 50, "warmup_steps": 5}}' --out /tmp/gpt

The number of processes comes from --execution '{"ranks": 2}'; they are started here, or by torchrun.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from snakegpt import distributed, launching
from snakegpt.command import block, how_to_run, only_path, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.huggingface_format import to_config
from snakegpt.placement import choose_passes, shape_of
from snakegpt.settings import Execution, Model, Training
from snakegpt.tokens import open_split, read_manifest
from snakegpt.trainer import Launch, Recipe, Trainer

MODULE = "snakegpt.stages.train_model"
# Bump when trainer.py or this file changes what is trained; tests/test_trainer.py tells.
REVISION = 1
SCIENCE = (
    "snakegpt.model",
    "snakegpt.optimizer",
    "snakegpt.batches",
    "snakegpt.huggingface_format",
)


def train_model(
    model: Model,
    training: Training,
    execution: Execution,
    tokens: Path,
    out: Path,
    state: Path,
    *,
    label: str,
    threads: int,
    network: Path | None,
    arguments: list[str],
) -> None:
    """Train as one rank, or start the ranks that do.

    arguments  this command's own, for the ranks
    raises     UserError before the first step if tokens, settings and machine do not fit each other
    """
    manifest = read_manifest(tokens)
    vocabulary = manifest["tokenizer"]["n_vocab"]
    shape = shape_of(model, vocabulary)
    rows = training.batch_tokens // model.context
    if rows * model.context != training.batch_tokens or model.channels % model.heads:
        raise UserError(
            "training.batch_tokens must be a multiple of model.context, and model.channels of model.heads."
        )
    device = distributed.choose_device(execution.device)
    place = launching.place_of(os.environ)
    if execution.nodes > 1 and place is None and not distributed.is_rank():
        launching.on_every_node(
            MODULE, arguments, nodes=execution.nodes, threads=threads, shared=state / "ranks"
        )
        return
    nodes = place.nodes if place else 1
    ranks = launching.choose_ranks_per_node(
        execution, nodes=nodes, device=device, rows=rows, threads=threads
    )
    train, validation = (open_split(tokens, manifest, split) for split in ("train", "val"))
    if len(validation) < 2:
        raise UserError(f"the validation split of {tokens} has no token to predict.")
    if ranks * nodes > 1 and not distributed.is_rank():
        advised = launching.advised_environment(network, nodes, label=label)
        environment = advised if execution.network_environment else {}
        if place:
            launching.run_ranks(
                MODULE,
                arguments,
                place,
                ranks=ranks,
                threads=threads,
                environment=environment,
                logs=state / "ranks" / f"node{place.node}",
                share_outcome=True,
            ).raise_for_status()
            return
        distributed.launch(MODULE, arguments, ranks=ranks, threads=threads, environment=environment)
        return
    if device == "cpu":
        distributed.keep_freed_memory()
    with distributed.joined(device) as group:
        torch.set_num_threads(max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        share = rows // group.ranks
        passes = choose_passes(training, execution, shape, device=device, share=share)
        launch = Launch(
            label=label,
            device=device,
            dtype=passes.dtype,
            kernel=passes.kernel,
            compiled=device == "cuda" if execution.compiled == "auto" else execution.compiled,
            micro_rows=passes.micro_rows,
            threads=torch.get_num_threads(),
            log_interval_s=execution.log_interval_s,
            save_interval_s=execution.save_interval_s,
        )
        recipe = Recipe(**training.model_dump())
        fingerprint = manifest["tokenizer"]["fingerprint"]
        trainer = Trainer(shape, recipe, train, validation, launch, group, state, fingerprint)
        trainer.run(out)
        if group.leads:
            config = to_config(
                shape,
                n_vocab=vocabulary,
                end_of_text=manifest["tokenizer"]["end_of_text"],
                tokenizer_fingerprint=fingerprint,
                model=model.model_dump(),
            )
            write_json(out / "config.json", config)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {"tokens": "manifest.json of the tokens, shards beside it"}
    args = stage_parser(__doc__, roles, state=True).parse_args(argv)
    how = how_to_run(args, "train_model", "network")
    network = how.extras["network"]
    args.out.mkdir(parents=True, exist_ok=True)
    with distributed.reporting_outcome():
        train_model(
            block(Model, args.settings.get("model"), "model"),
            block(Training, args.settings.get("training"), "training"),
            how.settings,
            only_path(args.tokens, "tokens"),
            args.out,
            args.state or args.out / ".state",
            label=how.label,
            threads=how.threads,
            network=Path(network) if network else None,
            arguments=sys.argv[1:] if argv is None else argv,
        )
    if args.state is None and not distributed.is_rank():
        shutil.rmtree(args.out / ".state", ignore_errors=True)  # it has served


if __name__ == "__main__":
    main()
