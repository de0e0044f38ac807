"""FIFOs with ready/valid ports: a bank of ring buffers of one depth, as arrays.

A producer asks `full` (its ready), a consumer asks `used` (its valid); what a consumer takes in a
cycle is room for the producer in the next one, if the machine steps its units from the last one of
the pipeline to the first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import inlined


class Fifos(NamedTuple):
    """`items` (fifos, depth), `head` and `used` (fifos)."""

    items: np.ndarray
    head: np.ndarray
    used: np.ndarray


def make_fifos(fifos: int, depth: int) -> Fifos:
    """Empty FIFOs that hold `depth` 64-bit items each."""
    return Fifos(
        np.zeros((fifos, depth), np.int64), np.zeros(fifos, np.int64), np.zeros(fifos, np.int64)
    )


@inlined
def full(fifos: Fifos, i: int) -> bool:
    """Whether FIFO i has no room."""
    return fifos.used[i] == fifos.items.shape[1]


@inlined
def push(fifos: Fifos, i: int, item: int) -> None:
    """Put an item at the end of FIFO i, which must not be full."""
    depth = fifos.items.shape[1]
    end = fifos.head[i] + fifos.used[i]
    if end >= depth:
        end -= depth
    fifos.items[i, end] = item
    fifos.used[i] += 1


@inlined
def peek(fifos: Fifos, i: int) -> int:
    """The oldest item of FIFO i, which must not be empty."""
    return fifos.items[i, fifos.head[i]]


@inlined
def pop(fifos: Fifos, i: int) -> int:
    """Take the oldest item of FIFO i, which must not be empty."""
    item = fifos.items[i, fifos.head[i]]
    head = fifos.head[i] + 1
    fifos.head[i] = 0 if head == fifos.items.shape[1] else head
    fifos.used[i] -= 1
    return item
