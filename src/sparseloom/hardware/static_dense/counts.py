"""Events of the energy table that a head or a matrix product causes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.lowering import HeadSize, Passes
from sparseloom.hardware.static_dense.runs import HeadRuns
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, Mode
from sparseloom.trace import Operator

Counts = dict[str, float]


def add(total: Counts, counts: Mapping[str, float]) -> None:
    """Add counts to a total."""
    for event, count in counts.items():
        total[event] = total.get(event, 0.0) + count


def head_counts(config: StaticDenseConfig, runs: HeadRuns, work: Passes, size: HeadSize) -> Counts:
    """Events of one head; idle time and DRAM are not among them.

    Multiply-accumulates of whole tiles: a tile that is worked on costs all its pairs, whatever the
    mask keeps of them. Keys and values come from the global buffer once for every head, queries and
    outputs once per pass.
    """
    width = size.head_dim + size.value_dim
    pairs = int(work.tiles.sum()) * TILE_QUERIES * TILE_KEYS
    low = [i for i, kind in enumerate(runs.classes) if kind.mode is Mode.LOW_PRECISION]
    owned = np.isin(runs.work, low)
    cheap = int((runs.end - runs.begin)[owned].sum()) * TILE_QUERIES * TILE_KEYS
    moved = operand_bytes(size, work)
    found: Counts = {
        "mac_int8": float((pairs - cheap) * width),
        "softmax_unnormalised": float(pairs),
        "softmax_normalised": float(pairs),
        "softmax_buffer": float(pairs),
    }
    if cheap:
        found["mac_int4"] = float(cheap * width)
    if runs.descriptors:
        found["sequencer_run"] = 2.0 * int(work.runs.sum())
    pooled = {kind.log2s for kind in runs.classes if kind.mode is Mode.COARSE}
    for log2s in pooled if work.count else ():
        elements = size.kv_len * width
        add(found, {"pooling_element": elements})
        moved += elements / (1 << log2s)
    found[config.buffers.byte] = float(moved)
    return found


def operand_bytes(size: HeadSize, work: Passes) -> float:
    """Bytes of a head through the global buffer: K and V whole, queries and outputs per pass."""
    if not work.count:
        return 0.0
    keys = size.kv_len * (size.head_dim + size.value_dim)
    return float(keys + work.incoming(size).sum() + work.outgoing(size).sum())


def product_counts(config: StaticDenseConfig, operator: Operator) -> Counts:
    """Events of a matrix product of one sequence: padded to the array, operands moved once."""
    step = config.vector.vector_width if config.array == "vector" else config.systolic.size
    inner, columns = (-(-n // step) * step for n in (operator.inner, operator.columns))
    rows = -(-operator.rows // TILE_QUERIES) * TILE_QUERIES
    moved = operator.rows * (operator.inner + operator.columns) + operator.inner * operator.columns
    return {"mac_int8": float(rows * inner * columns), config.buffers.byte: float(moved)}
