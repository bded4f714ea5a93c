"""Train a GPT on tokens, on one process or many; interrupted, the same command goes on where it was.

Reads: manifest.json of a token set, its shards beside it. Writes: weights.safetensors (last) and
best.safetensors (lowest validation loss), float32 under the names of transformers' GPT2LMHeadModel or
NanoChatForCausalLM; config.json, which transformers loads; metrics.jsonl, one JSON object a line;
optimizer.safetensors, what else of a run another one needs to go on from it. By hand:

    python -m snakegpt.stages.train_model --tokens results/tokens/shakespeare-gpt2/manifest.json \\
        --settings '{"model": {"layers": 2, "heads": 2, "channels": 64, "context": 64},
                     "training": {"batch_tokens": 1024, "steps": 50, "warmup_steps": 5}}' --out /tmp/gpt

The number of processes comes from --execution '{"ranks": 2}'; they are started here, or by torchrun.
Given the --weights, --config and --optimizer of a finished run, and more steps, it goes on from there;
given --initial, the weights that adapt_weights has left, a training of its own starts from those.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from snakegpt import distributed, launching
from snakegpt.command import block, how_to_run, only_path, stage_parser, write_json
from snakegpt.continuation import Finished, finished
from snakegpt.errors import UserError, reports_errors
from snakegpt.huggingface_format import to_config
from snakegpt.identity import file_digest
from snakegpt.metrics import require_writers
from snakegpt.model import n_parameters
from snakegpt.network.interfaces import require_known
from snakegpt.network.meeting import Meeting, told_to_all
from snakegpt.nodes import choose_ranks_per_node, on_every_node, place_of
from snakegpt.outcomes import reporting_outcome
from snakegpt.placement import (
    choose_passes,
    in_one_order,
    rows_of_a_step,
    shape_of,
    shares,
    threads_of_rank,
)
from snakegpt.settings import Execution, Model, Training, model_problems, science
from snakegpt.starting import Start, adapted
from snakegpt.tokens import open_sets, read_manifest
from snakegpt.trainer import Trainer
from snakegpt.training_state import newest_step
from snakegpt.updates import Launch
from snakegpt.watchdog import Watchdog

MODULE = "snakegpt.stages.train_model"
# Bump when trainer.py or this file changes what is trained; tests/test_trainer.py tells.
REVISION = 3
SCIENCE = (
    "snakegpt.model",
    "snakegpt.activations",
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
    continued: tuple[Path, Path, Path] | None = None,
    initial: Path | None = None,
    started_from: str | None = None,
    label: str,
    threads: int,
    network: Path | None,
    arguments: list[str],
) -> None:
    """Train as one rank, or start the ranks that do.

    continued     weights, config and optimizer of the finished run to go on from
    initial       weights to start from, of this very model
    started_from  what people call those or that run, for metrics.jsonl
    arguments     this command's own, for the ranks
    raises        UserError before the first step if tokens, settings and machine do not fit each other
    """
    if problems := model_problems(model, "model"):
        raise UserError("\n".join(problems))
    require_writers(execution.tensorboard, execution.wandb)
    manifest = read_manifest(tokens)
    vocabulary = manifest["tokenizer"]["n_vocab"]
    shape = shape_of(model, vocabulary)
    rows = rows_of_a_step(model, training)
    device = distributed.choose_device(execution.device)
    place = place_of(os.environ)
    if execution.nodes > 1 and place is None and not distributed.is_rank():
        on_every_node(
            MODULE,
            arguments,
            nodes=execution.nodes,
            threads=threads,
            shared=state / "ranks",
            stop_timeout_s=execution.stop_timeout_s,
        )
        return
    execution = in_one_order(execution, rows)
    divisible = shares(execution, rows)
    ranks = distributed.world_size()
    if ranks is None:
        nodes = place.nodes if place else 1
        ranks = nodes * choose_ranks_per_node(
            execution, nodes=nodes, device=device, rows=divisible, threads=threads
        )
    distributed.require_divisor(ranks, divisible)
    train, validation = (open_sets(tokens, manifest, split) for split in ("train", "val"))
    if any(len(part.stream) < 2 for part in validation):
        raise UserError(
            f"the validation split of {tokens} has no token to predict: 2 are the least.\n"
            "  raise the corpus's validation.fraction, or take a larger corpus"
        )
    fingerprint = manifest["tokenizer"]["fingerprint"]
    before: Finished | Start | None = None
    if continued:
        before = finished(
            *continued, shape=shape, recipe=training, tokenizer_fingerprint=fingerprint
        )
    elif initial:
        before = adapted(initial, shape, fingerprint)
    windows = sum((len(part.stream) - 1) // model.context for part in train)
    if 0 < windows < ranks:
        raise UserError(
            f"{ranks} ranks would share {windows} windows of {model.context:,} tokens, which is all that"
            f" the training split of {tokens} holds.\n"
            f"  set execution.ranks to at most {windows}, or use a smaller model.context"
        )
    if ranks > 1 and not distributed.is_rank():
        nodes = place.nodes if place else 1
        environment = {}
        if execution.network_environment:
            environment = launching.advised_environment(network, nodes, label=label)
        how: dict[str, Any] = {
            "ranks": ranks // nodes,
            "threads": threads,
            "environment": environment,
            "logs": state / "ranks" / f"node{place.node if place else 0}",
            "stop_timeout_s": execution.stop_timeout_s,
        }
        if place is None:
            require_known(os.environ)
            restarts, progress = execution.restarts, lambda: newest_step(state)
            launching.launch(MODULE, arguments, restarts=restarts, progress=progress, **how)
            return
        # torchrun would say that a node is missing, but not which.
        wait_s = execution.hang_timeout_s or launching.START_TIMEOUT_S
        with told_to_all(Meeting(place, wait_s)):
            require_known(os.environ)
        launching.run_ranks(
            MODULE, arguments, place, share_outcome=True, start_timeout_s=wait_s, **how
        ).raise_for_status()
        return
    if device == "cpu":
        distributed.keep_freed_memory()
    # The watchdog comes first, and says more than an exchange that was waited for too long.
    patience_s = execution.hang_timeout_s and execution.hang_timeout_s + 60
    with (
        Watchdog(execution.hang_timeout_s) as watchdog,
        distributed.joined(device, patience_s) as group,
    ):
        one_order = execution.deterministic
        torch.set_num_threads(threads_of_rank(execution, threads, group.local_ranks))
        if one_order:
            # By default not even mentioned: it loads torch's compiler, which takes seconds.
            torch.use_deterministic_algorithms(True)
        share = rows // group.ranks
        passes = choose_passes(training, execution, shape, device=device, share=share)
        launch = Launch.of(
            label,
            device,
            execution,
            passes,
            probed=device == "cuda" and execution.rows_per_rank == "auto",
            strategy=distributed.choose_strategy(
                execution.strategy,
                device=device,
                ranks=group.ranks,
                n_parameters=n_parameters(shape),
            ),
            deterministic=one_order,
            keep_states=execution.keep_states,
            profile_step=execution.profile_step,
            tensorboard=execution.tensorboard,
            wandb=execution.wandb,
        )
        end_of_text = manifest["tokenizer"]["end_of_text"]
        trainer = Trainer(
            shape,
            training,
            train,
            validation,
            launch,
            group,
            state,
            fingerprint,
            end_of_text=end_of_text,
            inputs={"tokens": file_digest(tokens)},
            before=before,
            started_from=started_from,
            watchdog=watchdog,
        )
        trainer.run(out)
        if group.leads:
            config = to_config(
                shape,
                n_vocab=vocabulary,
                end_of_text=end_of_text,
                tokenizer_fingerprint=fingerprint,
                model=science(model),
            )
            write_json(out / "config.json", config)


def _continued(args: argparse.Namespace) -> tuple[Path, Path, Path] | None:
    roles = ("weights", "config", "optimizer")
    given = [role for role in roles if getattr(args, role)]
    if not given:
        return None
    if args.initial:
        raise UserError(
            "--initial begins anew from weights, --optimizer goes on: give one of them."
        )
    if len(given) < 3:
        raise UserError(f"to go on from a finished run takes all of --{', --'.join(roles)}.")
    weights, config, optimizer = (only_path(getattr(args, role), role) for role in roles)
    return weights, config, optimizer


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "tokens": "manifest.json of the tokens, shards beside it",
        "weights": "weights.safetensors of a finished run to go on from",
        "config": "its config.json",
        "optimizer": "its optimizer.safetensors",
        # Not --start: torchrun, which gets these words too, takes that for the beginning of its own.
        "initial": "weights.safetensors of adapt_weights to start from",
    }
    args = stage_parser(__doc__, roles, state=True).parse_args(argv)
    how = how_to_run(args, "train_model", "network", "started_from")
    network = how.extras["network"]
    args.out.mkdir(parents=True, exist_ok=True)
    with reporting_outcome():
        train_model(
            block(Model, args.settings.get("model"), "model"),
            block(Training, args.settings.get("training"), "training"),
            how.settings,
            only_path(args.tokens, "tokens"),
            args.out,
            args.state or args.out / ".state",
            continued=_continued(args),
            initial=only_path(args.initial, "initial") if args.initial else None,
            started_from=how.extras["started_from"],
            label=how.label,
            threads=how.threads,
            network=Path(network) if network else None,
            arguments=sys.argv[1:] if argv is None else argv,
        )
    if args.state is None and not distributed.is_rank():
        shutil.rmtree(args.out / ".state", ignore_errors=True)  # it has served


if __name__ == "__main__":
    main()
    # All is written. Where torch's profiler and compiler were both used, torch 2.13 crashes as the
    # interpreter ends (seen on a CPU), which would pass for a failed training.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
