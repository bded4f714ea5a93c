"""Training against nanoGPT's own train.py: speed, time to a loss, the same loss, memory, first step.

python benchmarks/train.py --nanogpt ../nanoGPT --text tinyshakespeare.txt --parts speed start
python benchmarks/train.py --nanogpt ../nanoGPT --text tinyshakespeare.txt --parts modern --folder runs
python benchmarks/train.py --parts memory

Parts: speed (tokens/s at two shapes), modern (time to nanoGPT's loss after 2,000 steps with architecture
modern and Muon), tuned (the same against nanoGPT with a learning rate of 6e-3), gpt2 (the same loss by
its own recipe), memory (of head and loss), start (to the first step). Runs of 2,000 steps take minutes
each; what lies in --folder is not run again, so parts can be measured one by one.

Both sides are whole processes on the same tokens (nanoGPT's: one id a character, the last tenth for
validation), with two CPU threads, and both models are scored on the same windows: all of validation, in
order. CPU time stands beside wall time, since other work on the machine lengthens the latter; it lengthens
CPU time too where threads spin while they wait for each other, so on a busy machine use --threads 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, finish, in_turn, parser
from snakegpt.batches import TokenStream, sequential_batches
from snakegpt.huggingface_format import load_model
from snakegpt.shards import read_shard
from trainers import copy_nanogpt, nanogpt_steps_s, our_steps_s, write_token_set

PARTS = ("speed", "modern", "tuned", "gpt2", "memory", "start")
README = {"layers": 4, "heads": 4, "channels": 128, "context": 64, "rows": 12}
LARGER = {"layers": 6, "heads": 6, "channels": 384, "context": 256, "rows": 16}
STEPS = 2000
# nanoGPT's recipe for this data.
RECIPE = {
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
    "warmup_steps": 100,
    "beta2": 0.99,
    "weight_decay": 0.1,
}
MODERN = {"architecture": "modern", "tie_embeddings": False}
MUON = {
    "optimizer": "muon",
    "learning_rate": 0.02,
    "muon_learning_rate": 0.04,
    "muon_momentum": 0.9,  # runs of a hundred steps: a shorter memory
    "min_learning_rate": 0.0,
    "schedule": "warmup_stable_decay",
    "warmup_steps": 0,
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    made.add_argument("--text", type=Path, help="what both train on, such as Tiny Shakespeare")
    made.add_argument("--folder", type=Path, help="where to work, and where finished runs stay")
    made.add_argument(
        "--seeds", type=int, default=3, help="runs of each side that losses are means of"
    )
    made.add_argument("--modern-steps", type=int, default=124, help="steps of 1,536 tokens")
    made.add_argument(
        "--tuned-steps", type=int, default=300, help="the same, against the tuned one"
    )
    made.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    made.add_argument("--precision", default="auto", help="ours: auto | float32 | bfloat16")
    args = made.parse_args()
    if args.parts != ["memory"] and not (args.nanogpt and args.text):
        made.error("all parts but memory need --nanogpt and --text")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, (args.folder or Path(temporary)).resolve())
        rows = [row for part in args.parts for row in getattr(bench, part)()]
    finish(rows, as_json=args.json)


class Bench:
    """Two trainers on the same tokens, each as its users start it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        folder.mkdir(parents=True, exist_ok=True)
        if args.text:
            self.manifest, self.validation = _write_tokens(args.text, folder)

    # ---- the parts ----

    def speed(self) -> list[Row]:
        """Tokens a second, medians of steps; and of CPU time, from two runs of different lengths."""
        rows = []
        for what, size, steps, bar in (("README", README, 60, 1.6), ("larger", LARGER, 10, 1.8)):
            tokens = size["context"] * size["rows"]
            figures: dict[str, list[tuple[float, float]]] = {"snakegpt": [], "nanogpt": []}

            def measure(
                side: str, run: Callable[..., dict[str, Any]], size=size, steps=steps
            ) -> None:  # type: ignore[no-untyped-def]
                short, long = (run(size, steps=n, seed=0, keep=False) for n in (2, steps))
                cpu_s = (long["cpu_s"] - short["cpu_s"]) / (steps - 2)
                figures[side].append((statistics.median(long["step_s"][2:]), cpu_s))  # noqa: B023

            in_turn(
                self.args.rounds,
                snakegpt=lambda: measure("snakegpt", self.ours),
                nanogpt=lambda: measure("nanogpt", self.theirs),
            )
            for index, kind in enumerate(("wall", "CPU")):
                rate = {
                    side: tokens / statistics.median(f[index] for f in found)
                    for side, found in figures.items()
                }
                ratio = rate["snakegpt"] / rate["nanogpt"]
                name = f"{what} shape, by {kind} time"
                rows.append(Row(name, "tokens/s", rate, ratio, f"at least {bar} x", ratio >= bar))
        return rows

    def modern(self) -> list[Row]:
        """Time to the loss that nanoGPT has after 2,000 steps by its own recipe."""
        return self._time_to_loss("nanoGPT's loss", self.args.modern_steps, 1 / 6)

    def tuned(self) -> list[Row]:
        """The same where nanoGPT's learning rate is the best for this data."""
        steps = self.args.tuned_steps
        return self._time_to_loss("its loss at 6e-3", steps, 1 / 2, learning_rate=6e-3)

    def _time_to_loss(self, what: str, steps: int, bar: float, **changed: Any) -> list[Row]:
        size = {**README, "rows": 24}
        ours = self._seeds(self.ours, size, steps=steps, model=MODERN, training=MUON)
        theirs = self._seeds(self.theirs, README, steps=STEPS, training={**RECIPE, **changed})
        losses = {"snakegpt": _mean(ours, "loss"), "nanogpt": _mean(theirs, "loss")}
        difference = losses["snakegpt"] - losses["nanogpt"]
        rows = [
            Row(
                f"{what}, {steps} steps against {STEPS:,}",
                "nats",
                losses,
                difference,
                "not above",
                difference <= 0,
            )
        ]
        for kind in ("wall_s", "cpu_s"):
            times = {"snakegpt": _mean(ours, kind), "nanogpt": _mean(theirs, kind)}
            ratio = times["snakegpt"] / times["nanogpt"]
            name = f"  {kind.removesuffix('_s')} time to it, start included"
            rows.append(Row(name, "s", times, ratio, f"at most {bar:.3g} x", ratio <= bar))
        return rows

    def gpt2(self) -> list[Row]:
        """The loss after 2,000 steps of nanoGPT's recipe, which must be its own."""
        theirs = self._seeds(self.theirs, README, steps=STEPS, training=RECIPE)
        ours = self._seeds(self.ours, README, steps=STEPS, training=RECIPE)
        losses = {"snakegpt": _mean(ours, "loss"), "nanogpt": _mean(theirs, "loss")}
        apart = abs(losses["snakegpt"] - losses["nanogpt"])
        return [Row("gpt2, the same recipe", "nats", losses, apart, "within 0.02", apart <= 0.02)]

    def memory(self) -> list[Row]:
        """Peak memory of head and loss above what they are given, 2,048 tokens of 50,304 ids.

        torch's own linear_cross_entropy stands beside them, also by CPU time.
        """
        kinds = ["chunked", "plain", *(["torch"] if TORCHS_OWN else [])]
        found = {kind: _peak_mb_and_cpu_s(kind) for kind in kinds}
        peaks = {kind: mb for kind, (mb, _) in found.items()}
        ratio = peaks["chunked"] / peaks["plain"]
        rows = [Row("memory of head and loss", "MB", peaks, ratio, "at most 0.4 x", ratio <= 0.4)]
        if TORCHS_OWN:
            times = {kind: cpu_s for kind, (_, cpu_s) in found.items()}
            ratio = times["chunked"] / times["torch"]
            what = "  CPU time, chunked against torch's"
            rows.append(Row(what, "s", times, ratio, "at most 1 x", ratio <= 1))
        return rows

    def start(self) -> list[Row]:
        """Whole runs of one step, process start, validation and saving included."""
        figures = in_turn(
            self.args.rounds,
            snakegpt=lambda: self.ours(README, steps=1, seed=0, keep=False)["wall_s"],
            nanogpt=lambda: self.theirs(README, steps=1, seed=0, keep=False)["wall_s"],
        )
        medians = {name: statistics.median(values) for name, values in figures.items()}
        ours = medians["snakegpt"]
        return [Row("a run of one step", "s", medians, ours, "at most 8 s", ours <= 8)]

    def _seeds(
        self, run: Callable[..., dict[str, Any]], size: Any, **how: Any
    ) -> list[dict[str, Any]]:
        return [run(size, seed=seed, keep=True, **how) for seed in range(1, self.args.seeds + 1)]

    # ---- the two sides ----

    def ours(
        self,
        size: dict[str, int],
        *,
        steps: int,
        seed: int,
        keep: bool,
        model: dict[str, Any] | None = None,
        training: dict[str, Any] = RECIPE,
    ) -> dict[str, Any]:
        """A run of train_model, scored if it is to be kept."""
        architecture = model or {"bias": False}
        sizes = {k: v for k, v in size.items() if k != "rows"}
        settings = {
            "model": {**sizes, **architecture, "vocabulary_multiple": 1},
            "training": {
                **training,
                "warmup_steps": min(training["warmup_steps"], steps),
                "batch_tokens": size["rows"] * size["context"],
                "steps": steps,
                "seed": seed,
                "precision": self.args.precision,
                "validation_interval": steps,
                "validation_tokens": size["context"],
            },
        }

        def command(out: Path) -> list[str]:
            return [
                *(sys.executable, "-m", "snakegpt.stages.train_model"),
                *("--tokens", str(self.manifest), "--out", str(out)),
                *("--settings", json.dumps(settings)),
                *("--execution", json.dumps({"device": "cpu", "threads": self.args.threads})),
            ]

        def score(out: Path) -> float:
            config = json.loads((out / "config.json").read_text(encoding="utf-8"))
            net = load_model(out / "weights.safetensors", config)
            return self._score(lambda x, y: net(x, y).mean(), size["context"])

        def steps_s(out: Path, said: str) -> list[float]:
            return our_steps_s(out)

        return self._run("snakegpt", settings, command, score if keep else None, steps_s)

    def theirs(
        self,
        size: dict[str, int],
        *,
        steps: int,
        seed: int,
        keep: bool,
        training: dict[str, Any] = RECIPE,
    ) -> dict[str, Any]:
        """A run of nanoGPT's train.py, its fixed seed replaced, without the evaluations in between."""
        work = self.folder / "nanogpt"
        copy_nanogpt(self.args.nanogpt, work, {"1337 + seed_offset": str(seed)})
        options = {
            "device": "cpu",
            "compile": False,
            "dataset": "shakespeare_char",
            "gradient_accumulation_steps": 1,
            "eval_iters": 1,
            "eval_interval": steps if keep else 10**9,
            "log_interval": 1,
            "block_size": size["context"],
            "batch_size": size["rows"],
            "n_layer": size["layers"],
            "n_head": size["heads"],
            "n_embd": size["channels"],
            "dropout": 0.0,
            "max_iters": steps,
            "lr_decay_iters": steps,
            "warmup_iters": min(training["warmup_steps"], steps - 1),
            "learning_rate": training["learning_rate"],
            "min_lr": training["min_learning_rate"],
            "weight_decay": training["weight_decay"],
            "beta2": training["beta2"],
            "always_save_checkpoint": True,
        }

        def command(out: Path) -> list[str]:
            given = {**options, "out_dir": str(out)}
            return [sys.executable, "train.py", *(f"--{k}={v}" for k, v in given.items())]

        def score(out: Path) -> float:
            spec = importlib.util.spec_from_file_location("nanogpt_model", work / "model.py")
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
            net = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
            net.load_state_dict(saved["model"])
            return self._score(lambda x, y: net(x, y)[1], size["context"])

        def steps_s(out: Path, said: str) -> list[float]:
            return nanogpt_steps_s(said)

        options_and_seed = {**options, "seed": seed}
        return self._run(
            "nanogpt", options_and_seed, command, score if keep else None, steps_s, work
        )

    def _run(
        self,
        side: str,
        identity: dict[str, Any],
        command: Callable[[Path], list[str]],
        score: Callable[[Path], float] | None,
        steps_s: Callable[[Path, str], list[float]],
        cwd: Path | None = None,
    ) -> dict[str, Any]:
        """Times, steps and, if wanted, the loss of a run; one that is scored stays in the folder."""
        identity = {**identity, "threads": self.args.threads}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        kept = self.folder / f"{side}-{digest[:16]}.json"
        if score and kept.exists():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            out, log = Path(name) / "out", Path(name) / "log"
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads)}
            environment.pop("GOMP_SPINCOUNT", None)  # ours, set when snakegpt was imported here
            started = time.perf_counter()
            with log.open("w") as file:
                process = subprocess.Popen(
                    command(out), cwd=cwd, stdout=file, stderr=file, env=environment
                )
                _, status, usage = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - started
            said = log.read_text(encoding="utf-8")
            if status:
                sys.exit(f"{side} failed:\n{said}")
            made = {
                "wall_s": wall_s,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "step_s": steps_s(out, said),
            }
            if score:
                made["loss"] = score(out)
                kept.write_text(json.dumps({**made, "identity": identity}), encoding="utf-8")
        return made

    @torch.no_grad()
    def _score(self, mean_loss: Callable[[Any, Any], Any], context: int) -> float:
        """Mean loss over all of validation, in windows, in order."""
        total = count = 0.0
        for ids, targets in sequential_batches(self.validation, context, 128):
            total += float(mean_loss(ids, targets)) * targets.numel()
            count += targets.numel()
        return total / count


def _write_tokens(text: Path, folder: Path) -> tuple[Path, TokenStream]:
    """The same ids for both sides: manifest and shards of ours, and nanoGPT's files beside them."""
    data = text.read_text(encoding="utf-8")
    characters = sorted(set(data))
    number = {character: index for index, character in enumerate(characters)}
    ids = np.array([number[character] for character in data], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    theirs = folder / "nanogpt" / "data" / "shakespeare_char"
    theirs.mkdir(parents=True, exist_ok=True)
    (theirs / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    splits = {"train": ids[:cut], "val": ids[cut:]}
    for split, part in splits.items():
        part.tofile(theirs / f"{split}.bin")
    manifest = write_token_set(folder, splits, n_vocab=len(characters))
    return manifest, TokenStream([read_shard(folder / "val_000000.bin")])


TORCHS_OWN = hasattr(torch.nn, "LinearCrossEntropyOptions")  # from 2.13 on
MEASURE_MEMORY = """
import sys
import time
import torch
from snakegpt.losses import mean_loss

def loss():
    if sys.argv[1] != "torch":
        return mean_loss(x, head, targets, None, sys.argv[1])
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(x, head, targets, options=options)

torch.set_num_threads(1)
x = torch.randn(2048, 768, requires_grad=True)
head = torch.randn(50304, 768).mul_(0.02).requires_grad_()
targets = torch.randint(50304, (2048,))
(x[:8] @ head[:8].T).sum().backward()  # libraries take their own first
x.grad = head.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
lines = dict(line.split(":") for line in open("/proc/self/status"))
before = int(lines["VmRSS"].split()[0]) / 1024
loss().backward()
lines = dict(line.split(":") for line in open("/proc/self/status"))
peak = int(lines["VmHWM"].split()[0]) / 1024 - before
seconds = []
for _ in range(3):
    x.grad = head.grad = None
    started = time.process_time()
    loss().backward()
    seconds.append(time.process_time() - started)
print(peak, min(seconds))
"""


def _peak_mb_and_cpu_s(kernel: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, kernel], check=True, capture_output=True, text=True
    )
    peak, cpu_s = map(float, done.stdout.split())
    return peak, cpu_s


def _mean(runs: list[dict[str, Any]], what: str) -> float:
    return statistics.mean(run[what] for run in runs)


if __name__ == "__main__":
    main()
