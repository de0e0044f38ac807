"""Files and folders that appear whole or not at all, and where those of the user lie."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def fresh_file(path: str | PathLike[str]) -> Generator[Path]:
    """Where to write what takes the place of `path` once the block has ended without an error.

    Until then, and after an error, what was there before stays.  The folder is made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield fresh
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def fresh_folder(path: str | PathLike[str]) -> Generator[Path]:
    """The same for a folder: an empty one to fill, which takes the place of the one at `path`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    fresh.mkdir()
    try:
        yield fresh
        _put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_in_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    # A folder cannot replace a full one in one step: move the old one aside, and back on failure.
    aside = fresh.with_suffix(".old")
    target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def user_file(name: str, *, variable: str) -> Path:
    """Where a file of the user's lies: at $VARIABLE, else in $XDG_CACHE_HOME/sparseloom or
    ~/.cache/sparseloom."""
    named = os.environ.get(variable)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparseloom" / name
