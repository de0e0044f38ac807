"""The event log: what every unit did in every cycle, as totals and, in a window, as intervals.

A unit says in each cycle what it does: `IDLE`, `BUSY`, or waiting, with the code of a cause that
its machine names. Equal cycles join into one interval, so a quiet unit costs nothing. Timeline,
stall breakdown and conservation tests read this and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import inlined

IDLE, BUSY = 0, 1
"""The first two codes of every unit; causes of stalls start at 2."""


class Log(NamedTuple):
    """State of the log; make one with `make_log`.

    totals (units, codes): cycles so far, intervals that still run not included.
    running (units, 3): code, first cycle and tag of the interval that runs.
    intervals (capacity, 5): unit, code, first cycle, one past the last, tag.
    limits: intervals stored, intervals that did not fit, first and one past the last cycle of the
    window.
    """

    totals: np.ndarray
    running: np.ndarray
    intervals: np.ndarray
    limits: np.ndarray


def make_log(
    units: int, codes: int, *, window: tuple[int, int] = (0, 0), capacity: int = 1_000_000
) -> Log:
    """An empty log that keeps the intervals which touch `window`."""
    size = capacity if window[1] > window[0] else 0
    running = np.zeros((units, 3), np.int64)
    running[:, 2] = -1
    return Log(
        np.zeros((units, codes), np.int64),
        running,
        np.zeros((size, 5), np.int64),
        np.array([0, 0, *window], np.int64),
    )


@inlined
def note(log: Log, unit: int, code: int, tag: int, now: int) -> None:
    """From cycle `now` on, `unit` does `code` for whatever `tag` stands for (a request, say)."""
    if log.running[unit, 0] == code and log.running[unit, 2] == tag:
        return
    close(log, unit, now)
    log.running[unit, 0] = code
    log.running[unit, 2] = tag


@inlined
def close(log: Log, unit: int, now: int) -> None:
    """End the interval that runs at cycle `now`; at the end of a run, of every unit."""
    start = log.running[unit, 1]
    if now <= start:
        return
    log.totals[unit, log.running[unit, 0]] += now - start
    if start < log.limits[3] and now > log.limits[2]:
        at = log.limits[0]
        if at < log.intervals.shape[0]:
            log.intervals[at, 0] = unit
            log.intervals[at, 1] = log.running[unit, 0]
            log.intervals[at, 2] = start
            log.intervals[at, 3] = now
            log.intervals[at, 4] = log.running[unit, 2]
            log.limits[0] += 1
        else:
            log.limits[1] += 1
    log.running[unit, 1] = now
