"""The runner that every rule calls: compute the key, look it up, link on a hit, run the stage on a miss.

    python -m snakegpt.run index_tokens shakespeare-gpt2 --settings '{}' \\
        --input parts results/tokens/shakespeare-gpt2/part_000000.json \\
        --output results/tokens/shakespeare-gpt2

Computing a key reads no settings file and imports no stage, so a hit takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from snakegpt.artefacts import NOTES, read_notes
from snakegpt.errors import RETRY, USER_ERROR, UserError, reports_errors
from snakegpt.identity import Action, code_of
from snakegpt.progress import duration, quantity, say
from snakegpt.store import Store, provenance
from snakegpt.store.leases import Lease
from snakegpt.store.links import digest_of, link
from snakegpt.store.objects import Check, LinkMode, Outputs

LONG_ARGUMENT = 100_000  # characters


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
    chain: bool,
    remote_url: str | None = None,
    push: bool = True,
) -> None:
    """Bring the results of one action to the folder `output`, by look-up or by running its stage.

    inputs      role -> files whose content is part of the key
    unhashed    role -> files the stage gets as well, whose content is not (a place, a measurement)
    state       whether the stage resumes from state/<key>
    chain       whether the stage gets the records of what made its inputs
    remote_url  store that is asked on a miss and, if `push`, given what ran; None: there is none
    raises      UserError, SystemExit with the stage's status if it fails
    """
    started = time.monotonic()
    digests = {role: [_digest(store, path) for path in paths] for role, paths in inputs.items()}
    if chain:
        settings = provenance.told(store, stage, settings, inputs)
    action = Action(stage, settings, code_of(stage), digests)
    label = f"{stage} {name}"
    record = store.use(action.key)
    remote, ran = None, False
    if record is None:
        store.make()
        if remote_url:
            from snakegpt.store.remote import Remote  # a hit has no time for it

            remote = Remote(store, remote_url)
            record = remote.try_pull(action.key, label)
    if record is None:
        waits = f"{label}  waits for another run of it"
        with store.claim(action.key, lambda: say(waits)) as lease:
            record = store.use(action.key)  # what we waited for
            if record is None:
                say(f"{label}  runs  ({action.key[:12]})")
                files = {**inputs, **unhashed}
                outputs = _run_stage(action, label, files, store, lease, execution, state, chain)
                wall_s = time.monotonic() - started
                record = _record(action, name, inputs, unhashed, execution, outputs)
                record["provenance"] = provenance.gather(store, action.key, wall_s)
                lease.check()
                store.record(action.key, record)
                shutil.rmtree(store.state_path(action.key), ignore_errors=True)
                say(f"{label}  done in {duration(wall_s)}, {_content(outputs)}")
                ran = True
    link(store, record, output)
    if not ran:
        say(f"{label}  found in the store  ({action.key[:12]})")
    elif remote and push:
        remote.try_push(record, label)


def _digest(store: Store, path: Path) -> str:
    try:
        return digest_of(store, path)
    except FileNotFoundError:
        raise UserError(f"input {path} does not exist.") from None


def _content(outputs: Outputs) -> str:
    sizes = [
        output.get("folder", {"files": 1, "bytes": output["bytes"]}) for output in outputs.values()
    ]
    n_files, n_bytes = (sum(size[what] for size in sizes) for what in ("files", "bytes"))
    return f"{n_files:,} file{'s' if n_files != 1 else ''}, {quantity(n_bytes, 'B')}"


def _run_stage(
    action: Action,
    label: str,
    inputs: dict[str, list[Path]],
    store: Store,
    lease: Lease,
    execution: dict[str, Any],
    state: bool,
    chain: bool,
) -> Outputs:
    """Run a stage in a workspace of its own and publish what it leaves there."""
    with store.workspace(action.key) as workspace:
        out, notes = workspace / "out", workspace / "digests"
        out.mkdir()
        execution = {**execution, "label": label}
        if chain:
            found = provenance.chain(store, [path for paths in inputs.values() for path in paths])
            file = workspace / "provenance.json"
            actions = [provenance.summary(record) for record in found]
            file.write_text(json.dumps({"actions": actions}), encoding="utf-8")
            execution["provenance"] = str(file)
        command = [sys.executable, "-m", f"snakegpt.stages.{action.stage}"]
        command += ["--settings", _argument(action.science, workspace / "settings.json")]
        command += ["--execution", _argument(execution, workspace / "execution.json")]
        for role, paths in inputs.items():
            command += [f"--{role}", *map(str, paths)]
        command += ["--out", str(out)]
        if state:
            folder = store.state_path(action.key)
            folder.mkdir(parents=True, exist_ok=True)
            command += ["--state", str(folder)]
        status = _call(command, lease, {**os.environ, NOTES: str(notes.absolute())})
        if lease.lost.is_set():
            lease.check()
        if status:
            _explain_failure(label, status)
            # A stage that starts, or compiles, has nothing to save and leaves such a signal to the system.
            asked = -status in (signal.SIGTERM, signal.SIGUSR1)
            raise SystemExit(RETRY if asked else status if status in (USER_ERROR, RETRY) else 1)
        lease.check()
        outputs = store.publish(out, read_notes(notes))
    if not outputs:
        raise AssertionError(f"{label} left no file")
    return outputs


def _argument(value: Mapping[str, Any], file: Path) -> str:
    """JSON for a command line, by way of a file if it is long: Linux takes 128 KiB a word."""
    text = json.dumps(value)
    if len(text) < LONG_ARGUMENT:
        return text
    file.write_text(text, encoding="utf-8")
    return f"@{file}"


def _call(command: list[str], lease: Lease, environment: dict[str, str]) -> int:
    """Run a command to its end, passing on the signals that ask for it. Ctrl-C reaches it by itself.

    The command inherits the claim: if this process is killed, the one that goes on writing the state
    still holds it. If the claim is lost, the command is stopped.
    """
    kept = () if lease.descriptor is None else (lease.descriptor,)
    previous = {}
    with subprocess.Popen(command, pass_fds=kept, env=environment) as process:
        lease.on_loss = process.kill
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
        say(f"{label}  stopped; the same command goes on from its last saved state")
    else:
        say(f"{label}  failed with status {status}")


def _record(
    action: Action,
    name: str,
    inputs: dict[str, list[Path]],
    unhashed: dict[str, list[Path]],
    execution: dict[str, Any],
    outputs: Outputs,
) -> dict[str, Any]:
    return {
        "key": action.key,
        "stage": action.stage,
        "name": name,
        "science": action.science,
        "code": action.code,
        "inputs": {
            role: [provenance.entry(*pair) for pair in zip(paths, action.inputs[role], strict=True)]
            for role, paths in inputs.items()
        },
        "unhashed": {
            role: [provenance.entry(path) for path in paths] for role, paths in unhashed.items()
        },
        "outputs": outputs,
        "execution": execution,
    }


def _tee(log: Path) -> None:
    """From here on, what this process and its children print goes to the terminal and to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Ctrl-C ends the whole process group, Slurm's SIGTERM comes to all of a job's processes, and the last
    # words of the stage must still be written.
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a child goes on ignoring them
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in stops}
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE, stdout=sys.stderr)
    for number, handler in previous.items():
        signal.signal(number, handler)
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
    add("--check", choices=get_args(Check), default="size", help="what a hit checks of each object")
    add("--link", choices=get_args(LinkMode), default="auto", help="how results/ shows objects")
    add("--remote", metavar="URL", help="store that is asked on a miss and given what runs here")
    add("--no-push", dest="push", action="store_false", help="give the remote store nothing")
    parser.add_argument("--state", action="store_true", help="the stage resumes from saved state")
    parser.add_argument(
        "--provenance",
        action="store_true",
        help="hand the stage the records of what made its inputs",
    )
    parser.add_argument("--threads", type=int, help="cores the stage may use; default: all")
    parser.add_argument("--log", type=Path, help="file that gets a copy of everything printed")
    return parser


def _roles(groups: list[list[str]]) -> dict[str, list[Path]]:
    return {role: [Path(path) for path in paths] for role, *paths in groups}


@reports_errors
def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    calls = [words]
    if words and words[0].startswith("@"):  # a rule's arguments that no command line would take
        given = json.loads(Path(words[0][1:]).read_text(encoding="utf-8"))
        each = given if isinstance(given[0], list) else [given]  # a job may have several runs
        calls = [[*one, *words[1:]] for one in each]
    runs = [_parser().parse_args(call) for call in calls]
    if runs[0].log:
        _tee(runs[0].log)
    for args in runs:
        run(
            args.stage,
            args.name,
            args.settings,
            _roles(args.input),
            args.output,
            Store.locate(args.store, check=args.check, link=args.link),
            execution={**args.execution, **({"threads": args.threads} if args.threads else {})},
            unhashed=_roles(args.unhashed),
            state=args.state,
            chain=args.provenance,
            remote_url=args.remote,
            push=args.push,
        )


if __name__ == "__main__":
    main()
