"""Text to token shards against the plain tiktoken loop and nanoGPT's way, on the same text.

    python benchmarks/encode.py                     the text files of this Python and its packages, a part's 400 MB
    python benchmarks/encode.py --text a.jsonl      your own: one JSON object with "text" a line
    python benchmarks/encode.py jobs document       two jobs against one, and one document of 5 GB

CPU seconds count, children included, so that a shared machine does less harm. nanoGPT's way is its
prepare.py restated: datasets.map in two processes, then 1,024 batches into a memory map.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Row, finish, in_turn, medians, parser
from snakegpt.shards import read_shard
from snakegpt.stages.build_tokenizer import fetch_ranks
from snakegpt.tokenizers import gpt2_tokenizer, load

NANOGPT = """
import sys, numpy as np, datasets
from pathlib import Path
from snakegpt.tokenizers import load
encoding = load(Path(sys.argv[2]))._encoding
def process(example):
    ids = encoding.encode_ordinary(example["text"]); ids.append(50256)
    return {"ids": ids, "len": len(ids)}
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
found = data.map(process, remove_columns=data.column_names, num_proc=2)
out = np.memmap(sys.argv[3] + "/train.bin", dtype=np.uint16, mode="w+", shape=(int(np.sum(found["len"], dtype=np.uint64)),))
place = 0
for index in range(1024):
    batch = found.shard(num_shards=1024, index=index, contiguous=True).with_format("numpy")
    ids = np.concatenate(batch["ids"])
    out[place : place + len(ids)] = ids
    place += len(ids)
out.flush()
"""

PLAIN = """
import json, sys, numpy as np
from pathlib import Path
from snakegpt.tokenizers import load
encoding = load(Path(sys.argv[2]))._encoding
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
import time
started = time.process_time()
total = 0
for text in texts:
    total += len(np.array([50256, *encoding.encode_ordinary(text)], dtype=np.uint16))
print(time.process_time() - started)
"""


TEXTS = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".c", ".html", ".js", ".css", ".json", ".xml"}


PROSE = {".md", ".rst", ".txt"}


def gather_text(path: Path, n_bytes: int, kinds: set[str] = TEXTS) -> None:
    """Text files of this Python and its packages in random order, one a line: code, docs, data."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    files = [file for folder in folders for file in sorted(folder.rglob("*"))]
    random.Random(0).shuffle(files)
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            if file.suffix not in kinds or not 0 < file.stat().st_size < 2_000_000:
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text)
            if written >= n_bytes:
                return


# What Snakemake sets for a job of one thread; without it OpenBLAS starts threads that only cost.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def cpu_of(command: list[str]) -> tuple[float, str, float]:
    """(CPU seconds of a command and its children, its output, peak memory in MB)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    own = usage.ru_utime + usage.ru_stime
    return max(own, children), output, usage.ru_maxrss * 1024 / 1e6


class Encode:
    """The stage as the pipeline runs it: process start, reading, hashing and writing included."""

    def __init__(self, folder: Path, corpus: Path, tokenizer: Path, engine: str) -> None:
        self.out, self.memory = folder / f"out-{engine}", 0.0
        settings = {"validation": {"by": "document", "fraction": 0.01}}
        self.command = [sys.executable, "-m", "snakegpt.stages.encode_tokens"]
        self.command += ["--corpus", str(corpus), "--tokenizer", str(tokenizer)]
        self.command += ["--out", str(self.out), "--settings", json.dumps(settings)]
        self.command += ["--execution", json.dumps({"engine": engine})]

    def __call__(self) -> float:
        seconds, _, memory = cpu_of(self.command)
        self.memory = max(self.memory, memory)
        return seconds

    def ids(self) -> bytes:
        """What it wrote."""
        shards = sorted(self.out.glob("*.bin"))
        return b"".join(np.asarray(read_shard(shard)).tobytes() for shard in shards)


def jobs(folder: Path, text: Path, tokenizer: Path, rounds: int) -> list[Row]:
    """Wall time of two parts of equal size, one after the other and side by side."""
    lines = text.read_bytes().splitlines(keepends=True)
    commands = []
    for number in range(2):
        files = folder / f"half-{number}/files"
        files.mkdir(parents=True)
        (files / "a.jsonl").write_bytes(b"".join(lines[number::2]))
        corpus = files.parent / "corpus.json"
        corpus.write_text(json.dumps({"files": [{"path": "a.jsonl"}]}))
        commands.append(Encode(folder / f"half-{number}", corpus, tokenizer, "tiktoken").command)

    def run(at_once: int) -> float:
        started = time.perf_counter()
        for first in range(0, 2, at_once):
            quiet = {"stderr": subprocess.DEVNULL}
            running = [subprocess.Popen(c, **quiet) for c in commands[first : first + at_once]]
            assert not any(process.wait() for process in running)
        return time.perf_counter() - started

    figures = medians(in_turn(rounds, one=lambda: run(1), two=lambda: run(2)))
    ratio = figures["one"] / figures["two"]
    what = "two jobs at once, against one after the other"
    return [Row(what, "s", figures, ratio, "at least 1.8", ratio >= 1.8)]


def document(folder: Path, tokenizer: Path, gigabytes: float) -> list[Row]:
    """Peak memory of one job whose only document has so many bytes, of prose: a shard has 2^31 tokens."""
    prose = folder / "prose.jsonl"
    gather_text(prose, 20_000_000, PROSE)
    texts = [json.loads(line)["text"] for line in prose.open(encoding="utf-8")]
    piece = "\n".join(texts).encode("utf-8")
    files = folder / "large/files"
    files.mkdir(parents=True)
    with (files / "a.txt").open("wb") as file:
        for _ in range(round(gigabytes * 1e9 / len(piece)) or 1):
            file.write(piece)
    corpus = files.parent / "corpus.json"
    corpus.write_text(json.dumps({"files": [{"path": "a.txt"}]}))
    run = Encode(folder / "large", corpus, tokenizer, "auto")
    seconds, n_bytes = run(), (files / "a.txt").stat().st_size
    what = f"peak memory, one document of {n_bytes / 1e9:.1f} GB, {seconds:.0f} CPU s"
    figure, met = {"auto": run.memory}, run.memory <= 600
    return [Row(what, "MB", figure, run.memory, "at most 600", met)]


def speed(folder: Path, corpus: Path, text: Path, tokenizer: Path, args: Namespace) -> list[Row]:
    """CPU seconds and memory of both engines against the peers."""
    ours = {e: Encode(folder, corpus, tokenizer, e) for e in ("tiktoken", "gigatoken")}
    arguments = [str(text), str(tokenizer)]

    def plain() -> float:
        return float(cpu_of([sys.executable, "-c", PLAIN, *arguments])[1])

    sides: dict[str, Callable[[], float]] = {"plain": plain, **ours}
    if args.nanogpt:

        def nanogpt() -> float:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                return cpu_of([sys.executable, "-c", NANOGPT, *arguments, cache])[0]

        sides["nanogpt"] = nanogpt
    figures = medians(in_turn(args.rounds, **sides))
    assert ours["tiktoken"].ids() == ours["gigatoken"].ids(), "the engines differ"
    n_bytes = text.stat().st_size
    rows = []
    bars = {
        "plain": {"tiktoken": 1.0, "gigatoken": 8.0},
        "nanogpt": {"tiktoken": 1.7, "gigatoken": 15},
    }
    for peer in ("plain", "nanogpt"):
        for engine, bar in bars[peer].items() if peer in figures else ():
            ratio = figures[peer] / figures[engine]
            what = f"encode {n_bytes / 1e6:.0f} MB, {engine} against {peer}"
            pair = {name: figures[name] for name in (peer, engine)}
            rows.append(Row(what, "CPU s", pair, ratio, f"at least {bar}", ratio >= bar))
    for engine, run in ours.items():
        what, met = f"peak memory, {engine}", run.memory <= 600
        rows.append(Row(what, "MB", {engine: run.memory}, run.memory, "at most 600", met))
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("which", nargs="*", metavar="BENCHMARK", help="speed jobs document")
    made.add_argument("--gigabytes", type=float, default=5, help="of the one document")
    made.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    made.add_argument("--text", type=Path, help="JSON lines with a key `text`")
    made.add_argument("--megabytes", type=float, default=385, help="of text to gather")
    made.add_argument("--nanogpt", action="store_true", help="also nanoGPT's way (needs datasets)")
    args = made.parse_args()
    which = args.which or ["speed"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        files = folder / "corpus/files"
        files.mkdir(parents=True)
        text = files / "a.jsonl"
        if args.text:
            os.symlink(args.text.absolute(), text)
        else:
            gather_text(text, int(args.megabytes * 1e6))
        corpus = folder / "corpus/corpus.json"
        corpus.write_text(json.dumps({"files": [{"path": "a.jsonl"}]}))
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(gpt2_tokenizer(fetch_ranks("r50k_base", "benchmark")).to_json())
        load(tokenizer)
        if "speed" in which:
            rows += speed(folder, corpus, text, tokenizer, args)
        if "jobs" in which:
            rows += jobs(folder, text, tokenizer, args.rounds)
        if "document" in which:
            rows += document(folder, tokenizer, args.gigabytes)
    finish(rows, as_json=args.json)


if __name__ == "__main__":
    main()
