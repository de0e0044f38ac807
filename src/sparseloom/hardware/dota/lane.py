"""A Lane during attention, from event to event: exact to the cycle, empty cycles are skipped.

The groups of parallel queries of all its heads pass in order: detection on the array, comparison
and sorting in the detector, Q·Kᵀ in the order that the scheduler issues, softmax on the
multi-function unit, P·V in the same order again. The array does one of the three products at a
time, whichever is ready, in the order detection, values, scores: what comes first keeps the units
behind it busy. With rows that only detect, detection runs beside the products. Inside a product
time counts in parts of a cycle: several narrow steps fit in one.
"""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.dota.state import (
    ARRAY,
    BUSY,
    DETECTING,
    DETECTOR,
    IDLE,
    MFU,
    ON_DETECTOR,
    ON_DRAM,
    ON_MFU,
    ON_QUEUE,
    ON_SCHEDULER,
    ON_SRAM,
    PER_LANE,
    PORT,
    R_ASKED,
    R_CODES,
    R_DETECTED,
    R_HELD,
    R_MFU,
    R_PLACE,
    R_PROJECTED,
    R_ROOM,
    R_SCAN,
    R_SCANS,
    SCHEDULER,
    T_DONE,
    T_HEAD,
    T_ISSUED,
    T_KEYS,
    T_QUEUED,
    T_READY,
    T_SCORED,
    T_SORTED,
    T_VALUES,
    LaneState,
    Sizes,
)
from sparseloom.hardware.dota.tell import tell
from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.engine.log import Log

GROUP = (
    "key_from", "key_to", "value_from", "value_to", "key_steps", "value_steps", "in_order",
    "pushes", "project", "requantise", "detect", "compare", "softmax", "last_row",
    "head_bytes", "key_bytes", "value_bytes",
)  # fmt: skip
"""Columns of the table of groups (int64).

key_from … value_to: slices of the lists of loads; in_order: 1 where the keys are simply all of
them, `key_steps` in number and one load each, and no list is needed.
pushes: different keys to sort. project, requantise: cycles of the array and the multi-function
unit for the predictor's queries and keys, at the first group of a head; detect, compare: cycles of
the array for the group's scores, and of the detector.
softmax, last_row: cycles to take all scores, and those of the last row.
head_bytes: from DRAM before a head's detection; key_bytes, value_bytes: vectors of this group.
"""
(
    G_KEY_FROM, G_KEY_TO, G_VALUE_FROM, G_VALUE_TO, G_KEY_STEPS, G_VALUE_STEPS, G_IN_ORDER,
    G_PUSHES, G_PROJECT, G_REQUANTISE, G_DETECT, G_COMPARE, G_SOFTMAX, G_LAST_ROW,
    G_HEAD_BYTES, G_KEY_BYTES, G_VALUE_BYTES,
) = range(len(GROUP))  # fmt: skip

_LEAD = 2  # cycles before a product starts in which its first operands may be read
_NEVER = 1 << 60


@compiled
def _fetch(z: Sizes, s: LaneState, log: Log, lane: int, at: int, size: int) -> int:
    """Ask for `size` bytes at cycle `at`; the cycle from which all are there."""
    if size == 0:
        return at
    unit = lane * PER_LANE + PORT
    begin = max(s.port[0], float(at + z.dram_latency))
    tell(log, unit, BUSY, -1, int(begin))
    s.port[0] = begin + size / z.bytes_per_cycle
    end = int(np.ceil(s.port[0]))
    tell(log, unit, IDLE, -1, end)
    return end


@compiled
def _ask(z: Sizes, s: LaneState, log: Log, lane: int, groups: np.ndarray, now: int) -> None:
    """Ask for what the next head needs from DRAM before it can be detected."""
    g = s.registers[R_ASKED]
    while g < groups.shape[0] and groups[g, G_HEAD_BYTES] == 0:
        g += 1
    if g < groups.shape[0]:
        s.times[g, T_HEAD] = _fetch(z, s, log, lane, now, groups[g, G_HEAD_BYTES])
    s.registers[R_ASKED] = g + 1


@compiled
def _detect(
    z: Sizes,
    s: LaneState,
    log: Log,
    lane: int,
    unit: int,
    groups: np.ndarray,
    now: int,
    first_tag: int,
) -> int:
    """The next job of detection, on `unit` from cycle `now` on; when it ends.

    At the first group of a head the predictor's queries and keys are made, and quantised behind
    the array; then every group has its scores compared and its keys sorted.
    """
    r = s.registers
    g = r[R_DETECTED]
    if r[R_PROJECTED] == 0 and groups[g, G_PROJECT] > 0:
        tell(log, unit, BUSY, first_tag + g, now)
        begin = max(now, r[R_MFU])
        tell(log, lane * PER_LANE + MFU, BUSY, first_tag + g, begin)
        r[R_MFU] = begin + groups[g, G_REQUANTISE]
        tell(log, lane * PER_LANE + MFU, IDLE, -1, r[R_MFU])
        now += groups[g, G_PROJECT]
        r[R_CODES] = max(now, r[R_MFU])
        r[R_PROJECTED] = 1
        return now
    if groups[g, G_HEAD_BYTES] > 0 and r[R_ASKED] == g + 1:
        # While this head is at work the next one's bytes arrive, if there is room.
        ahead = g + 1
        while ahead < groups.shape[0] and groups[ahead, G_HEAD_BYTES] == 0:
            ahead += 1
        if ahead < groups.shape[0]:
            both = groups[g, G_HEAD_BYTES] + groups[ahead, G_HEAD_BYTES]
            if both <= z.capacity:
                _ask(z, s, log, lane, groups, now)
    sorting = now
    work = groups[g, G_DETECT]
    if work > 0:
        tell(log, unit, BUSY, first_tag + g, now)
        now += work
        if groups[g, G_COMPARE] > work:
            tell(log, unit, ON_DETECTOR, -1, now)
            now += groups[g, G_COMPARE] - work
    if g > 0:
        sorting = max(sorting, s.times[g - 1, T_SORTED])
    if g >= z.ahead:
        # The buffers of an earlier group are free once it is issued.
        sorting = max(sorting, s.times[g - z.ahead, T_ISSUED])
    end = sorting + (groups[g, G_PUSHES] + z.pushes_per_cycle - 1) // z.pushes_per_cycle
    if work > 0:
        end = max(end, now + z.detector_latency)
    if end > sorting:
        tell(log, lane * PER_LANE + DETECTOR, BUSY, first_tag + g, sorting)
        tell(log, lane * PER_LANE + DETECTOR, IDLE, -1, end)
    s.times[g, T_SORTED] = end
    s.times[g, T_ISSUED] = end
    s.times[g, T_KEYS] = _fetch(z, s, log, lane, end, groups[g, G_KEY_BYTES])
    s.times[g, T_VALUES] = _fetch(z, s, log, lane, end, groups[g, G_VALUE_BYTES])
    r[R_HELD] += groups[g, G_KEY_BYTES] + groups[g, G_VALUE_BYTES]
    r[R_DETECTED], r[R_PROJECTED] = g + 1, 0
    return now


@compiled
def _queued(z: Sizes, s: LaneState, groups: np.ndarray, g: int) -> int:
    """When all steps of group g are in the queue, or as many as fit: then its product may start."""
    r = s.registers
    at = s.times[g, T_SORTED]
    if g > 0:
        at = max(at, s.times[g - 1, T_ISSUED] - 1)
    if groups[g, G_IN_ORDER] == 1 or groups[g, G_KEY_STEPS] == 0:
        return s.times[g, T_SORTED]
    scan, scans, room = r[R_SCAN], r[R_SCANS], r[R_ROOM]
    for _ in range(min(groups[g, G_KEY_STEPS], z.queue)):
        at = max(at, s.taken[room] + 1, scan + (1 if scans == z.steps_per_cycle else 0))
        scans = scans + 1 if at == scan else 1
        scan = at
        room = 0 if room + 1 == z.queue else room + 1
    return at + 1


@compiled
def _product(
    z: Sizes,
    s: LaneState,
    log: Log,
    lane: int,
    now: int,
    g: int,
    tag: int,
    issuing: bool,
    groups: np.ndarray,
    first: int,
    step_of: np.ndarray,
    key_of: np.ndarray,
) -> int:
    """Scores (issuing) or values of one group from cycle `now` on; the cycle in which they end.

    A step waits for its turn in the queue, its operands for room beside the array and for their
    banks, the step for the last of its operands. For the values the stored order takes the place
    of the scheduler. `first` is the column of `groups` where the slice of the loads begins.
    """
    r = s.registers
    unit = lane * PER_LANE + ARRAY
    scheduler = lane * PER_LANE + SCHEDULER
    per = z.cycle
    width, beats = z.value_width, z.value_beats
    steps = groups[g, G_VALUE_STEPS]
    if issuing:
        width, beats = z.width, z.key_beats
        steps = groups[g, G_KEY_STEPS]
    at, to = groups[g, first], groups[g, first + 1]
    free = now * per  # in parts of a cycle
    if groups[g, G_IN_ORDER] == 1:
        # Vectors that lie one after another meet no conflict; bandwidth may limit them.
        read = (steps * beats * per + z.banks - 1) // z.banks
        end = (free + steps * width + per - 1) // per
        tell(log, unit, BUSY, tag, now)
        if read > steps * width:
            tell(log, unit, ON_SRAM, tag, end)
            end = (free + read + per - 1) // per
        return end
    # Vectors that fill whole sets of banks meet as sets.
    sets = z.banks // beats if z.banks % beats == 0 else 0
    issued = s.times[g, T_SORTED]
    if g > 0:
        issued = max(issued, s.times[g - 1, T_ISSUED] - 1)
    room, place = r[R_ROOM], r[R_PLACE]
    if at == to:
        return now
    tell(log, unit, BUSY, tag, now)
    while at < to:
        step = step_of[at]
        ask = max(s.held[place] + 1, now - _LEAD)
        if issuing:
            put = s.taken[room] + 1
            turn = max(issued, r[R_SCAN] + (1 if r[R_SCANS] == z.steps_per_cycle else 0))
            if put > turn:
                tell(log, scheduler, ON_QUEUE, tag, turn)
            issued = max(put, turn)
            tell(log, scheduler, BUSY, tag, issued)
            r[R_SCANS] = r[R_SCANS] + 1 if issued == r[R_SCAN] else 1
            r[R_SCAN] = issued
            ask = max(ask, issued)
        there = ask + 1
        while at < to and step_of[at] == step:
            if z.conflicts == 0:
                served = max(s.banks[z.banks], ask * z.banks) + beats
                s.banks[z.banks] = served
                there = max(there, (served + z.banks - 1) // z.banks)
            elif sets > 0:
                bank = key_of[at] % sets
                served = max(s.banks[bank], ask)
                s.banks[bank] = served + 1
                there = max(there, served + 1)
            else:
                beginning = key_of[at] * beats
                for beat in range(beats):
                    bank = (beginning + beat) % z.banks
                    served = max(s.banks[bank], ask)
                    s.banks[bank] = served + 1
                    there = max(there, served + 1)
            at += 1
        if there * per > free:
            gap = (free + per - 1) // per
            if there > gap:
                tell(
                    log,
                    unit,
                    ON_SRAM if there > issued + 1 or not issuing else ON_SCHEDULER,
                    tag,
                    gap,
                )
                tell(log, unit, BUSY, tag, there)
            free = there * per
        s.held[place] = free // per
        place = 0 if place + 1 == z.operands else place + 1
        if issuing:
            s.taken[room] = free // per
            room = 0 if room + 1 == z.queue else room + 1
        free += width
    r[R_ROOM], r[R_PLACE] = room, place
    if issuing:
        s.times[g, T_ISSUED] = issued + 1
        tell(log, scheduler, IDLE, -1, issued + 1)
    return (free + per - 1) // per


@compiled
def run_lane(
    z: Sizes,
    s: LaneState,
    log: Log,
    lane: int,
    start: int,
    groups: np.ndarray,
    key_steps: np.ndarray,
    keys: np.ndarray,
    value_steps: np.ndarray,
    values: np.ndarray,
    first_tag: int,
) -> int:
    """The cycle in which the last group is done.

    Args:
        z, s, log: sizes, state, log of the accelerator's units.
        lane: number of the Lane.
        start: first cycle.
        groups: table of `GROUP`.
        key_steps, keys: step and key of every load for Q·Kᵀ; value_steps, values for P·V.
        first_tag: tag of the first group in the log.
    """
    array = lane * PER_LANE + ARRAY
    n = groups.shape[0]
    r = s.registers
    now, detecting, refused = start, start, start
    scored, done = 0, 0
    r[R_CODES], r[R_MFU] = start, start
    while done < n:
        g = r[R_DETECTED]
        room = g < n and g - scored < z.ahead
        if room:
            size = groups[g, G_KEY_BYTES] + groups[g, G_VALUE_BYTES]
            room = r[R_HELD] == 0 or r[R_HELD] + size <= z.capacity
            refused = refused if room else now + 1
        at_detect, at_values, at_scores = _NEVER, _NEVER, _NEVER
        if room:
            begin = now
            if z.split == 1:
                begin = max(detecting, refused)
                if g >= z.ahead:
                    begin = max(begin, s.times[g - z.ahead, T_SCORED])
            if r[R_ASKED] <= g:
                _ask(z, s, log, lane, groups, begin)
            at_detect = max(begin, s.times[g, T_HEAD])
            if r[R_PROJECTED] == 1:
                at_detect = max(at_detect, r[R_CODES])
            if z.split == 1:
                unit = lane * PER_LANE + DETECTING
                if at_detect > begin:
                    tell(log, unit, ON_DRAM if r[R_PROJECTED] == 0 else ON_MFU, -1, begin)
                detecting = _detect(z, s, log, lane, unit, groups, at_detect, first_tag)
                tell(log, unit, IDLE, -1, detecting)
                continue
        if done < scored:
            at_values = max(s.times[done, T_READY], s.times[done, T_VALUES])
        if scored < g and scored - done < z.in_flight:
            if s.times[scored, T_QUEUED] == 0:
                s.times[scored, T_QUEUED] = _queued(z, s, groups, scored)
            at_scores = max(s.times[scored, T_QUEUED], s.times[scored, T_KEYS])
        earliest = min(at_detect, at_values, at_scores)
        if earliest > now:
            cause = ON_SCHEDULER
            if earliest == at_values:
                cause = ON_DRAM if s.times[done, T_VALUES] == earliest else ON_MFU
            elif earliest == at_detect:
                cause = ON_DRAM if s.times[g, T_HEAD] == earliest else ON_MFU
            elif s.times[scored, T_KEYS] == earliest:
                cause = ON_DRAM
            elif s.times[scored, T_SORTED] > now:
                cause = ON_DETECTOR
            tell(log, array, cause, -1, now)
            now = earliest
        if at_detect <= now:
            now = _detect(z, s, log, lane, array, groups, now, first_tag)
        else:
            issuing = at_values > now
            first, steps_of, vectors = G_KEY_FROM, key_steps, keys
            if not issuing:
                first, steps_of, vectors = G_VALUE_FROM, value_steps, values
            g = scored if issuing else done
            now = _product(
                z, s, log, lane, now, g, first_tag + g, issuing, groups, first, steps_of, vectors
            )
            if not issuing:
                s.times[g, T_DONE] = now
                r[R_HELD] -= groups[g, G_KEY_BYTES] + groups[g, G_VALUE_BYTES]
                done += 1
                continue
            s.times[g, T_SCORED] = now
            begin = max(now, r[R_MFU])
            unit = lane * PER_LANE + MFU
            tell(log, unit, BUSY, first_tag + g, begin)
            r[R_MFU] = begin + groups[g, G_SOFTMAX]
            tell(log, unit, IDLE, -1, r[R_MFU])
            # Three passes over a row, pipelined: the next two follow the last row's first.
            s.times[g, T_READY] = r[R_MFU]
            if groups[g, G_SOFTMAX] > 0:
                s.times[g, T_READY] += 2 * groups[g, G_LAST_ROW] + z.mfu_latency
            scored += 1
    tell(log, array, IDLE, -1, now)
    return max(now, r[R_MFU], detecting)
