"""Dense products of all Lanes together: which operand stays, and how the other streams past it.

A product is `rows` tokens × `inner` × `columns`. The array keeps outputs: a tile of its rows and
columns takes as many cycles as the inner dimension has elements. Of the operands one is held in
SRAM, whole or in chunks, and the other streams past it block by block, double-buffered; where
neither fits, the order is taken that moves fewer bytes.

Queries, keys and values: each Lane makes those of its own heads from the whole input. All other
products are cut along their inner dimension, and the Accumulator adds what the Lanes have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.dota.closed_form import FOLDED
from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.dota.state import (
    ARRAY,
    BUSY,
    IDLE,
    MFU,
    ON_ACCUMULATOR,
    ON_DRAM,
    ON_FILL,
    ON_LANES,
    ON_MFU,
    PER_LANE,
    PORT,
)
from sparseloom.hardware.dota.tell import tell
from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.engine.log import Log
from sparseloom.trace import Operator

BLOCK = ("weights", "inputs", "tiles", "cycles", "additions", "outputs")
"""Columns of the table of blocks (int64): bytes of weights and of inputs that it needs, row tiles,
cycles of the array and of the Accumulator, bytes of outputs."""
B_WEIGHTS, B_INPUTS, B_TILES, B_CYCLES, B_ADDITIONS, B_OUTPUTS = range(len(BLOCK))


@dataclass(frozen=True, eq=False)
class Plan:
    """A product as blocks.

    Args:
        blocks: table of `BLOCK`, in order.
        share: of the blocks, what each Lane has work for.
        dram_bytes: everything that moves.
        row_tiles: tiles of rows of the whole product.
    """

    blocks: np.ndarray
    share: np.ndarray
    dram_bytes: int
    row_tiles: int


def folded_rows(config: DotaConfig, rows: int) -> int:
    """How many groups of rows take columns of their own where there are few tokens.

    Each group needs operands of its own, which the SRAM must deliver.
    """
    rmmu = config.rmmu
    operands = rmmu.columns * rmmu.base_bits // 8
    return max(1, min(rmmu.rows // rows, config.sram.bytes_per_cycle // operands))


def plan(
    config: DotaConfig,
    operator: Operator,
    *,
    heads: int,
    held_bytes: int,
    input_is_here: bool,
) -> Plan:
    """Blocks of a product.

    Args:
        config: the machine.
        operator: a `gemm`.
        heads: of the attention that its outputs go to or its inputs come from.
        held_bytes: of a Lane's SRAM that is taken (keys and values).
        input_is_here: the inputs were read for the product before, or were made in the Lane.

    Raises:
        MachineError: two blocks of operands do not fit in a Lane's SRAM.
    """
    rmmu, lanes = config.rmmu, config.lanes
    width = rmmu.base_bits // 8
    folded = operator.role in FOLDED
    turns = -(-heads // lanes)
    share = np.ones(lanes)
    by_heads = operator.role in ("qkv", "attention_output")
    if by_heads:
        share = np.array([len(range(lane, heads, lanes)) / turns for lane in range(lanes)])
    rows, inner, columns = operator.rows, operator.inner, operator.columns
    unit = turns / heads if by_heads else 1 / lanes
    if folded:
        inner = int(np.ceil(inner * unit))
    else:
        columns = int(np.ceil(columns * unit))
    room = config.sram.kib_per_lane * 1024 - held_bytes
    fold = folded_rows(config, rows)
    across = rmmu.columns * fold
    column_blocks = -(-columns // across)
    row_tiles = -(-rows // rmmu.rows)
    weights = operator.inner * operator.columns * width
    inputs = operator.rows * operator.inner * width
    # A block of weights, and a tile of inputs, of one Lane.
    weight_block = inner * across * width
    input_tile = min(rows, rmmu.rows) * inner * width
    parts = 1
    if row_tiles == 1:
        # Outputs of one tile stay in the array: its weights may come in pieces of the inner size.
        parts = min(inner, -(-weight_block * 2 * config.dram.buffers // room))
    by_rows = (room - config.dram.buffers * weight_block // parts) // input_tile
    by_columns = (room - config.dram.buffers * input_tile) // weight_block
    row_chunks = -(-row_tiles // by_rows) if by_rows > 0 else 0
    column_chunks = -(-column_blocks // by_columns) if by_columns > 0 else 0
    if not row_chunks and not column_chunks:
        raise MachineError(
            f"sram.kib_per_lane must hold {config.dram.buffers} blocks of {weight_block} bytes "
            f"beside {held_bytes} bytes of keys and values, got {config.sram.kib_per_lane}"
        )
    here = input_is_here and row_chunks == 1
    first = (0 if here else inputs) + weights * row_chunks
    second = weights + inputs * column_chunks
    if row_chunks and (not column_chunks or first <= second):
        table = _row_chunks(row_tiles, row_chunks, column_blocks, parts, inner)
        table[:, B_INPUTS] *= 0 if here else 1
        moved = (weights * row_chunks, 0 if here else inputs)
    else:
        table = _column_chunks(row_tiles, column_chunks, column_blocks, inner)
        moved = (weights, inputs * column_chunks)
    outputs = 0 if operator.role == "qkv" else operator.rows * operator.columns * width
    added = operator.rows * operator.columns * lanes if folded else 0
    additions = -(-added // config.accumulator.additions_per_cycle)
    blocks = np.zeros((len(table), len(BLOCK)), np.int64)
    blocks[:, B_TILES : B_CYCLES + 1] = table[:, B_TILES : B_CYCLES + 1]
    spread = ((B_WEIGHTS, moved[0]), (B_INPUTS, moved[1]), (B_ADDITIONS, additions))
    for column, total in (*spread, (B_OUTPUTS, outputs)):
        by = column if column in (B_WEIGHTS, B_INPUTS) else B_CYCLES
        blocks[:, column] = shared_out(total, table[:, by])
    return Plan(blocks, share, int(sum(moved) + outputs), row_tiles)


def _row_chunks(
    row_tiles: int, chunks: int, column_blocks: int, parts: int, inner: int
) -> np.ndarray:
    """Inputs stay chunk by chunk, blocks of columns stream past; weights of the table's bytes."""
    tiles = shared_out(row_tiles, np.ones(chunks, np.int64))
    table = np.zeros((chunks, column_blocks, parts, len(BLOCK)), np.int64)
    depth = shared_out(inner, np.ones(parts, np.int64))
    table[..., B_WEIGHTS] = depth
    table[:, 0, 0, B_INPUTS] = tiles
    table[..., B_TILES] = tiles[:, None, None]
    table[..., B_CYCLES] = tiles[:, None, None] * depth
    return table.reshape(-1, len(BLOCK))


def _column_chunks(row_tiles: int, chunks: int, column_blocks: int, inner: int) -> np.ndarray:
    """Weights stay chunk by chunk, tiles of rows stream past."""
    blocks = shared_out(column_blocks, np.ones(chunks, np.int64))
    table = np.zeros((chunks, row_tiles, len(BLOCK)), np.int64)
    table[:, 0, B_WEIGHTS] = blocks
    table[..., B_INPUTS] = 1
    table[..., B_TILES] = 1
    table[..., B_CYCLES] = blocks[:, None] * inner
    return table.reshape(-1, len(BLOCK))


def shared_out(total: int, by: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `by` whose sum is `total`."""
    weight = np.cumsum(by, dtype=np.float64)
    if not by.size or weight[-1] == 0:
        return np.zeros(by.size, np.int64)
    ends = np.floor(total * weight / weight[-1] + 0.5).astype(np.int64)
    return np.diff(ends, prepend=0)


class Feed(NamedTuple):
    """What the Lanes share while operands stream.

    slots: cycle from which each operand buffer is free, the oldest first.
    port: cycle (fractions included) from which the DRAM is free.
    """

    slots: np.ndarray
    port: np.ndarray


@compiled
def _all(log: Log, share: np.ndarray, n: int, b: int, code: int, now: int, until: int) -> None:
    """From `now` until `until` the arrays do `code`; Lanes without a share of block b wait."""
    if until <= now:
        return
    for lane in range(share.shape[0]):
        works = b < share[lane] * n
        tell(log, lane * PER_LANE + ARRAY, code if works else ON_LANES, b if works else -1, now)


@compiled
def _transfer(f: Feed, log: Log, lanes: int, at: int, size: int, rate: float, latency: int) -> int:
    """Move bytes through all ports at once; the cycle from which they are there."""
    if size == 0:
        return at
    begin = max(f.port[0], float(at + latency))
    f.port[0] = begin + size / rate
    end = int(np.ceil(f.port[0]))
    for lane in range(lanes):
        tell(log, lane * PER_LANE + PORT, BUSY, -1, int(begin))
        tell(log, lane * PER_LANE + PORT, IDLE, -1, end)
    return end


@compiled
def run_product(
    f: Feed,
    log: Log,
    start: int,
    mfu: int,
    blocks: np.ndarray,
    share: np.ndarray,
    fill: int,
    rate: float,
    latency: int,
) -> int:
    """The cycle in which the last block is done.

    Args:
        f: buffers and port, carried from product to product.
        log: of all units.
        start: first cycle.
        mfu: when the multi-function units have normed or activated the last inputs.
        blocks, share: from `plan`.
        fill: cycles for the first operands to pass through the array.
        rate, latency: of the DRAM, bytes per cycle and cycles.
    """
    lanes = share.shape[0]
    accumulator = lanes * PER_LANE
    now = start
    n = blocks.shape[0]
    owed, owed_at = 0, 0
    for b in range(n):
        there = _transfer(f, log, lanes, f.slots[0], blocks[b, B_WEIGHTS], rate, latency)
        asked = max(f.slots[0], start)
        begins = max(f.port[0], float(asked + latency))
        all_in = _transfer(f, log, lanes, asked, blocks[b, B_INPUTS], rate, latency)
        if blocks[b, B_INPUTS] > 0:
            # Work starts with the first tile of rows and cannot overtake the last.
            tile = int(np.ceil(begins + blocks[b, B_INPUTS] / rate / blocks[b, B_TILES]))
            there = max(there, tile)
        if owed > 0:
            _transfer(f, log, lanes, owed_at, owed, rate, 0)
        _all(log, share, n, b, ON_DRAM, now, there)
        now = max(now, there)
        if b == 0:
            _all(log, share, n, b, ON_FILL, now, now + fill)
            now += fill
        end = now + blocks[b, B_CYCLES]
        _all(log, share, n, b, BUSY, now, end)
        late = now + blocks[b, B_ADDITIONS]
        _all(log, share, n, b, ON_ACCUMULATOR, end, late)
        end = max(end, late)
        if blocks[b, B_INPUTS] > 0:
            late = all_in + blocks[b, B_CYCLES] // blocks[b, B_TILES]
            _all(log, share, n, b, ON_DRAM, end, late)
            end = max(end, late)
        if b == n - 1:
            _all(log, share, n, b, ON_MFU, end, mfu)
            end = max(end, mfu)
        if blocks[b, B_ADDITIONS] > 0:
            tell(log, accumulator, BUSY, b, end - blocks[b, B_ADDITIONS])
            tell(log, accumulator, IDLE, -1, end)
        owed, owed_at = blocks[b, B_OUTPUTS], end
        for i in range(1, f.slots.shape[0]):
            f.slots[i - 1] = f.slots[i]
        f.slots[f.slots.shape[0] - 1] = end
        now = end
    if owed > 0:
        _transfer(f, log, lanes, owed_at, owed, rate, 0)
    for lane in range(lanes):
        tell(log, lane * PER_LANE + ARRAY, IDLE, -1, now)
    return now


@compiled
def run_elements(log: Log, lanes: int, start: int, free: int, cycles: int, first: int) -> int:
    """Norms or activations on all multi-function units: when they are done.

    The arrays wait for the first of them, `first` cycles; the rest overlaps with the next product.
    """
    begin = max(start, free)
    for lane in range(lanes):
        tell(log, lane * PER_LANE + MFU, BUSY, -1, begin)
        tell(log, lane * PER_LANE + MFU, IDLE, -1, begin + cycles)
        if first > 0:
            tell(log, lane * PER_LANE + ARRAY, ON_MFU, -1, start)
            tell(log, lane * PER_LANE + ARRAY, IDLE, -1, begin + first)
    return begin + cycles
