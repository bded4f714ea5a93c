"""Files that are either whole or not there, also after a crash: written aside, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then give it its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)  # the name as well


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, or a link; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
