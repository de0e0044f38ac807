"""FIFOs with ready/valid ports: a bank of ring buffers of one depth, in one array.

A producer asks `full` (its ready), a consumer asks `used` (its valid); what a consumer takes in a
cycle is room for the producer in the next one, if the machine steps its units from the last one of
the pipeline to the first. Row i of a bank is `[head, used, item, item, …]`: compiled code passes
few arrays quickly and many slowly.
"""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.engine.compiled import inlined

_FIRST = 2  # the first item's column


def make_fifos(fifos: int, depth: int) -> np.ndarray:
    """Empty FIFOs that hold `depth` 64-bit items each: (fifos, 2 + depth)."""
    return np.zeros((fifos, _FIRST + depth), np.int64)


@inlined
def used(fifos: np.ndarray, i: int) -> int:
    """Items in FIFO i."""
    return fifos[i, 1]


@inlined
def full(fifos: np.ndarray, i: int) -> bool:
    """Whether FIFO i has no room."""
    return fifos[i, 1] == fifos.shape[1] - _FIRST


@inlined
def push(fifos: np.ndarray, i: int, item: int) -> None:
    """Put an item at the end of FIFO i, which must not be full."""
    depth = fifos.shape[1] - _FIRST
    end = fifos[i, 0] + fifos[i, 1]
    if end >= depth:
        end -= depth
    fifos[i, _FIRST + end] = item
    fifos[i, 1] += 1


@inlined
def peek(fifos: np.ndarray, i: int) -> int:
    """The oldest item of FIFO i, which must not be empty."""
    return fifos[i, _FIRST + fifos[i, 0]]


@inlined
def pop(fifos: np.ndarray, i: int) -> int:
    """Take the oldest item of FIFO i, which must not be empty."""
    head = fifos[i, 0]
    item = fifos[i, _FIRST + head]
    fifos[i, 0] = 0 if head + 1 == fifos.shape[1] - _FIRST else head + 1
    fifos[i, 1] -= 1
    return item
