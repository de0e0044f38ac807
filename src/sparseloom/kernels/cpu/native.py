"""The compiled library: finding it, saying why it is missing, and choosing its tier.

A tier is one instruction set that the kernels are compiled for. The widest one that the processor
has is active, unless ``SPARSELOOM_CPU_TIER`` names a narrower one. ``SPARSELOOM_CPU_LIBRARY`` is
the path of another build of the library, for those who work on it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from sparseloom.errors import unknown_name

TIERS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Every tier, the narrowest first. Each contains those before it."""

_NAME = "sparseloom.kernels.cpu._native"
_LIBRARY = "SPARSELOOM_CPU_LIBRARY"
_TIER = "SPARSELOOM_CPU_TIER"


def library() -> ModuleType:
    """The library, loaded on the first call.

    Raises:
        ImportError: it is missing; the message says why.
        ValueError: ``SPARSELOOM_CPU_TIER`` names no tier, or one that the processor lacks.
    """
    found = _found()
    if isinstance(found, str):
        raise ImportError(f"the C++ backend is missing: {found}", name=_NAME)
    return found


def missing_reason() -> str | None:
    """Why there is no library (None: there is one)."""
    found = _found()
    return found if isinstance(found, str) else None


def available_tiers() -> tuple[str, ...]:
    """The tiers that this processor can run, the narrowest first."""
    return TIERS[: library().widest_tier() + 1]


def active_tier() -> str:
    """The tier whose kernels run now."""
    return TIERS[library().active_tier()]


@contextmanager
def use_tier(name: str) -> Generator[None]:
    """Run the kernels of one tier inside a `with` block, in every thread of the process.

    Args:
        name: one of ``available_tiers()``.

    Raises:
        ValueError: no tier has this name, or the processor lacks it.
    """
    loaded = library()
    before, rank = loaded.active_tier(), _rank("tier", name, loaded)
    loaded.set_active_tier(rank)
    try:
        yield
    finally:
        loaded.set_active_tier(before)


@functools.cache
def _found() -> ModuleType | str:
    """The library with its tier set, or why there is none. Looked up once."""
    given = os.environ.get(_LIBRARY)
    try:
        loaded = _load(Path(given)) if given else importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        return _told_by_the_build()
    except (ImportError, OSError) as error:
        return f"it does not load ({error})"
    wanted = os.environ.get(_TIER)
    if wanted:
        loaded.set_active_tier(_rank(_TIER, wanted, loaded))
    return loaded


def _told_by_the_build() -> str:
    """The sentence that the build leaves in place of the library."""
    here = Path(__file__).parent
    note = here / "_missing.txt"
    if note.is_file():
        return note.read_text("utf-8").strip()
    if (here / "csrc").is_dir():
        return "it is not built in this source tree, or did not compile (`make build` shows which)"
    return "it was not built when sparseloom was installed"


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"{_LIBRARY} must be the path of a library, got '{path}'")
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{_LIBRARY} must be an extension module, got '{path}'")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rank(what: str, name: str, loaded: ModuleType) -> int:
    if name not in TIERS:
        raise unknown_name(what, name, TIERS)
    rank, widest = TIERS.index(name), loaded.widest_tier()
    if rank > widest:
        raise ValueError(f"{what} must be at most {TIERS[widest]!r} on this machine, got {name!r}")
    return rank
