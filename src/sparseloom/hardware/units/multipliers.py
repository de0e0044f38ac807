"""Multiplier arrays with adder trees that split by head dimension (SpAtten, HPCA 2021, §IV-E/G).

An array of 512 multipliers takes one SRAM line a cycle: 512 / D vectors of D elements. For Q·Kᵀ
the query is broadcast to each of them and the tree is 512 / D trees of D inputs; for prob·V each
probability is broadcast to the D elements of its value, the tree is D trees of 512 / D inputs, and
D accumulators follow. Results are exact integers, rounded once where they leave. (The published
RTL truncates products and lets sums wrap; it never checks values.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sparseloom.hardware.config import MachineError, Section

Integers = NDArray[np.int64]


class MultiplierConfig(Section):
    """One array; the latencies are those of the published RTL."""

    multipliers: int = Field(default=512, ge=1)
    smallest_width: int = Field(default=64, ge=1)
    """Inputs of the smallest trees that the tree splits into: shorter vectors are padded to it."""
    bits: int = Field(default=12, ge=2, le=16)
    """Width of what enters and, after one rounding, of what leaves."""
    broadcast_cycles: int = Field(default=1, ge=0)
    multiply_cycles: int = Field(default=1, ge=0)
    accumulate_cycles: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _powers_of_two(self) -> MultiplierConfig:
        for name in ("multipliers", "smallest_width"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.smallest_width > self.multipliers:
            raise ValueError(f"smallest_width must be at most {self.multipliers} multipliers")
        return self


class Work(NamedTuple):
    """What one row costs: cycles that it occupies the array, cycles from a line to its result.

    Every multiplier is clocked in each of the cycles (`issued`); `useful` products are those of
    real elements, not of padding or of the rest of the last line.
    """

    cycles: int
    latency: int
    issued: int
    useful: int


def tree_width(config: MultiplierConfig, head_dim: int) -> int:
    """Elements that a vector takes in a line: the next power of two, from `smallest_width`.

    Raises:
        MachineError: head_dim does not fit in the array.
    """
    if not 1 <= head_dim <= config.multipliers:
        raise MachineError(f"head_dim must be in [1, {config.multipliers}], got {head_dim}")
    return max(config.smallest_width, 1 << (head_dim - 1).bit_length())


def vectors_per_cycle(config: MultiplierConfig, head_dim: int) -> int:
    """Keys or values that the array takes in one cycle: 512 / D."""
    return config.multipliers // tree_width(config, head_dim)


def query_key_work(config: MultiplierConfig, keys: int, head_dim: int) -> Work:
    """One query against `keys` keys: broadcast, multiply, log2(D) levels of adders."""
    width = tree_width(config, head_dim)
    latency = config.broadcast_cycles + config.multiply_cycles + _log2(width)
    return _work(config, keys, head_dim, latency)


def prob_value_work(config: MultiplierConfig, values: int, head_dim: int) -> Work:
    """One row of probabilities times `values` values: log2(512 / D) levels, then accumulators."""
    levels = _log2(vectors_per_cycle(config, head_dim))
    latency = config.broadcast_cycles + config.multiply_cycles + levels + config.accumulate_cycles
    return _work(config, values, head_dim, latency)


def pack_lines(config: MultiplierConfig, vectors: Integers) -> Integers:
    """SRAM lines (lines, multipliers) of vectors (n, head_dim), padded with zeros."""
    n, head_dim = vectors.shape
    width, per_line = tree_width(config, head_dim), vectors_per_cycle(config, head_dim)
    lines = np.zeros((-(-n // per_line), per_line, width), np.int64)
    lines.reshape(-1, width)[:n, :head_dim] = vectors
    return lines.reshape(-1, config.multipliers)


def query_key(config: MultiplierConfig, query: Integers, keys: Integers) -> Integers:
    """Exact scores (n) of a query (head_dim) and keys (n, head_dim), by lines as the array does."""
    n, head_dim = keys.shape
    width = tree_width(config, head_dim)
    broadcast = np.zeros((config.multipliers // width, width), np.int64)
    broadcast[:, :head_dim] = query
    products = pack_lines(config, keys) * broadcast.reshape(-1)
    return products.reshape(-1, width).sum(-1)[:n]


def prob_value(config: MultiplierConfig, probabilities: Integers, values: Integers) -> Integers:
    """Exact sums (head_dim) of values (n, head_dim) weighted by probabilities (n)."""
    n, head_dim = values.shape
    width, per_line = tree_width(config, head_dim), vectors_per_cycle(config, head_dim)
    lines = pack_lines(config, values)
    weights = np.zeros(len(lines) * per_line, np.int64)
    weights[:n] = probabilities
    products = lines * np.repeat(weights, width).reshape(lines.shape)
    return products.reshape(-1, per_line, width).sum(1).sum(0)[:head_dim]


def rounded(sums: Integers, shift: int, bits: int = 12) -> Integers:
    """The one rounding where results leave: sums / 2**shift, halves up, saturated to `bits` bits.

    Raises:
        MachineError: a negative shift.
    """
    if shift < 0:
        raise MachineError(f"shift must be at least 0, got {shift}")
    half = 1 << (shift - 1) if shift else 0
    high = 2 ** (bits - 1) - 1
    return np.clip((sums + half) >> shift, -high - 1, high)


def fitting_shift(peak: int, bits: int = 12) -> int:
    """The smallest shift by which `rounded` saturates no sum up to `peak` in magnitude."""
    shift = 0
    while (peak + (1 << shift >> 1)) >> shift > 2 ** (bits - 1) - 1:
        shift += 1
    return shift


def _work(config: MultiplierConfig, vectors: int, head_dim: int, latency: int) -> Work:
    cycles = -(-vectors // vectors_per_cycle(config, head_dim))
    return Work(cycles, latency, cycles * config.multipliers, vectors * head_dim)


def _log2(n: int) -> int:
    return n.bit_length() - 1
