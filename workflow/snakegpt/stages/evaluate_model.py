"""Measure a trained model on the validation split: loss, perplexity and bits per byte.

Reads: last and best weights (safetensors), their config.json, the tokens' manifest.json and the
tokenizer. Writes: evaluation.json, the scores of both, of a mixture also corpus by corpus (`sets`, in
the order of its weights). The whole split in order, in float32 on any device; the end-of-text id
decodes to no byte, so its loss counts in loss_nats but not in bits_per_byte. By hand:

    python -m snakegpt.stages.evaluate_model --weights results/models/gpt2/weights.safetensors \\
        --best results/models/gpt2/best.safetensors --config results/models/gpt2/config.json \\
        --tokens results/tokens/shakespeare-gpt2/manifest.json \\
        --tokenizer results/tokenizers/gpt2/tokenizer.json --out /tmp/evaluation
"""

from __future__ import annotations

import filecmp
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser, write_json
from snakegpt.distributed import choose_device, keep_freed_memory
from snakegpt.errors import UserError, reports_errors
from snakegpt.evaluation import Score, evaluate
from snakegpt.huggingface_format import load_model
from snakegpt.progress import Progress, say
from snakegpt.settings import Evaluation
from snakegpt.tokenizers import load as load_tokenizer
from snakegpt.tokens import open_sets, read_manifest, require_same_tokenizer

REVISION = 1
SCIENCE = (
    "snakegpt.evaluation",
    "snakegpt.model",
    "snakegpt.activations",
    "snakegpt.batches",
    "snakegpt.tokenizers",
    "snakegpt.huggingface_format",
)


def evaluate_model(
    weights: Path,
    best: Path,
    config: Path,
    tokens: Path,
    tokenizer: Path,
    evaluation: Evaluation,
    out: Path,
    *,
    device: str,
    label: str,
    log_interval_s: float,
) -> None:
    """Score last and best weights and write evaluation.json to `out`.

    raises  UserError if model, tokens and tokenizer do not belong together
    """
    described = read_json(config, "snakegpt")
    manifest = read_manifest(tokens)
    loaded = load_tokenizer(tokenizer)
    fingerprint = described["snakegpt"]["tokenizer_fingerprint"]
    require_same_tokenizer(
        fingerprint, str(config), manifest["tokenizer"]["fingerprint"], str(tokens)
    )
    require_same_tokenizer(fingerprint, str(config), loaded.fingerprint, str(tokenizer))
    streams = [part.stream for part in open_sets(tokens, manifest, "val")]
    if any(len(stream) < 2 for stream in streams):
        raise UserError(f"the validation split of {tokens} has no token to predict.")
    total = sum(min(len(stream) - 1, evaluation.tokens or len(stream)) for stream in streams)

    def score(file: Path, name: str) -> tuple[Score, list[Score]]:
        model = load_model(file, described).to(device)
        progress = Progress(f"{label}  {name}", total, "tokens", interval_s=log_interval_s)
        rows = max(1, 2048 // model.shape.context)  # logits of a few thousand tokens at once
        n_bytes, limit = loaded.token_bytes(), evaluation.tokens
        try:
            found, parts = evaluate(
                model, streams, n_bytes, rows=rows, n_targets=limit, progress=progress
            )
        except ValueError as error:  # every target ends a text
            raise UserError(
                f"the validation split of {tokens} cannot be scored: {error}."
            ) from None
        say(
            f"{label}  {name}: loss {found.loss_nats:.4f} nats, perplexity {found.perplexity:.2f},"
            f" {found.bits_per_byte:.4f} bits per byte"
        )
        return found, parts

    last, last_parts = score(weights, "last weights")
    same = filecmp.cmp(weights, best, shallow=False)
    lowest, parts = (last, last_parts) if same else score(best, "best weights")
    result = {
        "split": "val",
        "n_tokens": last.n_tokens,
        "n_bytes": last.n_bytes,
        "weights": _scores(last),
        "best": _scores(lowest),
        "tokenizer_fingerprint": fingerprint,
    }
    if len(streams) > 1:
        pairs = zip(last_parts, parts, strict=True)
        result["sets"] = [
            {
                "n_tokens": a.n_tokens,
                "n_bytes": a.n_bytes,
                "weights": _scores(a),
                "best": _scores(b),
            }
            for a, b in pairs
        ]
    write_json(out / "evaluation.json", result)


def _scores(score: Score) -> dict[str, Any]:
    return {k: v for k, v in asdict(score).items() if k not in ("n_tokens", "n_bytes")}


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "weights": "last weights, safetensors",
        "best": "best weights, safetensors",
        "config": "config.json of the model",
        "tokens": "manifest.json of the tokens, shards beside it",
        "tokenizer": "tokenizer.json",
    }
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "evaluate_model")
    torch.set_num_threads(how.threads)
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    evaluate_model(
        only_path(args.weights, "weights"),
        only_path(args.best, "best"),
        only_path(args.config, "config"),
        only_path(args.tokens, "tokens"),
        only_path(args.tokenizer, "tokenizer"),
        block(Evaluation, args.settings.get("evaluation"), "evaluation"),
        args.out,
        device=choose_device(how.settings.device),
        label=how.label,
        log_interval_s=how.settings.log_interval_s,
    )


if __name__ == "__main__":
    main()
