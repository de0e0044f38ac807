"""Errors that no builtin fits, and the two sentences that many modules need."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class SparseloomError(Exception):
    """Something went wrong that is neither a bad value nor a missing file or package."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the ones that do.

    Args:
        kind: what is named, as "method" or "task".
        given: the name that was asked for.
        known: every name there is; they are listed in their given order.
    """
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {given!r}{hint} (there is: {', '.join(names) or 'none'})")


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or raise an ImportError that says how to install it.

    Args:
        module: the module's dotted name.
        extra: the extra of sparseloom that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is not installed: pip install 'sparseloom[{extra}]'", name=module
        ) from error
