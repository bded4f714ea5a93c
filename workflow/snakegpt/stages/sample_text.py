"""Let a trained model continue the prompts of the settings.

Reads: weights (safetensors), config.json, tokenizer.json. Writes: samples.jsonl, one JSON object a
sample: prompt, sample (its number), text (the continuation), ids, finish_reason. By hand:

    python -m snakegpt.stages.sample_text --weights results/models/gpt2/best.safetensors \\
        --config results/models/gpt2/config.json \\
        --tokenizer results/tokenizers/gpt2/tokenizer.json \\
        --settings '{"sampling": {"prompts": ["ROMEO:"], "max_tokens": 50}}' --out /tmp/samples
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from snakegpt.command import block, how_to_run, only_path, read_json, stage_parser
from snakegpt.distributed import choose_device
from snakegpt.errors import reports_errors
from snakegpt.huggingface_format import load_model
from snakegpt.progress import Progress
from snakegpt.sampling import continue_ids, sample_generator
from snakegpt.settings import Sampling
from snakegpt.tokenizers import load as load_tokenizer
from snakegpt.tokens import require_same_tokenizer

REVISION = 1
SCIENCE = (
    "snakegpt.sampling",
    "snakegpt.model",
    "snakegpt.activations",
    "snakegpt.tokenizers",
    "snakegpt.huggingface_format",
)


def sample_text(
    weights: Path,
    config: Path,
    tokenizer: Path,
    sampling: Sampling,
    out: Path,
    *,
    device: str,
    label: str,
    log_interval_s: float,
) -> None:
    """Write the continuations of all prompts to samples.jsonl in `out`.

    raises  UserError if model and tokenizer do not belong together, or a prompt cannot be encoded
    """
    described = read_json(config, "snakegpt")
    loaded = load_tokenizer(tokenizer)
    fingerprint = described["snakegpt"]["tokenizer_fingerprint"]
    require_same_tokenizer(fingerprint, str(config), loaded.fingerprint, str(tokenizer))
    encoded = [list(loaded.encode(prompt)) for prompt in sampling.prompts]
    model = load_model(weights, described).to(device)
    total = len(encoded) * sampling.samples_per_prompt
    progress = Progress(label, total, "samples", interval_s=log_interval_s)
    lines = []
    for number, (prompt, ids) in enumerate(zip(sampling.prompts, encoded, strict=True)):
        for sample in range(sampling.samples_per_prompt):
            new, reason = continue_ids(
                model,
                [int(i) for i in ids] or [loaded.end_of_text],
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                generator=sample_generator(sampling.seed, number, sample),
                n_vocab=loaded.n_vocab,
                end_of_text=loaded.end_of_text,
            )
            line = {
                "prompt": prompt,
                "sample": sample,
                "text": loaded.decode(new),
                "ids": new,
                "finish_reason": reason,
            }
            lines.append(json.dumps(line, ensure_ascii=False, sort_keys=True))
            progress.update(len(lines))
    (out / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "weights": "weights, safetensors",
        "config": "config.json of the model",
        "tokenizer": "tokenizer.json",
    }
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "sample_text")
    torch.set_num_threads(how.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    sample_text(
        only_path(args.weights, "weights"),
        only_path(args.config, "config"),
        only_path(args.tokenizer, "tokenizer"),
        block(Sampling, args.settings.get("sampling"), "sampling"),
        args.out,
        device=choose_device(how.settings.device),
        label=how.label,
        log_interval_s=how.settings.log_interval_s,
    )


if __name__ == "__main__":
    main()
