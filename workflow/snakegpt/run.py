"""The runner that every rule calls: compute the key, look it up, link on a hit, run the stage on a miss.

    python -m snakegpt.run index_tokens shakespeare-gpt2 --settings '{}' \\
        --input parts results/tokens/shakespeare-gpt2/part_000000.json \\
        --output results/tokens/shakespeare-gpt2

Computing a key reads no settings file and imports no stage, so a hit takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import datetime
import getpass
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from snakegpt.errors import RETRY, USER_ERROR, UserError, reports_errors
from snakegpt.identity import Action, code_of
from snakegpt.progress import duration, quantity, say
from snakegpt.store import Store
from snakegpt.store.links import link, maker

# Libraries whose version can change a stage's bytes: recorded with every action, for people.
LIBRARIES = ("torch", "numpy", "tiktoken", "transformers", "safetensors", "pyarrow", "snakemake")


def run(
    stage: str,
    name: str,
    settings: dict[str, Any],
    inputs: dict[str, list[Path]],
    output: Path,
    store: Store,
    *,
    execution: dict[str, Any],
    unhashed: dict[str, list[Path]],
    state: bool,
    provenance: bool,
) -> None:
    """Bring the results of one action to the folder `output`, by look-up or by running its stage.

    inputs    role -> files whose content is part of the key
    unhashed  role -> files the stage gets as well, whose content is not (a place, a measurement)
    state     whether the stage resumes from state/<key>
    raises    UserError, SystemExit with the stage's status if it fails
    """
    store.make()
    started = time.monotonic()
    digests = {role: [_digest(store, path) for path in paths] for role, paths in inputs.items()}
    action = Action(stage, settings, code_of(stage), digests)
    label = f"{stage} {name}"
    record = store.look_up(action.key)
    if record is None:
        waits = f"{label}  waits for another run of it"
        with store.claim(action.key, lambda: say(waits)) as claim:
            record = store.look_up(action.key)  # what we waited for
            if record is None:
                say(f"{label}  runs  ({action.key[:12]})")
                outputs = _run_stage(
                    action,
                    label,
                    {**inputs, **unhashed},
                    store,
                    claim,
                    execution,
                    state,
                    provenance,
                )
                wall_s = time.monotonic() - started
                record = _record(action, name, inputs, unhashed, execution, outputs, wall_s)
                store.record(action.key, record)
                shutil.rmtree(store.state_path(action.key), ignore_errors=True)
                n_bytes = sum(o["bytes"] for o in outputs.values())
                say(
                    f"{label}  done in {duration(wall_s)},"
                    f" {len(outputs)} files, {quantity(n_bytes, 'B')}"
                )
                link(store, record, output)
                return
    link(store, record, output)
    say(f"{label}  found in the store  ({action.key[:12]})")


def _digest(store: Store, path: Path) -> str:
    try:
        return store.digest_of(path)
    except FileNotFoundError:
        raise UserError(f"input {path} does not exist.") from None


def _run_stage(
    action: Action,
    label: str,
    inputs: dict[str, list[Path]],
    store: Store,
    claim: int,
    execution: dict[str, Any],
    state: bool,
    provenance: bool,
) -> dict[str, dict[str, Any]]:
    """Run a stage in a workspace of its own and publish what it leaves there."""
    with store.workspace(action.key) as workspace:
        out = workspace / "out"
        out.mkdir()
        execution = {**execution, "label": label}
        if provenance:
            chain = workspace / "provenance.json"
            chain.write_text(json.dumps({"actions": _chain(inputs)}), encoding="utf-8")
            execution["provenance"] = str(chain)
        command = [sys.executable, "-m", f"snakegpt.stages.{action.stage}"]
        command += ["--settings", json.dumps(action.science)]
        command += ["--execution", json.dumps(execution)]
        for role, paths in inputs.items():
            command += [f"--{role}", *map(str, paths)]
        command += ["--out", str(out)]
        if state:
            folder = store.state_path(action.key)
            folder.mkdir(parents=True, exist_ok=True)
            command += ["--state", str(folder)]
        status = _call(command, claim)
        if status:
            _explain_failure(label, status)
            raise SystemExit(status if status in (USER_ERROR, RETRY) else 1)
        outputs = store.publish(out)
    if not outputs:
        raise AssertionError(f"{label} left no file")
    return outputs


def _call(command: list[str], claim: int) -> int:
    """Run a command to its end, passing on the signals that ask for it. Ctrl-C reaches it by itself.

    The command inherits the claim: if this process is killed, the one that goes on writing the state
    still holds it.
    """
    previous = {}
    with subprocess.Popen(command, pass_fds=(claim,)) as process:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, lambda n, _: process.send_signal(n))
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _explain_failure(label: str, status: int) -> None:
    if status < 0:
        say(f"{label}  was killed by {signal.Signals(-status).name}; the same command tries again")
    elif status == RETRY:
        say(f"{label}  stopped with its state saved; the same command resumes it")
    else:
        say(f"{label}  failed with status {status}")


def _record(
    action: Action,
    name: str,
    inputs: dict[str, list[Path]],
    unhashed: dict[str, list[Path]],
    execution: dict[str, Any],
    outputs: dict[str, dict[str, Any]],
    wall_s: float,
) -> dict[str, Any]:
    return {
        "key": action.key,
        "stage": action.stage,
        "name": name,
        "science": action.science,
        "code": action.code,
        "inputs": {
            role: [
                {"path": str(path), "sha256": sha256}
                for path, sha256 in zip(paths, action.inputs[role], strict=True)
            ]
            for role, paths in inputs.items()
        },
        "unhashed": {role: [str(path) for path in paths] for role, paths in unhashed.items()},
        "outputs": outputs,
        "execution": execution,
        "provenance": {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "wall_s": round(wall_s, 3),
            "host": socket.gethostname(),
            "user": getpass.getuser(),
            "platform": platform.platform(),
            "versions": {"python": platform.python_version(), **_versions()},
            **_git(),
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    dirty = commit is not None and bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"git_commit": commit, "dirty": dirty}


def _chain(inputs: dict[str, list[Path]]) -> list[dict[str, Any]]:
    """The actions that made the inputs, and theirs, upward; each once, sources first."""
    chain: dict[str, dict[str, Any]] = {}

    def visit(path: Path) -> None:
        record = maker(path)
        if record is None or record["key"] in chain:
            return
        sources = [file["path"] for files in record["inputs"].values() for file in files]
        for source in (
            *sources,
            *(path for paths in record["unhashed"].values() for path in paths),
        ):
            visit(Path(source))
        chain[record["key"]] = {
            "stage": record["stage"],
            "name": record["name"],
            "key": record["key"],
            "inputs": {
                f["path"]: f["sha256"] for files in record["inputs"].values() for f in files
            },
            "outputs": {name: output["sha256"] for name, output in record["outputs"].items()},
            **record["provenance"],
        }

    for paths in inputs.values():
        for path in paths:
            visit(path)
    return list(chain.values())


def _tee(log: Path) -> None:
    """From here on, what this process and its children print goes to the terminal and to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # -i: Ctrl-C ends the whole process group, and the last words of the stage must still be written.
    tee = subprocess.Popen(["tee", "-i", str(log)], stdin=subprocess.PIPE, stdout=sys.stderr)
    assert tee.stdin
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", help="module name under snakegpt.stages")
    parser.add_argument("name", help="what it runs for: an experiment, a corpus, ...")
    parser.add_argument("--settings", type=json.loads, default={}, help="science settings, JSON")
    parser.add_argument("--execution", type=json.loads, default={}, help="other settings, JSON")
    add = parser.add_argument
    paths: dict[str, Any] = {"nargs": "+", "action": "append", "default": []}
    add("--input", **paths, metavar="ROLE PATH", help="input files, part of the key by content")
    add("--unhashed", **paths, metavar="ROLE PATH", help="input files that are not part of the key")
    parser.add_argument("--output", type=Path, required=True, help="folder under results/")
    parser.add_argument("--store", default="store", help="folder of the store")
    parser.add_argument("--state", action="store_true", help="the stage resumes from saved state")
    parser.add_argument(
        "--provenance",
        action="store_true",
        help="hand the stage the records of what made its inputs",
    )
    parser.add_argument("--log", type=Path, help="file that gets a copy of everything printed")
    return parser


def _roles(groups: list[list[str]]) -> dict[str, list[Path]]:
    return {role: [Path(path) for path in paths] for role, *paths in groups}


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.log:
        _tee(args.log)
    run(
        args.stage,
        args.name,
        args.settings,
        _roles(args.input),
        args.output,
        Store.locate(args.store),
        execution=args.execution,
        unhashed=_roles(args.unhashed),
        state=args.state,
        provenance=args.provenance,
    )


if __name__ == "__main__":
    main()
