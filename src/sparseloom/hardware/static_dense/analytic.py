"""Cycles of a head in closed form (our model, after Dai et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.lowering import HeadSize, Passes, deal
from sparseloom.hardware.static_dense.runs import HeadRuns
from sparseloom.regions import TILE_KEYS, TILE_QUERIES


@dataclass(frozen=True)
class Rates:
    """What a tile of work takes, for heads of one size.

    Args:
        key_blocks, value_blocks: blocks of weights in QKᵀ and PV: 32 dimensions each.
        load: cycles of a block's weights from the buffer into the registers.
        utilisation: of the array.
        score_row, normal_row: cycles of the softmax unit for 32 scores of one query, and of the
            normaliser for 32 probabilities.
        latency: cycles from a row's last score to its first normalised probability.
        bubble: cycles per run that are not hidden, in each of QKᵀ and PV.
    """

    key_blocks: int
    value_blocks: int
    load: int
    utilisation: float
    score_row: int
    normal_row: int
    latency: int
    bubble: int

    @property
    def block(self) -> int:
        """Cycles of a block: a query each, or what its weights take to come."""
        return max(TILE_QUERIES, self.load)

    @property
    def key_cycles(self) -> float:
        """Cycles of a tile in QKᵀ: the array's or, for narrow heads, the softmax unit's."""
        array = self.key_blocks * self.block / self.utilisation
        return max(array, TILE_QUERIES * self.score_row)

    @property
    def value_cycles(self) -> float:
        """Cycles of a tile in PV: the array's or, for narrow heads, the normaliser's."""
        array = self.value_blocks * self.block / self.utilisation
        return max(array, TILE_QUERIES * self.normal_row)

    @property
    def drain(self) -> int:
        """Cycles of a pass that no tile of work accounts for: 24 at 64 dimensions.

        The softmax unit ends its last tile behind the array, its pipelines take `latency` and three
        cycles of hand-over, and the first tile of PV starts as it is normalised. For narrow heads,
        where a tile of PV is a tile of normalising, that first one is hidden: a negative term.
        """
        scores, normal = TILE_QUERIES * self.score_row, TILE_QUERIES * self.normal_row
        key, value = self.key_blocks * self.block, self.value_blocks * self.block
        behind = max(0, scores - self.block) if key >= scores else 0
        return behind + self.latency + 3 + value - self.block - max(value, normal)


def rates(config: StaticDenseConfig, size: HeadSize, *, sequenced: bool) -> Rates:
    """Rates of the vector PE; only regions suffer `sparse_utilisation` and bubbles."""
    v, softmax = config.vector, config.softmax
    return Rates(
        key_blocks=-(-size.head_dim // v.vector_width),
        value_blocks=-(-size.value_dim // v.lanes) * -(-TILE_KEYS // v.vector_width),
        load=-(-v.lanes * v.vector_width // v.weight_bytes_per_cycle),
        utilisation=config.sparse_utilisation if sequenced else 1.0,
        score_row=-(-TILE_KEYS // softmax.scores_per_cycle),
        normal_row=-(-TILE_KEYS // softmax.normalised_per_cycle),
        latency=softmax.latency_cycles,
        bubble=config.sequencer.bubble_cycles if sequenced else 0,
    )


def pass_cycles(speed: Rates, work: Passes) -> np.ndarray:
    """Cycles of each pass: tiles · 2 · 16 · (d/32) / u + 24 + 2 · 2 · runs at 64 dimensions."""
    tiles = work.tiles * (speed.key_cycles + speed.value_cycles)
    return tiles + speed.drain + 2 * speed.bubble * work.runs


def port_bytes(work: Passes, size: HeadSize) -> int:
    """Bytes that a head moves through the port of the global buffer."""
    operands = work.unit_pass.size * TILE_KEYS * (size.head_dim + size.value_dim)
    return operands + int(work.incoming(size).sum() + work.outgoing(size).sum())


def head_cycles(config: StaticDenseConfig, runs: HeadRuns, work: Passes, size: HeadSize) -> float:
    """Cycles of a head on all PEs: of each chunk the busiest PE, or what its operands take.

    Operands come behind the arithmetic of the head before. PEs share them, and wait for each other
    at the end of a chunk.
    """
    speed = rates(config, size, sequenced=runs.descriptors > 0)
    each = pass_cycles(speed, work)
    found = 0.0
    for chunk in np.unique(work.chunk):
        mine = each[work.chunk == chunk]
        pe = deal(np.ceil(mine).astype(np.int64), config.pes)
        found += float(np.bincount(pe, mine, config.pes).max())
    return max(found, port_bytes(work, size) / config.buffers.global_bytes_per_cycle)
