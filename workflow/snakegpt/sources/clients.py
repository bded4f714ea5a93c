"""Calling the client program of a package registry."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

# What a package's build step, which pip may run, has no business to know.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def call(command: Sequence[str | Path], folder: Path | None = None) -> tuple[int, str]:
    """Run a program to its end: (status, what it printed).

    The output is in English, and without what stands before an @ in its URLs.
    """
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**environment, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, re.sub(r"://[^/@\s]+@", "://", done.stdout)


def last_lines(output: str, count: int = 8) -> str:
    """The end of a program's output, indented as the rest of an error."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-count:])
