"""Batches of training windows against nanoGPT's way, and the start of a very large token set.

python benchmarks/batches.py                         half a minute, 400 MB of disk below --folder
python benchmarks/batches.py --nanogpt ../nanoGPT    its own get_batch instead of our words for it
python benchmarks/batches.py --tokens 15e12 --shard-tokens 2147483647

Throughput is of one core, by CPU time, out of the page cache. The large set is made of sparse files:
all of it is hole, and read as zeros.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, finish, in_turn, medians, parser
from snakegpt.batches import TokenStream, TrainingBatches
from snakegpt.shards import HEADER_BYTES, ShardWriter, header, read_shard

FINGERPRINT = "ab" * 32
CONTEXT, BATCH_ROWS, MICRO_ROWS = 1024, 480, 12  # GPT-2 124M as nanoGPT trains it


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    made.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    made.add_argument("--tokens", type=float, default=10e9, help="tokens of the large set")
    made.add_argument("--shard-tokens", type=int, default=100_000_000, help="of each of its shards")
    args = made.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = throughput(Path(name), args.rounds, args.nanogpt)
        rows += start(Path(name), args.rounds, int(args.tokens), args.shard_tokens)
    finish(rows, as_json=args.json)


# ---- throughput ----


def throughput(folder: Path, rounds: int, nanogpt: Path | None) -> list[Row]:
    """Inputs and targets of ten steps of 480 x 1,024 tokens, in micro-batches of 12 rows."""
    ids = np.random.default_rng(0).integers(0, 50_257, 100_000_000, dtype=np.uint16)
    shards = []
    for index in range(2):
        with ShardWriter(folder / f"train_{index:06d}.bin", FINGERPRINT) as writer:
            writer.add(ids)
        shards.append(read_shard(writer.path))
    ids.tofile(folder / "train.bin")
    batches = TrainingBatches(TokenStream(shards), CONTEXT, BATCH_ROWS, seed=0)
    steps = iter(range(10**9))

    def ours() -> float:
        return _rate(lambda: sum(1 for _ in batches.micro_batches(next(steps), MICRO_ROWS, 0, 1)))

    get_batch = _their_get_batch(folder, nanogpt)

    def theirs() -> float:
        return _rate(lambda: sum(1 for _ in (get_batch("train") for _ in range(40))))

    ours()  # both once, so that all of it is in the page cache
    theirs()
    figures = medians(in_turn(2 * rounds, batches=ours, nanogpt=theirs))
    rate, ratio = figures["batches"], figures["batches"] / figures["nanogpt"]
    return [
        Row("batches of one core", "M tokens/s", figures, rate, "at least 200", rate >= 200),
        Row("against nanoGPT's", "M tokens/s", figures, ratio, "at least 1", ratio >= 1),
    ]


def _rate(step: Callable[[], Any]) -> float:
    started = time.process_time()
    for _ in range(10):
        step()
    return 10 * BATCH_ROWS * CONTEXT / (time.process_time() - started) / 1e6


def _their_get_batch(folder: Path, nanogpt: Path | None) -> Callable[[str], Any]:
    """get_batch out of nanoGPT's train.py, which runs a whole training when it is imported."""
    names: dict[str, Any] = {"torch": torch, "np": np, "os": __import__("os")}
    names |= {"block_size": CONTEXT, "batch_size": MICRO_ROWS, "data_dir": str(folder)}
    names |= {"device_type": "cpu", "device": "cpu"}
    if nanogpt:
        tree = ast.parse((nanogpt / "train.py").read_text(encoding="utf-8"))
        tree.body = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == "get_batch"
        ]
        exec(compile(tree, "train.py", "exec"), names)
        found: Callable[[str], Any] = names["get_batch"]
        return found

    def get_batch(split: str) -> Any:
        """The same in our words: a map a batch, and a copy, a cast and a stack for each row."""
        data = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - CONTEXT, (MICRO_ROWS,)).tolist()
        rows = [data[i : i + CONTEXT].astype(np.int64) for i in starts]
        next_rows = [data[i + 1 : i + 1 + CONTEXT].astype(np.int64) for i in starts]
        return tuple(torch.stack([torch.from_numpy(r) for r in side]) for side in (rows, next_rows))

    return get_batch


# ---- start ----

# In a process of its own. Pages of a mapped file are the kernel's to take back, and left out.
MEASURE = """
import json, sys, time
import numpy

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0]) - int(lines["RssFile"].split()[0])

before, started = memory(), time.perf_counter()
from pathlib import Path
from snakegpt.batches import TrainingBatches
from snakegpt.tokens import open_split, read_manifest
path = Path(sys.argv[1])
stream = open_split(path, read_manifest(path), "train")
batches = TrainingBatches(stream, 1024, 480, seed=0)
stream.rows(batches.starts(0)[:12], 1025)
start_s = time.perf_counter() - started
last = batches.n_windows // 480
seek_s = {}
for name, step in (("first", 0), ("last", last - 60)):
    started = time.perf_counter()
    for k in range(50):
        stream.rows(batches.starts(step + k)[:12], 1025)
    seek_s[name] = (time.perf_counter() - started) / 50
print(json.dumps({"start_s": start_s, "mb": (memory() - before) / 1024, **seek_s}))
"""


def start(folder: Path, rounds: int, n_tokens: int, shard_tokens: int) -> list[Row]:
    """From the import of the package to the first batch, and the memory it takes above numpy's."""
    entries = []
    for index, first in enumerate(range(0, n_tokens, shard_tokens)):
        count = min(shard_tokens, n_tokens - first)
        path = folder / f"big_{index:06d}.bin"
        with path.open("wb") as file:
            file.write(header(count, FINGERPRINT))
            file.truncate(HEADER_BYTES + 2 * count)
        entries.append({"name": path.name, "n_tokens": count})
    manifest = folder / "manifest.json"
    splits = {"train": {"n_tokens": n_tokens, "shards": entries}}
    manifest.write_text(
        json.dumps({"tokenizer": {"fingerprint": FINGERPRINT}, "splits": splits}), encoding="utf-8"
    )
    calls = []

    def call() -> None:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(manifest)],
            check=True,
            capture_output=True,
            text=True,
        )
        calls.append(json.loads(done.stdout))

    in_turn(rounds, start=call)
    found = medians({name: [c[name] for c in calls] for name in calls[0]})
    size = f"{n_tokens:,} tokens, {len(entries):,} shards"
    start_s, mb, seek = found["start_s"], found["mb"], found["last"] / found["first"]
    ends = {name: 1e3 * found[name] for name in ("first", "last")}
    return [
        Row(f"start of {size}", "s", {"start": start_s}, start_s, "under 1 s", start_s < 1),
        Row("  memory above numpy's", "MB", {"memory": mb}, mb, "under 50 MB", mb < 50),
        Row("  a batch of the last step", "ms", ends, seek, "at most 1.5 x the first", seek <= 1.5),
    ]


if __name__ == "__main__":
    main()
