"""Crossbars with fixed priority: at each output the lowest input wins (SpAtten, HPCA 2021, §IV-D).

Inputs and outputs are FIFOs. In a cycle the head of each input asks for one output, and each
output takes one item at most. A machine says where heads want to go (`field_wants`, or its own
rule) and which outputs have room, then calls `arbitrate` and `transfer`.
"""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.engine.fifo import full, peek, pop, push, used


@inlined
def field_wants(inputs: np.ndarray, low_bit: int, outputs: int, wants: np.ndarray) -> None:
    """The output that each input's head asks for: its bits from `low_bit`, modulo `outputs`.

    `wants[i]` becomes -1 where input i is empty.
    """
    for i in range(wants.shape[0]):
        wants[i] = -1
        if used(inputs, i) > 0:
            wants[i] = (peek(inputs, i) >> low_bit) % outputs


@inlined
def rooms(outputs: np.ndarray, ready: np.ndarray) -> None:
    """`ready[o]` = whether output FIFO o has room."""
    for o in range(ready.shape[0]):
        ready[o] = not full(outputs, o)


@inlined
def arbitrate(wants: np.ndarray, ready: np.ndarray, grants: np.ndarray) -> int:
    """Fixed priority, lowest index first: at most one input for each output.

    Args:
        wants: (inputs) output asked for, or -1.
        ready: (outputs) bool, whether it takes an item in this cycle; cleared where one is granted.
        grants: (inputs) bool, written.

    Returns:
        How many are granted.
    """
    granted = 0
    for i in range(wants.shape[0]):
        grants[i] = False
        if wants[i] >= 0 and ready[wants[i]]:
            ready[wants[i]] = False
            grants[i] = True
            granted += 1
    return granted


@inlined
def transfer(
    inputs: np.ndarray, outputs: np.ndarray, wants: np.ndarray, grants: np.ndarray
) -> None:
    """Move each granted head to its output."""
    for i in range(wants.shape[0]):
        if grants[i]:
            push(outputs, wants[i], pop(inputs, i))
