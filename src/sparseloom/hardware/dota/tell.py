"""The event log's `note` as one function: inlined at every place it would take long to compile."""

from __future__ import annotations

from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.engine.log import Log, note


@compiled
def tell(log: Log, unit: int, code: int, tag: int, now: int) -> None:
    """From cycle `now` on, `unit` does `code` for `tag`."""
    note(log, unit, code, tag, now)
