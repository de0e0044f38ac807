"""Parts of a long study, kept on disk so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sparseloom.files import fresh_file

T = TypeVar("T")


def kept_part(file: Path, settings: Any, make: Callable[[], T]) -> T:
    """What `make` returns; read from `file` where an earlier run with the same settings left it.

    Args:
        file: JSON; appears whole or not at all.
        settings: everything that the part depends on, as JSON holds it.
        make: returns what JSON can hold.
    """
    wanted = json.loads(json.dumps(settings))
    if file.is_file():
        found = json.loads(file.read_text("utf-8"))
        if found["settings"] == wanted:
            return found["part"]
    part = make()
    with fresh_file(file) as fresh:
        fresh.write_text(json.dumps({"settings": wanted, "part": part}), "utf-8")
    return part
