"""The store against what it is made of: sha256sum, an empty store, Snakemake's own time for the same DAG.

python benchmarks/store.py                    all of it: some minutes, 10 GB of disk below --folder
python benchmarks/store.py publish hit        some of it: publish hit look_up maintain noop
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import Row, finish, in_turn, medians, parser
from projects import (
    FLAGS,
    TRIVIAL_FLAGS,
    fill_project,
    fill_trivial,
    make_project,
    make_trivial,
    snakemake,
    touch,
)
from snakegpt.artefacts import NOTES, HashedFile, read_notes
from snakegpt.identity import Action, code_of
from snakegpt.store import Store
from store_fixture import make_store

PROJECT = Path(__file__).parent.parent
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


# ---- publishing ----


def publish(folder: Path, rounds: int, gigabytes: float) -> list[Row]:
    """4 GiB hashed while they are written, synced and renamed, against sha256sum of the same bytes."""
    n_bytes = int(gigabytes * (1 << 30))
    block = random.Random(0).randbytes(1 << 24)
    core = str(min(os.sched_getaffinity(0)))
    store = Store(folder / "store")
    store.make()
    outputs = {}
    read_again = []

    def ours() -> None:
        shutil.rmtree(store.root / "objects")
        store.make()
        with store.workspace("publish") as workspace:
            out, notes = workspace / "out", workspace / "notes"
            out.mkdir()
            os.environ[NOTES] = str(notes)
            started, before = time.perf_counter(), _bytes_read()
            with HashedFile(out / "shard") as file:
                for _ in range(n_bytes // len(block)):
                    file.write(block)
            outputs.update(store.publish(out, read_notes(notes)))
            elapsed = time.perf_counter() - started
            read_again.append(_bytes_read() - before)
        return n_bytes / elapsed / 1e6

    def theirs() -> float:
        path = store.object_path(outputs["shard"]["sha256"])
        started = time.perf_counter()
        done = subprocess.run(
            ["taskset", "-c", core, "sha256sum", path], check=True, capture_output=True, text=True
        )
        elapsed = time.perf_counter() - started
        assert done.stdout.split()[0] == path.name
        return n_bytes / elapsed / 1e6

    figures = medians(in_turn(rounds, publish=ours, sha256sum=theirs))
    ratio = figures["publish"] / figures["sha256sum"]
    share = max(read_again) / n_bytes
    what = f"publish {gigabytes:g} GiB, {share:.2%} of it read again"
    met = ratio >= 0.8 and share < 0.01
    return [Row(what, "MB/s", figures, ratio, "at least 0.8, nothing read again", met)]


def _bytes_read() -> int:
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("rchar"))


# ---- a hit ----


def hit(folder: Path, rounds: int) -> list[Row]:
    """One stage found in the store, with the start of its process; Python's own start beside it."""
    os.chdir(folder)
    store = Store("store")
    store.make()
    with store.workspace("hit") as workspace:
        (workspace / "manifest.json").write_text("{}")
        outputs = store.publish(workspace)
    action = Action("train_model", {"steps": 1}, code_of("train_model"), {})
    record = {"key": action.key, "stage": "train_model", "science": {"steps": 1}, "inputs": {}}
    store.record(action.key, {**record, "code": action.code, "outputs": outputs})
    words = ["train_model", "x", "--settings", '{"steps": 1}', "--output", "results/models/x"]
    check = "import sys; from snakegpt.run import main; main(sys.argv[1:]); "
    check += "assert not {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", check, *words], check=True, **QUIET)
    figures = medians(
        in_turn(
            4 * rounds,
            hit=lambda: _call([sys.executable, "-m", "snakegpt.run", *words]),
            python=lambda: _call([sys.executable, "-c", "pass"]),
        )
    )
    value = figures["hit"]
    what = "hit of one stage, process start included"
    return [
        Row(what, "s", figures, value, "at most 0.5 s, without torch or transformers", value <= 0.5)
    ]


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, **QUIET)


# ---- a store of the size of a team's year ----


def look_up(folder: Path, rounds: int, actions: int, objects: int) -> list[Row]:
    """Look-ups of random actions in a full store against an otherwise empty one."""
    full = filled(folder / "full/store", actions, objects)
    empty = filled(folder / "empty/store", 1000, 10_000)
    draw = random.Random(1)
    keys = {store.root: draw.sample(_keys(store), 1000) for store in (full, empty)}

    def looking(store: Store) -> Callable[[], None]:
        def look() -> None:
            for key in keys[store.root]:
                assert store.look_up(key)

        return look

    figures = medians(in_turn(rounds + 1, full=looking(full), empty=looking(empty)))
    ratio = figures["full"] / figures["empty"]
    what = f"1,000 look-ups, {actions:,} actions, {objects:,} objects"
    return [Row(what, "s", figures, ratio, "at most 2", ratio <= 2)]


def filled(root: Path, actions: int, objects: int) -> Store:
    """A store of that size, made if it is not there yet: minutes for a million objects."""
    if not root.exists():
        make_store(root, actions, objects)
    return Store(root)


def _keys(store: Store) -> list[str]:
    return [path.stem for path in (store.root / "actions").rglob("*.json")]


def maintain(folder: Path, actions: int, objects: int) -> list[Row]:
    """`gc` dry run and `verify --metadata` on the full store."""
    store = filled(folder / "full/store", actions, objects)
    os.chdir(PROJECT)
    rows = []
    for command in (["gc"], ["verify", "--metadata"]):
        environment = {**os.environ, "SNAKEGPT_STORE": str(store.root)}
        words = [sys.executable, "-m", "snakegpt.store", *command]
        started = time.perf_counter()
        process = subprocess.Popen(words, env=environment, **QUIET)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        assert os.waitstatus_to_exitcode(status) == 0, words
        megabytes = usage.ru_maxrss * 1024 / 1e6
        name = " ".join(command)
        met = seconds <= 60 and megabytes < 500
        figures = {name: seconds}
        what = f"{name}, peak memory {megabytes:.0f} MB"
        rows.append(Row(what, "s", figures, seconds, "at most 60 s, under 500 MB", met))
    return rows


# ---- nothing to do ----


def noop(folder: Path, rounds: int, parts: int) -> list[Row]:
    """`snakemake` with nothing to do: an experiment of many shards, and the same DAG of trivial rules."""
    ours, theirs = folder / "ours", folder / "trivial"
    make_project(ours, parts)
    fill_project(ours, parts)
    make_trivial(theirs, parts)
    fill_trivial(theirs, parts)
    commands = {"snakegpt": (ours, ["train_x", *FLAGS]), "trivial": (theirs, TRIVIAL_FLAGS)}
    for place, words in commands.values():
        touch(place, words)
        assert "Nothing to be done" in snakemake(place, words).text, place
    measured = in_turn(
        rounds,
        **{
            name: lambda place=place, words=words: snakemake(place, words).elapsed_s
            for name, (place, words) in commands.items()
        },
    )
    figures = medians(measured)
    ratio = figures["snakegpt"] / figures["trivial"]
    what = f"no-op snakemake, {parts:,} shards"
    return [Row(what, "s", figures, ratio, "at most 1.5", ratio <= 1.5)]


def main() -> None:
    names = ("publish", "hit", "look_up", "maintain", "noop")
    made = parser(__doc__)
    made.add_argument("which", nargs="*", metavar="BENCHMARK", help=f"default: {' '.join(names)}")
    made.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    made.add_argument("--big", type=Path, help="folder that keeps the full store for a next time")
    made.add_argument("--gigabytes", type=float, default=4, help="GiB to publish")
    made.add_argument("--actions", type=int, default=100_000, help="actions of the full store")
    made.add_argument("--objects", type=int, default=1_000_000, help="objects of the full store")
    made.add_argument("--shards", type=int, default=1000, help="shards of the experiment")
    args = made.parse_args()
    if set(args.which) - set(names):
        made.error(f"no such benchmark: {', '.join(set(args.which) - set(names))}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rows = []
    big = (args.actions, args.objects)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for which in args.which or names:
            folder = Path(name) / which
            if which in ("look_up", "maintain"):
                folder = args.big or Path(name) / "big"
            folder.mkdir(parents=True, exist_ok=True)
            if which == "publish":
                rows += publish(folder, args.rounds, args.gigabytes)
            elif which == "hit":
                rows += hit(folder, args.rounds)
            elif which == "look_up":
                rows += look_up(folder, args.rounds, *big)
            elif which == "maintain":
                rows += maintain(folder, *big)
            else:
                rows += noop(folder, args.rounds, args.shards)
    finish(rows, as_json=args.json)


if __name__ == "__main__":
    main()
