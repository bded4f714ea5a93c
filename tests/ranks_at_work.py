"""Training runs of several ranks, for tests: torchrun starts this file, a job after another.

    torchrun --nproc-per-node 2 tests/ranks_at_work.py jobs.json

jobs.json   list of {"out": folder, "state": folder, "manifest": path, "training": settings,
            "launch": settings, "shape": what differs from SHAPE, "local_ranks": of a node that
            is made up, "stop_at": step after which it is to stop, "counted": whether to leave the
            bytes that rank 0 sends for the gradients of a step in out/sent}; all but the first three
            optional
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from snakegpt.distributed import Group, joined
from snakegpt.errors import Interrupted
from snakegpt.model import Shape
from snakegpt.settings import Training
from snakegpt.tokens import open_sets, read_manifest
from snakegpt.trainer import Trainer
from snakegpt.updates import Launch
from snakegpt.watchdog import Watchdog
from train_fixtures import SETTINGS

ALONE = Group()
SHAPE = Shape(vocabulary=12, layers=2, heads=2, channels=16, context=8, bias=False)


def trainer(
    state: Path,
    manifest: Path,
    group: Group = ALONE,
    shape: Shape = SHAPE,
    launch: dict[str, Any] | None = None,
    watchdog: Watchdog | None = None,
    **training: Any,
) -> Trainer:
    how = Launch(
        **{
            "label": "test",
            "device": "cpu",
            "dtype": torch.float32,
            "kernel": "sdpa",
            "loss": "plain",
            "compiled": False,
            "micro_rows": 8 // group.ranks,
            "threads": 1,
            "log_interval_s": 100,
            "save_interval_s": 100,
            **(launch or {}),
        }
    )
    content = read_manifest(manifest)
    splits = [open_sets(manifest, content, split) for split in ("train", "val")]
    recipe = Training(**{**SETTINGS["training"], **training})
    fingerprint = content["tokenizer"]["fingerprint"]
    return Trainer(shape, recipe, *splits, how, group, state, fingerprint, watchdog=watchdog)


def work(job: dict[str, Any], group: Group) -> None:
    out, state = Path(job["out"]), Path(job["state"])
    out.mkdir(parents=True, exist_ok=True)
    group = dataclasses.replace(group, local_ranks=job.get("local_ranks", group.ranks))
    shape = Shape(**{**SHAPE.__dict__, **job.get("shape", {})})
    one = trainer(
        state, Path(job["manifest"]), group, shape, job.get("launch"), **job.get("training", {})
    )
    if job.get("stop_at"):
        agreed = one._agreed
        one._agreed = lambda came, due: agreed(one.step == job["stop_at"], due)  # type: ignore[method-assign]
    sent: list[int] = []
    if job.get("counted"):
        gradients = one.updates._gradients

        def counting(place: int) -> None:
            before = written_bytes()
            gradients(place)
            sent.append(written_bytes() - before)

        one.updates._gradients = counting  # type: ignore[method-assign]
    try:
        one.run(out)
    except Interrupted:
        assert job.get("stop_at")
    if sent and group.leads:
        (out / "sent").write_text(str(min(sent)))  # in others a state was written beside


def written_bytes() -> int:
    """By this process, to files and sockets, as the kernel counts."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["wchar"])


def main() -> None:
    torch.set_num_threads(1)
    with joined("cpu", 60) as group:
        for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            work(job, group)
    sys.stderr.flush()
    os._exit(0)  # gloo's threads of many groups take seconds to go


if __name__ == "__main__":
    main()
