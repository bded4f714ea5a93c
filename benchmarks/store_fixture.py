"""A store of any size for benchmarks and tests: real digests, tiny objects, records of one template.

python benchmarks/store_fixture.py /tmp/big/store 100000 1000000

Actions come in chains of five, each reading what the one before made. Every second chain's last action
is shown in results/ beside the store; so a tenth of the actions is kept by results, two fifths are
ancestors of those, and half is garbage once it is older than an hour.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from snakegpt.identity import canonical_json, code_of

CHAIN = 5
PLAIN = 2  # of an action's objects, outputs that are files; the rest is one folder: a listing, its files


def make_store(root: Path, actions: int, objects: int) -> None:
    """Fill a new store with so many actions and objects, at least four objects an action.

    Every object is a file of 8 bytes or a folder's listing, under its true sha256; every record has
    its true key. About 0.1 ms an object on a local disk.
    """
    per_action = objects // actions
    if per_action < PLAIN + 2:
        raise ValueError(f"{objects:,} objects for {actions:,} actions: at least 4 each are wanted")
    n_leaves = per_action - PLAIN - 1
    for name in ("tmp", "state", "locks", "roots"):
        (root / name).mkdir(parents=True)
    for name in ("objects", "actions"):
        for first in range(256):
            (root / name / f"{first:02x}").mkdir(parents=True)
    results = root.resolve().parent / "results"
    results.mkdir()
    (root / "roots" / hashlib.sha256(str(results).encode()).hexdigest()[:16]).symlink_to(results)
    writer = _Writer(root, n_leaves)
    before: tuple[str, str] | None = None
    for index in range(actions):
        chain, place = divmod(index, CHAIN)
        key, shown = writer.action(index, before if place else None)
        before = (key, shown["plain_0"])
        if place == CHAIN - 1 and chain % 2 == 0:
            _show(root, results, f"run_{index:06d}", key, shown)


class _Writer:
    def __init__(self, root: Path, n_leaves: int) -> None:
        self.n_leaves, self.count = n_leaves, 0
        self.objects = [os.open(root / "objects" / f"{n:02x}", os.O_RDONLY) for n in range(256)]
        self.actions = [os.open(root / "actions" / f"{n:02x}", os.O_RDONLY) for n in range(256)]
        self.code = code_of("train_model")
        identity = {"stage": "train_model", "science": {"seed": "@SEED@"}, "code": self.code}
        entry = {"path": "results/made/before/plain_0", "sha256": "@INPUT@", "action": "@ACTION@"}
        self.roots = self._templates({**identity, "inputs": {}}, {})
        self.others = self._templates(
            {**identity, "inputs": {"tokens": ["@INPUT@"]}}, {"tokens": [entry]}
        )

    def _templates(self, identity: dict, inputs: dict) -> tuple[bytes, str]:
        """What a key is the digest of, and the record."""
        outputs = {f"plain_{n}": {"sha256": f"@PLAIN{n}@", "bytes": 8} for n in range(PLAIN)}
        listing = {"sha256": "@LISTING@", "bytes": "@BYTES@"}
        listing["folder"] = {"files": self.n_leaves, "bytes": 8 * self.n_leaves}
        record = {
            **identity,
            "key": "@KEY@",
            "name": "run_@GROUP@",
            "inputs": inputs,
            "unhashed": {},
            "outputs": {**outputs, "folder": listing},
            "execution": {"threads": 2},
            "provenance": {"finished": "2026-01-01T00:00:00+00:00", "user": "x", "wall_s": 1.0},
        }
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        return canonical_json(identity), text.replace('"@BYTES@"', "@BYTES@")

    def action(self, index: int, made: tuple[str, str] | None) -> tuple[str, dict[str, str]]:
        """Write one action and its objects; returns its key, and result path -> sha256."""
        plain = [self._next_object() for _ in range(PLAIN)]
        leaves = [self._next_object() for _ in range(self.n_leaves)]
        entries = ",".join(
            f'{{"bytes":8,"mode":292,"path":"part_{n:04d}","sha256":"{sha256}"}}'
            for n, sha256 in enumerate(leaves)
        )
        content = f'{{"entries":[{entries}]}}'.encode()
        listing = self._object(content)
        identity, record = self.others if made else self.roots
        values = {"SEED": str(index), "GROUP": str(index % 100)}
        values |= {"LISTING": listing, "BYTES": str(len(content))}
        values |= {f"PLAIN{n}": sha256 for n, sha256 in enumerate(plain)}
        if made:
            values |= {"ACTION": made[0], "INPUT": made[1]}
            identity = identity.replace(b"@INPUT@", made[1].encode())
        identity = identity.replace(b"@SEED@", str(index).encode())
        values["KEY"] = hashlib.sha256(identity).hexdigest()
        for name, value in values.items():
            record = record.replace(f"@{name}@", value)
        key = values["KEY"]
        _write(self.actions[int(key[:2], 16)], f"{key}.json", record.encode(), 0o644)
        shown = {f"plain_{n}": sha256 for n, sha256 in enumerate(plain)}
        return key, shown | {f"folder/part_{n:04d}": sha256 for n, sha256 in enumerate(leaves)}

    def _next_object(self) -> str:
        self.count += 1
        return self._object(self.count.to_bytes(8, "little"))

    def _object(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        _write(self.objects[int(sha256[:2], 16)], sha256, content, 0o444)
        return sha256


def _write(folder: int, name: str, content: bytes, mode: int) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT, mode, dir_fd=folder)
    os.write(descriptor, content)
    os.close(descriptor)


def _show(root: Path, results: Path, name: str, key: str, shown: dict[str, str]) -> None:
    """Links to the objects and pointers to the action, as `links.link` makes them."""
    folder, pointers = results / "made" / name, results / ".actions" / "made" / name
    for path, sha256 in shown.items():
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            os.path.relpath(root.resolve() / "objects" / sha256[:2] / sha256, link.parent)
        )
    pointers.mkdir(parents=True)
    for output in {path.split("/")[0] for path in shown}:
        record = root.resolve() / "actions" / key[:2] / f"{key}.json"
        (pointers / f"{output}.json").symlink_to(os.path.relpath(record, pointers))


if __name__ == "__main__":
    make_store(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
