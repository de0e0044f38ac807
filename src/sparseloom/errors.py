"""Errors that no builtin fits, sentences that many modules need, and what commands report."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class SparseloomError(Exception):
    """Something went wrong that is neither a bad value nor a missing file or package."""


BAD_INPUT = (
    SparseloomError,
    ValueError,
    TypeError,
    OSError,
    ImportError,
    NotImplementedError,
    FloatingPointError,  # a training run that diverged
)
"""What a command reports in one line, with exit code 2; anything else is a fault of sparseloom."""


def one_line(error: BaseException) -> str:
    """What `error` says, on one line; a pydantic error says which keys are wrong and why."""
    if type(error).__module__.startswith("pydantic"):
        items: list[dict[str, Any]] = getattr(error, "errors", list)()
        text = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'input'}: {item['msg']}" for item in items
        )
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def tracebacks_wanted() -> bool:
    """Whether `SPARSELOOM_DEBUG` asks commands for the traceback of an error."""
    return os.environ.get("SPARSELOOM_DEBUG", "") not in {"", "0"}


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
