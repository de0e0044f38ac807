"""What the cycle-level units of DOTA are called, what they wait for, and the numbers they read."""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.units.rmmu import step_rate

LANE_UNITS = ("array", "detecting rows", "detector", "scheduler", "mfu", "dram port")
"""Of each Lane. `array` is the RMMU; rows that only detect (`policy: split`) are a unit of their
own; `detector` compares scores and sorts keys into the scheduler's buffers."""
ARRAY, DETECTING, DETECTOR, SCHEDULER, MFU, PORT = range(len(LANE_UNITS))
PER_LANE = len(LANE_UNITS)

CAUSES = (
    "idle",
    "busy",
    "dram",
    "detector",
    "scheduler",
    "mfu",
    "sram",
    "fill",
    "accumulator",
    "full queue",
    "lane imbalance",
)
"""What a unit does or waits for. `fill`: operands pass through the array; `full queue`: the
scheduler is ahead of the array; `lane imbalance`: another Lane is still at work."""
(
    IDLE,
    BUSY,
    ON_DRAM,
    ON_DETECTOR,
    ON_SCHEDULER,
    ON_MFU,
    ON_SRAM,
    ON_FILL,
    ON_ACCUMULATOR,
    ON_QUEUE,
    ON_LANES,
) = range(len(CAUSES))


def units(lanes: int) -> tuple[str, ...]:
    """Names of all units: those of each Lane, and the Accumulator last."""
    found = [f"lane {lane} {name}" for lane in range(lanes) for name in LANE_UNITS]
    return (*found, "accumulator")


class Sizes(NamedTuple):
    """The machine's numbers as the compiled Lane reads them.

    cycle, width, value_width: length of a cycle, of a step of scores and of one of values, in
    parts of a cycle. key_beats, value_beats: banks that a vector lies in.
    bytes_per_cycle: of the Lane's share of the DRAM. capacity: bytes of vectors that are streamed.
    """

    cycle: int
    width: int
    value_width: int
    key_beats: int
    value_beats: int
    banks: int
    conflicts: int
    queue: int
    operands: int
    steps_per_cycle: int
    pushes_per_cycle: int
    split: int
    ahead: int
    in_flight: int
    detector_latency: int
    mfu_latency: int
    dram_latency: int
    bytes_per_cycle: float
    capacity: int


def lane_sizes(
    config: DotaConfig,
    *,
    head_dim: int,
    value_dim: int,
    parallel: int,
    detecting_rows: int,
    bytes_per_cycle: float,
) -> Sizes:
    """The sizes for one attention call.

    Args:
        config: the machine.
        head_dim, value_dim: of the call.
        parallel: queries that run side by side.
        detecting_rows: rows of the array that only detect (0: all rows take turns).
        bytes_per_cycle: of the DRAM, for this Lane.
    """
    rmmu, sram = config.rmmu, config.sram
    width = rmmu.base_bits // 8
    scores, values = (
        step_rate(rmmu, size, parallel_queries=parallel, rows=rmmu.rows - detecting_rows)
        for size in (head_dim, value_dim)
    )
    cycle = lcm(scores.numerator, values.numerator)
    return Sizes(
        cycle=cycle,
        width=scores.denominator * cycle // scores.numerator,
        value_width=values.denominator * cycle // values.numerator,
        key_beats=-(-head_dim * width // sram.port_bytes),
        value_beats=-(-value_dim * width // sram.port_bytes),
        banks=sram.banks,
        conflicts=int(sram.conflicts == "modelled"),
        queue=config.scheduler.queue_entries,
        operands=max(1, sram.operand_bytes // (parallel * max(head_dim, value_dim) * width)),
        steps_per_cycle=config.scheduler.steps_per_cycle,
        pushes_per_cycle=config.scheduler.pushes_per_cycle,
        split=int(detecting_rows > 0),
        ahead=config.detector.groups_ahead,
        in_flight=config.mfu.groups_in_flight,
        detector_latency=config.detector.latency_cycles,
        mfu_latency=config.mfu.latency_cycles,
        dram_latency=config.dram.latency_cycles,
        bytes_per_cycle=bytes_per_cycle,
        capacity=sram.kib_per_lane * 1024,
    )


class LaneState(NamedTuple):
    """What a Lane keeps while a call runs.

    banks: cycle from which each bank is free; a last entry is the pool of all, in beats.
    taken, held: when the last steps left the queue, and the operands beside the array (rings).
    times (groups, `T_…`): when each group passed the units.
    registers (`R_…`): next group to detect, whether its head is projected, when those codes are
    there, when the multi-function unit is free, bytes of streamed vectors in SRAM, the group from
    which on heads have not been asked for, cycle of the last steps issued and how many they were,
    and places in the two rings of `taken`.
    port: cycle (fractions included) from which the Lane's DRAM port is free.
    """

    banks: np.ndarray
    taken: np.ndarray
    held: np.ndarray
    times: np.ndarray
    registers: np.ndarray
    port: np.ndarray


T_HEAD, T_SORTED, T_QUEUED, T_ISSUED, T_SCORED, T_READY, T_DONE, T_KEYS, T_VALUES = range(9)
"""Bytes of a head there, keys in the buffers, queue filled, all steps issued, scores done,
probabilities there, values done, key vectors there, value vectors there."""

R_DETECTED, R_PROJECTED, R_CODES, R_MFU, R_HELD, R_ASKED, R_SCAN, R_SCANS, R_ROOM, R_PLACE = range(
    10
)


def lane_state(z: Sizes, groups: int, start: int, port: float) -> LaneState:
    """An idle Lane at cycle `start`."""
    return LaneState(
        banks=np.full(z.banks + 1, start, np.int64),
        taken=np.full(z.queue, start - 1, np.int64),
        held=np.full(z.operands, start - 1, np.int64),
        times=np.zeros((groups, 9), np.int64),
        registers=np.zeros(10, np.int64),
        port=np.array([port]),
    )
