"""The `stdlib` corpus: the source of the Python standard library that runs this process.

Every user has it, so the built-in model can be trained, scored and re-trained anywhere.
Tests, third-party packages and generated tables are left out; tables (the character maps of
`encodings/`, the help texts of `pydoc_data/`) would flatter any compressor.  About six files in a
hundred are held out by a hash of their path.  `stdlib_manifest.json` names the held-out files and
their SHA-256 for the Python the model was trained on: on another Python version the files differ,
and scores are labelled not comparable.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
    | {"pydoc_data", "lib-dynload", "ensurepip"}
)
_SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars")
_HELD_OUT_PER_MILLE = 60
SEPARATOR = b"\0"
"""Stands before every file; byte 0 occurs in no source file."""


@dataclass(frozen=True, slots=True)
class StdlibCorpus:
    """Both halves of the corpus, as bytes, and whether the held-out half is the reference one.

    `train` and `held_out` are the files in path order, a NUL before each.  `comparable` is true
    when every held-out file of the manifest is present with its recorded hash, so that a score may
    be set beside the published one; `differences` names the files that are missing or changed.
    """

    train: bytes
    held_out: bytes
    held_out_files: tuple[str, ...]
    comparable: bool
    differences: tuple[str, ...]


def read_sources(root: Path | None = None) -> Mapping[str, bytes]:
    """Non-test source files below `root` (default: this Python's standard library), by path."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    sources: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if _SKIPPED_FOLDERS.intersection(folders) or relative.name.startswith(_SKIPPED_FILES):
            continue
        if any(folder.startswith("config-") for folder in folders):
            continue
        text = path.read_bytes()
        if text and SEPARATOR not in text:
            sources[relative.as_posix()] = text
    return sources


def is_held_out(path: str) -> bool:
    """Whether the file is held out: a fixed share of all paths, chosen by their SHA-256."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < _HELD_OUT_PER_MILLE


def make_manifest(root: Path | None = None) -> dict[str, object]:
    """The manifest of the running Python: version, held-out files with hashes, train hash."""
    sources = read_sources(root)
    train = _join(text for path, text in sources.items() if not is_held_out(path))
    return {
        "schema": "sparseloom/stdlib-manifest/1",
        "python": ".".join(map(str, sys.version_info[:3])),
        "train_bytes": len(train),
        "train_sha256": hashlib.sha256(train).hexdigest(),
        "held_out": {p: _sha256(t) for p, t in sources.items() if is_held_out(p)},
    }


def read_manifest() -> Mapping[str, object]:
    """The committed manifest of the Python that the built-in model was trained on."""
    text = resources.files("sparseloom.tasks").joinpath("stdlib_manifest.json").read_text("utf-8")
    return MappingProxyType(json.loads(text))


@lru_cache(maxsize=1)
def load_stdlib() -> StdlibCorpus:
    """Read the corpus of the running Python and compare it with the manifest."""
    sources = read_sources()
    held_out = {path: text for path, text in sources.items() if is_held_out(path)}
    expected = read_manifest()["held_out"]
    assert isinstance(expected, dict)
    actual = {path: _sha256(text) for path, text in held_out.items()}
    differences = tuple(
        path for path in sorted({*expected, *actual}) if expected.get(path) != actual.get(path)
    )
    return StdlibCorpus(
        train=_join(text for path, text in sources.items() if path not in held_out),
        held_out=_join(held_out.values()),
        held_out_files=tuple(held_out),
        comparable=not differences,
        differences=differences,
    )


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _join(texts: Iterable[bytes]) -> bytes:
    return b"".join(SEPARATOR + text for text in texts)
