"""Numba functions that are compiled once, kept on disk, and compiled anew when any of them changes.

Numba looks only at the file of the function itself: a machine's loop would keep the code of a unit
that has changed since. Here the stamp covers every source file under `sparseloom.hardware`. Where
the package's folder cannot be written, numba keeps its files in the user's cache folder.

Units pass many arrays to each other in every cycle. Counting references to them would take a
hundred times as long as the simulation: `compiled` and `inlined` leave it out, and so cannot make
arrays; what makes some is `allocating`.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., object])


def compiled(function: _F) -> _F:
    """`function` in nopython mode, cached on disk; it makes no arrays."""
    return _cached(function, counted=False)


def allocating(function: _F) -> _F:
    """As `compiled`, for functions that make arrays or give them back."""
    return _cached(function, counted=True)


def inlined(function: _F) -> _F:
    """`function` for use inside compiled ones only: a port, a FIFO, a state machine."""
    return cast("_F", numba.njit(nogil=True, _nrt=False)(inspect.unwrap(function)))


def _cached(function: _F, *, counted: bool) -> _F:
    # Checkers of annotations wrap functions while the tests run; numba compiles what is inside.
    plain = inspect.unwrap(function)
    dispatcher: Any = numba.njit(cache=True, nogil=True, _nrt=counted)(plain)
    if dispatcher is plain:  # NUMBA_DISABLE_JIT: plain Python, for debugging
        return function
    kept = getattr(dispatcher._cache, "_cache_file", None)
    if kept is None or not hasattr(kept, "_source_stamp"):
        # Another numba keeps its stamp elsewhere: rather compile every time than run stale code.
        dispatcher = numba.njit(nogil=True, _nrt=counted)(plain)
    else:
        kept._source_stamp = (*kept._source_stamp, _stamp())
    return cast("_F", dispatcher)


def bare(function: _F) -> _F:
    """`inlined` without reference counts: for small functions of a state with many arrays.

    Every field of such a state that a function reads costs two atomic additions otherwise, which
    is most of its time. In return the function must not make an array (views are free).
    """
    options: Any = {"nogil": True, "_nrt": False}
    return cast("_F", numba.njit(**options)(inspect.unwrap(function)))


@cache
def _stamp() -> int:
    """Changes whenever a source file of the simulators does."""
    home = Path(__file__).parents[1]
    found = 0
    for file in sorted(home.rglob("*.py")):
        found = zlib.crc32(file.read_bytes(), found)
    return found
