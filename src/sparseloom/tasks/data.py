"""Where data sets lie on disk, and how their files are read (plain or gzip)."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = "SPARSELOOM_DATA"
"""Folder of data sets that is used when no `data` argument (`--data`) is given."""


def find_data(name: str, data: Path | None = None, *, files: Sequence[str] = ()) -> Path:
    """The folder of data set `name`, as "ptb" or "glue/STS-B".

    `data` (else the folder in SPARSELOOM_DATA) may be the folder of all data sets or the data set's
    own folder.  With `files`, the folder must hold at least one of them, plain or with `.gz`.

    Raises FileNotFoundError that names every folder that was looked at.
    """
    root = data
    if root is None:
        named = os.environ.get(ENVIRONMENT)
        if not named:
            raise FileNotFoundError(
                f"the data set {name!r} is not part of sparseloom: pass its folder with --data or "
                f"set {ENVIRONMENT}"
            )
        root = Path(named)
    leaf = Path(name).name
    candidates = list(dict.fromkeys((root / name, root / leaf, root)))
    for folder in candidates:
        if folder.is_dir() and any(find_file(folder, file) for file in files):
            return folder
        if not files and folder.is_dir() and (folder != root or root.name == leaf):
            return folder
    wanted = f" (any of {', '.join(files)}, plain or .gz)" if files else ""
    places = ", ".join(map(str, candidates))
    raise FileNotFoundError(f"no data set {name!r}{wanted}: looked in {places}")


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of `names` that `folder` holds, plain before gzip, or None."""
    paths = (folder / (name + ending) for name in names for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def read_bytes(folder: Path, *names: str) -> bytes:
    """The content of the first of `names` that exists in `folder`, unpacked.

    Raises FileNotFoundError when there is none and ValueError when a gzip file is damaged.
    """
    path = find_file(folder, *names)
    if path is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)} (plain or .gz)")
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def read_text(folder: Path, *names: str) -> str:
    """As `read_bytes`, decoded as UTF-8; raises ValueError when it is not."""
    raw = read_bytes(folder, *names)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{find_file(folder, *names)} is not UTF-8: {error}") from error
