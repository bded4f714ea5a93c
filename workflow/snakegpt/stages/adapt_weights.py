"""Make pretrained weights fit the model of an experiment, or say all that is in the way of it.

Reads: fetched weights (weights.json, the files beside it), or a finished training's weights and its
config.json; the experiment's tokenizer, and the one that fetched weights were trained with. Writes:
weights.safetensors, float32 under transformers' names, which training starts from; start.json, what was
changed. Nothing else has to be there, so that a mistake shows before anything is spent. By hand:

    python -m snakegpt.stages.adapt_weights --weights gpt2/model.safetensors --config gpt2/config.json \\
        --tokenizer results/tokenizers/gpt2/tokenizer.json \\
        --trained_with results/tokenizers/gpt2/tokenizer.json \\
        --settings '{"model": {"context": 256}}' --out /tmp/start
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.huggingface_format import save_weights
from snakegpt.identity import file_digest
from snakegpt.lineage import start_problems
from snakegpt.model import GPT, Shape
from snakegpt.placement import shape_of
from snakegpt.progress import say
from snakegpt.settings import Model, model_problems
from snakegpt.sources.weights import WeightFiles, weight_files
from snakegpt.starting import Pretrained, fitted, model_of, read_pretrained

REVISION = 1
SCIENCE = ("snakegpt.starting", "snakegpt.huggingface_format")


def adapt_weights(
    model: Model,
    files: WeightFiles,
    tokenizer: Path,
    trained_with: Path | None,
    out: Path,
    *,
    label: str,
) -> None:
    """Write weights.safetensors and start.json to `out`.

    tokenizer     of the experiment
    trained_with  that of the weights, for weights that do not say themselves
    raises        UserError with every reason why training cannot start from these weights
    """
    if problems := model_problems(model, "model"):
        raise UserError("\n".join(problems))
    found = read_pretrained(files.tensors, read_json(files.config))
    described = read_json(tokenizer, "n_vocab", "fingerprint")
    shape = shape_of(model, described["n_vocab"])
    _require_same_model(found, model, described["n_vocab"], files)
    _require_same_tokenizer(found, described["fingerprint"], tokenizer, trained_with, files)
    with torch.device("meta"):
        network = GPT(shape)
    network.load_state_dict(fitted(found, shape, described["n_vocab"]), assign=True)
    save_weights(out / "weights.safetensors", network, described["fingerprint"])
    facts = _changes(found.shape, shape)
    write_json(
        out / "start.json",
        {
            "files": {file.name: file_digest(file) for file in (files.config, *files.tensors)},
            "tokenizer_fingerprint": described["fingerprint"],
            **facts,
        },
    )
    told = [f"{name.replace('_', ' ')} {was:,} -> {now:,}" for name, (was, now) in facts.items()]
    say(f"{label}  {'; '.join(told) or 'fit as they are'}")


def _changes(found: Shape, wanted: Shape) -> dict[str, list[int]]:
    """What is not as it was: context, vocabulary_rows -> [before, after]."""
    pairs = {
        "context": [found.context, wanted.context],
        "vocabulary_rows": [found.vocabulary, wanted.vocabulary],
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _require_same_model(found: Pretrained, wanted: Model, n_vocab: int, files: WeightFiles) -> None:
    problems = start_problems(model_of(found.shape), wanted)
    if found.shape.vocabulary < n_vocab:
        problems.append(
            f"they have rows for {found.shape.vocabulary:,} ids, the tokenizer has {n_vocab:,}:"
            " use the tokenizer that they were trained with"
        )
    if problems:
        raise UserError(
            f"{files.tensors[0]} is of another model than the one to be trained:\n  "
            + "\n  ".join(problems)
            + "\n  change the experiment's model, or training.start_from"
        )


def _require_same_tokenizer(
    found: Pretrained, wanted: str, tokenizer: Path, trained_with: Path | None, files: WeightFiles
) -> None:
    known = {str(files.tensors[0]): found.fingerprint}
    if trained_with:
        known[str(trained_with)] = read_json(trained_with, "fingerprint")["fingerprint"]
    told = {where: fingerprint for where, fingerprint in known.items() if fingerprint}
    if not told:
        raise UserError(
            f"{files.tensors[0]} does not say with which tokenizer it was trained.\n"
            "  name its tokenizer.json: --trained_with"
        )
    for where, fingerprint in told.items():
        if fingerprint != wanted:
            raise UserError(
                f"the weights were trained with tokenizer {fingerprint} ({where}),\n"
                f"  the experiment uses {wanted} ({tokenizer}).\n"
                "  give the experiment the tokenizer of the weights"
            )


def _files(weights: list[Path], config: list[Path]) -> WeightFiles:
    """A weights.json speaks for its files; else safetensors come with their config.json."""
    if len(weights) == 1 and weights[0].suffix == ".json" and not config:
        return weight_files(only_path(weights, "weights"))
    if not weights:
        raise UserError("--weights wants a weights.json, or safetensors files.")
    return WeightFiles(
        only_path(config, "config"), [only_path([path], "weights") for path in weights]
    )


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "weights": "weights.json of fetched weights, or safetensors files",
        "config": "config.json of safetensors files",
        "tokenizer": "tokenizer.json of the experiment",
        "trained_with": "tokenizer.json of weights that do not say their own",
    }
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "adapt_weights")
    args.out.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = args.settings.get("model") or {}
    adapt_weights(
        block(Model, given, "model"),
        _files(args.weights, args.config),
        only_path(args.tokenizer, "tokenizer"),
        only_path(args.trained_with, "trained_with") if args.trained_with else None,
        args.out,
        label=how.label,
    )


if __name__ == "__main__":
    main()
