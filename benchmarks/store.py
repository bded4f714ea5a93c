"""The store against what it is made of: sha256sum, an empty store, Snakemake's own time for the same DAG.

python benchmarks/store.py                    all of it: some minutes, 10 GB of disk below --folder
python benchmarks/store.py publish hit        some of it: publish hit look_up maintain noop
"""

from __future__ import annotations

import json
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
from snakegpt.artefacts import NOTES, HashedFile, read_notes
from snakegpt.identity import Action, code_of
from snakegpt.locks import Entry, File
from snakegpt.pipeline import Pipeline, Request
from snakegpt.settings import load_files
from snakegpt.store import Store
from snakegpt.store.links import digest_of, link
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

TRIVIAL = """
PARTS = [f"{{i:06d}}" for i in range({parts})]
rule all:
    input: "results/models/x/weights"
rule fetch:
    output: "results/corpora/x/corpus.json"
    shell: "true"
rule tokenizer:
    input: "results/corpora/x/corpus.json"
    output: "results/tokenizers/x/tokenizer.json"
    shell: "true"
rule encode:
    input: "results/corpora/x/corpus.json", "results/tokenizers/x/tokenizer.json"
    output: multiext("results/tokens/x/{{part}}", "_train.bin", "_val.bin", ".json")
    shell: "true"
rule index:
    input: expand("results/tokens/x/{{part}}.json", part=PARTS)
    output: "results/tokens/x/manifest.json"
    shell: "true"
rule network:
    input: "results/tokenizers/x/tokenizer.json"
    output: "results/networks/x/network.json"
    shell: "true"
rule plan:
    input: "results/tokenizers/x/tokenizer.json"
    output: "results/plans/x/plan.json"
    shell: "true"
rule train:
    input: "results/tokens/x/manifest.json", "results/plans/x/plan.json", "results/networks/x/network.json"
    output: multiext("results/models/x/", "weights", "best", "config", "metrics")
    shell: "true"
"""


def noop(folder: Path, rounds: int, parts: int) -> list[Row]:
    """`snakemake` with nothing to do: an experiment of many shards, and the same DAG of trivial rules."""
    ours, theirs = folder / "ours", folder / "trivial"
    theirs.mkdir()
    (theirs / "Snakefile").write_text(TRIVIAL.format(parts=parts))
    _fill_trivial(theirs, parts)
    _fill(ours, parts)
    flags = ["--cores", "2", "--scheduler", "greedy"]
    commands = {
        "snakegpt": (ours, ["train_x", *flags]),
        "trivial": (theirs, [*flags, "--rerun-triggers", "mtime", "params", "input"]),
    }
    for place, words in commands.values():
        # Gives every result the metadata that Snakemake keeps of a job that ran.
        _snakemake(place, [*words, "--touch"])
        assert "Nothing to be done" in _snakemake(place, words), place
    measured = in_turn(
        rounds,
        **{
            name: lambda place=place, words=words: _snakemake(place, words) and None
            for name, (place, words) in commands.items()
        },
    )
    figures = medians(measured)
    ratio = figures["snakegpt"] / figures["trivial"]
    what = f"no-op snakemake, {parts:,} shards"
    return [Row(what, "s", figures, ratio, "at most 1.5", ratio <= 1.5)]


def _snakemake(place: Path, words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def _fill_trivial(place: Path, parts: int) -> None:
    names = ["corpora/x/corpus.json", "tokenizers/x/tokenizer.json", "tokens/x/manifest.json"]
    names += ["networks/x/network.json", "plans/x/plan.json"]
    names += [f"models/x/{name}" for name in ("weights", "best", "config", "metrics")]
    for part in range(parts):
        names += [f"tokens/x/{part:06d}{end}" for end in ("_train.bin", "_val.bin", ".json")]
    for name in names:
        path = place / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


SETTINGS = """
corpora:
  x: {source: {kind: local, paths: ["texts/*.txt"]}, part_bytes: 1000}
tokenizers:
  x: {kind: char, corpus: x}
experiments:
  x: {corpus: x, tokenizer: x}
"""


def _fill(place: Path, parts: int) -> None:
    """A project whose whole experiment is in results/, published by the store and not by its stages."""
    place.mkdir()
    for name in ("Snakefile", "rules", "profiles", "workflow"):
        (place / name).symlink_to(PROJECT / name)
    (place / "config.yaml").write_text(SETTINGS)
    source = load_files([place / "config.yaml"], {}).corpora["x"].source.model_dump()
    files = tuple(File(f"texts/{part:06d}.txt", f"{part:064x}", 1000) for part in range(parts))
    entry = Entry(source, files)
    os.chdir(place)
    from snakegpt import locks

    locks.put(Path("corpora.lock.json"), {"x": entry})
    settings = load_files(["config.yaml"], {})
    pipeline = Pipeline(settings, {"x": entry})
    store = Store("store")
    store.make()
    names = {"corpus": "x", "tokenizer": "x", "experiment": "x"}
    wanted = [("fetch_corpus", ["corpus"]), ("build_tokenizer", ["tokenizer"])]
    wanted += [("index_tokens", ["corpus", "tokenizer"]), ("bench_network", ["experiment"])]
    wanted += [("plan_training", ["experiment"]), ("train_model", ["experiment"])]
    for stage, wildcards in wanted:
        if stage == "index_tokens":
            for part in pipeline.parts("x"):
                given = {"corpus": "x", "tokenizer": "x", "part": part}
                _publish(store, pipeline.request("encode_tokens", given))
        _publish(store, pipeline.request(stage, {name: names[name] for name in wildcards}))


def _publish(store: Store, request: Request) -> None:
    inputs = {
        role: [digest_of(store, Path(path)) for path in paths]
        for role, paths in request.inputs.items()
    }
    action = Action(request.stage, request.settings, code_of(request.stage), inputs)
    with store.workspace(action.key) as workspace:
        for path in request.outputs:
            (workspace / Path(path).name).write_text(json.dumps({"of": request.name, "path": path}))
        outputs = store.publish(workspace)
    record = {"key": action.key, "outputs": outputs, "inputs": {}, "stage": request.stage}
    store.record(action.key, record)
    link(store, record, Path(request.folder))


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
