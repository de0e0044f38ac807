"""Numba functions that are compiled once, kept on disk, and compiled anew when any of them changes.

Numba looks only at the file of the function itself: a machine's loop would keep the code of a unit
that has changed since. Here the stamp covers every source file under `sparseloom.hardware`. Where
the package's folder cannot be written, numba keeps its files in the user's cache folder.

Units pass many arrays to each other in every cycle. Counting references to them would take a
hundred times as long as the simulation: `compiled` and `inlined` leave it out, and so cannot make
arrays, views included; what makes some is `allocating`.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import extending

_F = TypeVar("_F", bound=Callable[..., object])


def compiled(function: _F) -> _F:
    """`function` in nopython mode, cached on disk; it makes no arrays."""
    return _cached(function, counted=False)


def allocating(function: _F) -> _F:
    """As `compiled`, for functions that make arrays or give them back."""
    return _cached(function, counted=True)


def inlined(function: _F) -> _F:
    """`function` for use inside compiled ones: a port, a FIFO, the step of a unit.

    It becomes part of its callers, which costs them no call, and is compiled once for integers
    whatever constants it is called with. Python may call it too, for a test.
    """
    plain = inspect.unwrap(function)
    options: Any = {"nogil": True, "_nrt": False}
    from_python = numba.njit(**options)(plain)

    @wraps(plain)
    def called(*args: object, **named: object) -> object:
        return from_python(*args, **named)

    # As an overload it needs no entry from Python, and is not specialised on every literal.
    inner: Any = {**options, "forceinline": True, "no_cfunc_wrapper": True}
    extending.overload(called, jit_options=inner, strict=False)(lambda *_, **__: plain)
    return cast("_F", called)


def _cached(function: _F, *, counted: bool) -> _F:
    # Checkers of annotations wrap functions while the tests run; numba compiles what is inside.
    plain = inspect.unwrap(function)
    # The names of the files on disk hold this name: those of older sources are never opened, which
    # matters because reading them would look for classes that may be gone.
    plain.__qualname__ = f"{plain.__qualname__}.{_stamp():08x}"
    # What was typed at a prompt or stands in a page has no file that numba could watch.
    kept = Path(plain.__code__.co_filename).suffix == ".py"
    options: Any = {"nogil": True, "_nrt": counted, "cache": kept}
    return cast("_F", numba.njit(**options)(plain))


@cache
def _stamp() -> int:
    """Changes whenever a source file of the simulators does."""
    home = Path(__file__).parents[1]
    found = 0
    for file in sorted(home.rglob("*.py")):
        found = zlib.crc32(file.read_bytes(), found)
    return found
