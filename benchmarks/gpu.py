"""Training GPT-2 124M on one GPU against nanoGPT's own train.py: tokens a second, and of the device's peak.

python benchmarks/gpu.py --nanogpt ../nanoGPT            10 minutes on an H100, most of them compiling

Both sides are whole processes that train the same shape (12 layers, 12 heads, 768 channels, context 1,024,
no biases, 50,304 ids) in bfloat16 on steps of 491,520 random tokens, as nanoGPT's config/train_gpt2.py has
it: once as it does, 12 rows at a time, and once with as many rows at a time as ours.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Row, finish, in_turn, parser
from snakegpt.hardware import measure_matmul
from snakegpt.model import Shape, flops_per_token
from trainers import copy_nanogpt, nanogpt_steps_s, our_steps_s, write_token_set

VOCABULARY, CONTEXT, ROWS, OURS_AT_ONCE = 50_257, 1024, 480, 60
GPT2 = Shape(vocabulary=50_304, layers=12, heads=12, channels=768, context=CONTEXT, bias=False)
WARM_UP = 4  # steps


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    made.add_argument(
        "--steps", type=int, default=12, help=f"of each run; the first {WARM_UP} warm up"
    )
    made.set_defaults(rounds=1)
    args = made.parse_args()
    if not torch.cuda.is_available():
        made.error("there is no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        rows = train(args.nanogpt, Path(name), args.steps, args.rounds)
    finish(rows, as_json=args.json)


def train(nanogpt: Path, folder: Path, steps: int, rounds: int) -> list[Row]:
    """Both sides in turn, and the matrix product of the device beside them."""
    manifest = write_tokens(folder)
    peak = measure_matmul("cuda", "bfloat16", limit_s=1.0)
    found = in_turn(
        rounds,
        snakegpt=lambda: ours(folder, manifest, steps),
        nanogpt=lambda: theirs(nanogpt, folder, steps, rows=12),
        nanogpt_wide=lambda: theirs(nanogpt, folder, steps, rows=OURS_AT_ONCE),
    )
    rate = {name: statistics.median(values) for name, values in found.items()}
    share = rate["snakegpt"] * flops_per_token(GPT2) / peak
    against, wide = (rate["snakegpt"] / rate[name] for name in ("nanogpt", "nanogpt_wide"))
    fast = rate["snakegpt"] >= 465e3 or share >= 0.5
    bar = "at least 465,000 tokens/s, or half of the measured peak"
    return [
        Row("GPT-2 124M", "tokens/s", rate, rate["snakegpt"], bar, fast),
        Row("share of a matrix product's", "TFLOP/s", {"peak": peak / 1e12}, share, bar, fast),
        Row(
            "against nanoGPT's own configuration", "x", {}, against, "at least 1.3", against >= 1.3
        ),
        Row("against its best micro-batch", "x", {}, wide, "none, beside it", True),
    ]


def ours(folder: Path, manifest: Path, steps: int) -> float:
    """Tokens a second of train_model, everything but the length as its defaults have it."""
    settings = {
        "model": {"layers": 12, "heads": 12, "channels": 768, "context": CONTEXT, "bias": False},
        "training": {
            "batch_tokens": ROWS * CONTEXT,
            "steps": steps,
            "warmup_steps": 2,
            "validation_interval": steps,
            "validation_tokens": CONTEXT,
        },
    }
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [
        *(sys.executable, "-m", "snakegpt.stages.train_model"),
        *("--tokens", str(manifest), "--out", str(out), "--settings", json.dumps(settings)),
        *("--execution", json.dumps({"profile_step": None})),
    ]
    said = _output(command)
    print(said, file=sys.stderr)
    return ROWS * CONTEXT / statistics.median(our_steps_s(out)[WARM_UP:])


def theirs(nanogpt: Path, folder: Path, steps: int, *, rows: int) -> float:
    """Tokens a second of nanoGPT's train.py on config/train_gpt2.py, without its evaluations."""
    options = {
        "wandb_log": False,
        "out_dir": str(folder / "out"),
        "eval_interval": 10**9,
        "eval_iters": 1,
        "log_interval": 1,
        "max_iters": steps,
        "batch_size": rows,
        "gradient_accumulation_steps": ROWS // rows,
    }
    work = folder / "nanogpt"
    where = "data_dir = os.path.join('data', dataset)"
    changes = {where: f"data_dir = {str(folder)!r}"}
    copy_nanogpt(nanogpt, work, changes, more=["config/train_gpt2.py"])
    given = [f"--{name}={value}" for name, value in options.items()]
    said = _output([sys.executable, "train.py", "config/train_gpt2.py", *given], work)
    times = nanogpt_steps_s(said)
    assert len(times) > WARM_UP, said
    return ROWS * CONTEXT / statistics.median(times[WARM_UP:])


def _output(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{command[1:3]} failed:\n{done.stdout}")
    return done.stdout


def write_tokens(folder: Path) -> Path:
    """Random ids: our manifest and shards, and nanoGPT's files beside them."""
    draw = np.random.default_rng(0)
    ids = {
        split: draw.integers(0, VOCABULARY, n, dtype=np.uint16)
        for split, n in (("train", 20_000_000), ("val", 1_000_000))
    }
    for split, part in ids.items():
        part.tofile(folder / f"{split}.bin")
    return write_token_set(folder, ids, n_vocab=VOCABULARY, end_of_text=50_256)


if __name__ == "__main__":
    main()
