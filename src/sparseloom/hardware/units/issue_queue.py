"""The queue between DOTA's scheduler and the array: cycles from steps.

Per group of queries the array does the steps of Q·Kᵀ, in which it consumes them from the queue,
and then those of P·V, which replay a stored order and need no scheduler. While the array is busy
with P·V the scheduler fills the queue for the next group. Before it can issue a group's first
step it must have put the group's keys into the buffers; there are two sets of buffers, so that it
can do so while the group before is being issued. Softmax between the two products is not here.

Rates are unpublished. At one step a cycle the scheduler is slower than an array that takes
128 / head_dim steps a cycle, and at one key a cycle slower than the detector: the defaults below
limit none of the published benchmarks (the narrowest is the softmax unit at head_dim 8, with four
steps a cycle and up to 16 different keys in them).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from sparseloom.hardware.config import MachineError, Section
from sparseloom.hardware.engine.compiled import compiled


class IssueQueue(Section):
    """Rates of scheduler and array, and the room between them."""

    entries: int = Field(default=16, ge=1)
    """Steps that wait for the array."""
    pushes_per_cycle: int = Field(default=16, ge=1)
    """Keys that are put into the buffers per cycle."""
    steps_per_cycle: int = Field(default=4, ge=1)
    """Scans of the buffers, one step each, per cycle."""
    drained_per_cycle: int = Field(default=2, ge=1)
    """Steps that the array takes together: the numerator of `rmmu.step_rate`."""
    cycles_per_step: int = Field(default=1, ge=1)
    """Cycles for which it is then busy with them: the denominator."""


class IssueTiming(NamedTuple):
    """When the array works on each group, in cycles from 0.

    start: the first step of Q·Kᵀ is consumed.
    end: one past the last cycle of P·V; a group without steps ends where it starts.
    stalls: cycles between `end` of the group before (0 for the first) and `end` in which the
        array waited for the scheduler.
    """

    start: Int64[np.ndarray, "groups"]
    end: Int64[np.ndarray, "groups"]
    stalls: Int64[np.ndarray, "groups"]


def issue_timing(
    steps: Int64[np.ndarray, "groups"],
    pushes: Int64[np.ndarray, "_"],
    queue: IssueQueue,
) -> IssueTiming:
    """Run groups one after another through the queue.

    Args:
        steps: of each group.
        pushes: keys that each group puts into the buffers.
        queue: rates and room.

    Raises:
        MachineError: arrays that differ in length, or negative counts.
    """
    if steps.shape != pushes.shape:
        raise MachineError(
            f"pushes must have one entry per group, got {pushes.size} for {steps.size}"
        )
    if steps.size and min(int(steps.min()), int(pushes.min())) < 0:
        raise MachineError("steps and pushes must be at least 0")
    found = np.zeros((3, steps.size), np.int64)
    _flow(
        steps,
        pushes,
        queue.pushes_per_cycle,
        queue.drained_per_cycle,
        queue.cycles_per_step,
        np.full(queue.entries, -1, np.int64),
        np.full(queue.steps_per_cycle, -1, np.int64),
        np.full(queue.drained_per_cycle, -queue.cycles_per_step, np.int64),
        found,
    )
    return IssueTiming(*found)


@compiled
def _flow(
    steps: np.ndarray,
    pushes: np.ndarray,
    pushes_per_cycle: int,
    drained: int,
    each: int,
    taken: np.ndarray,
    scanned: np.ndarray,
    drains: np.ndarray,
    found: np.ndarray,
) -> None:
    """Step by step: when it is scanned, and when the array takes it.

    `taken` holds when the last `entries` steps left the queue, `scanned` and `drains` the cycles
    of the last scans and of the last steps taken, as many as fit in one cycle; all as rings.
    """
    sorted_at, issued, issued_before = 0, 0, 0
    end = 0
    step = 0
    for group in range(steps.shape[0]):
        # Two sets of buffers: this group's are free once the group before the last is issued.
        sorted_at = max(sorted_at, issued_before)
        sorted_at += (pushes[group] + pushes_per_cycle - 1) // pushes_per_cycle
        begin = end
        now = begin
        last_scan = issued
        for i in range(steps[group]):
            at = step % scanned.shape[0]
            room = step % taken.shape[0]
            cycle = max(sorted_at, scanned[at] + 1, taken[room] + 1)
            if step > 0:
                cycle = max(cycle, scanned[(step - 1) % scanned.shape[0]])
            scanned[at] = cycle
            # A step may be taken in the cycle after its scan.
            when = max(cycle + 1, drains[step % drained] + each, begin)
            drains[step % drained] = when
            taken[room] = when
            if i == 0:
                found[0, group] = when
            now = when + each
            step += 1
            last_scan = cycle + 1
        busy = ((steps[group] + drained - 1) // drained) * each
        if steps[group] == 0:
            found[0, group] = begin
        end = now + busy
        found[1, group] = end
        found[2, group] = end - begin - 2 * busy
        issued_before = issued
        issued = last_scan
