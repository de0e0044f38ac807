"""DOTA's reconfigurable multi-precision matrix unit: 32 x 16 elements, a precision for each row.

An element multiplies in FX16, or does 4 products in INT8, 16 in INT4, 64 in INT2, in one cycle:
throughput grows with the square of the ratio of widths (DOTA, ASPLOS 2022; Liu et al., IEEE TC
2022, §6). The ports keep their width for one halving only (the paper's example is FX4 and INT2);
for two and more, each operand that streams in meets several stationary ones: 2 keys in INT4, 4 in
INT2 (default; `stream: wide` widens the port instead). Products of one output are added inside the
multiplier and then in an accumulator, whose width is unpublished (default 48 bits).

Outputs stay in the array. A tile of rows x columns outputs takes as many cycles as the inner
dimension has words. In attention each of T queries has rows / T rows of the array: a key takes a
row for head_dim / 16 cycles, or a part of it where it is narrower. Detection of the next queries
runs on rows of its own beside the products of these ones (`policy: split`), or on all rows
before them (`sequential`): what rounding leaves aside, both take equally long.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from sparseloom.hardware.config import MachineError, Section
from sparseloom.hardware.units.composed_multiplier import fitting, product_sum

Integers = Int64[np.ndarray, "..."]


class RmmuConfig(Section):
    """The array of one Lane."""

    rows: int = Field(default=32, ge=1)
    columns: int = Field(default=16, ge=1)
    base_bits: int = Field(default=16, ge=2)
    """Width of the multipliers."""
    stream_bits: int = Field(default=32, ge=2)
    """New operand bits per element and cycle: two FX16 ones, or four in INT8."""
    multiplier: Literal["quadratic", "linear"] = "quadratic"
    """Products of b bits per cycle: (base / b)², or base / b."""
    max_products: int | None = Field(default=None, ge=1)
    """Most products per element and cycle, whatever the width; None: no such limit."""
    stream: Literal["shared", "wide"] = "shared"
    """What does not fit through the port: operands are shared by stationary sets, or the port is
    as wide as it takes."""
    accumulator_bits: int = Field(default=48, ge=2, le=63)
    fill_cycles: int | None = Field(default=None, ge=0)
    """From the first operand of a tile to its last element at work; None: one per column."""
    drain_cycles: int | None = Field(default=None, ge=0)
    """Until the outputs have left; None: one per row."""
    policy: Literal["split", "sequential"] = "split"

    @model_validator(mode="after")
    def _power_of_two(self) -> RmmuConfig:
        if self.base_bits & (self.base_bits - 1):
            raise ValueError(f"base_bits must be a power of two, got {self.base_bits}")
        return self

    @property
    def elements(self) -> int:
        """Processing elements."""
        return self.rows * self.columns

    @property
    def overhead_cycles(self) -> int:
        """Fill and drain of a tile: 48 by default."""
        fill = self.columns if self.fill_cycles is None else self.fill_cycles
        drain = self.rows if self.drain_cycles is None else self.drain_cycles
        return fill + drain

    def products(self, bits: int) -> int:
        """Products of `bits` operands per element and cycle; 1 from the base width upwards."""
        ratio = max(1, self.base_bits // bits)
        found = ratio * ratio if self.multiplier == "quadratic" else ratio
        return found if self.max_products is None else min(found, self.max_products)

    def word(self, bits: int) -> int:
        """Operands of so many bits that stream into an element per cycle."""
        return self.products(bits) if self.stream == "wide" else max(1, self.stream_bits // bits)

    def sets(self, bits: int) -> int:
        """Stationary sets (keys) that share each streamed operand: outputs of an element."""
        return max(1, self.products(bits) // self.word(bits))

    def depth(self, bits: int) -> int:
        """Products that an element adds to one output per cycle."""
        return self.products(bits) // self.sets(bits)


class Ports(NamedTuple):
    """Bits of an element in one precision: held, entering per cycle, and of the inner sum.

    The sum is wide enough for all products of a cycle, whether or not they belong together.
    """

    stationary_bits: int
    streaming_bits: int
    sum_bits: int


def ports(config: RmmuConfig, bits: int) -> Ports:
    """What one element needs; at the base width one operand stays and the other streams."""
    products = config.products(bits)
    return Ports(
        stationary_bits=products * bits,
        streaming_bits=config.depth(bits) * bits,
        sum_bits=2 * bits + (products - 1).bit_length(),
    )


# --------------------------------------------------------------------------- what it computes


def matrix_product(
    config: RmmuConfig, a: Integers, b: Integers, bits: int | Integers, *, composed: bool = False
) -> Integers:
    """`a @ b` as the array accumulates it, exactly.

    Args:
        config: the array.
        a: (rows, inner) codes, of row r in `bits[r]` bits.
        b: (inner, columns) codes, which must fit in every row's width.
        bits: 2, 4, 8 or 16: one, or one for each row.
        composed: build every product of 2-bit ones (slow), instead of multiplying integers.

    Raises:
        MachineError: shapes, widths or operands that do not fit, or a sum that overflows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise MachineError(f"a and b must be (m, k) and (k, n), got {a.shape} and {b.shape}")
    widths = np.broadcast_to(np.asarray(bits, np.int64), a.shape[0])
    found = np.zeros((a.shape[0], b.shape[1]), np.int64)
    for width in np.unique(widths).tolist():
        rows = widths == width
        found[rows] = _one_width(config, a[rows], b, width, composed)
    return found


def _one_width(config: RmmuConfig, a: Integers, b: Integers, bits: int, composed: bool) -> Integers:
    if bits > config.base_bits:
        raise MachineError(f"bits must be at most {config.base_bits}, got {bits}")
    fitting(a, bits, "a")
    fitting(b, bits, "b")
    depth, limit = config.depth(bits), ports(config, bits).sum_bits
    bound = int(np.abs(a).sum(axis=1).max(initial=0)) << (bits - 1)
    if not composed and bound < 1 << (config.accumulator_bits - 1) and bound < 1 << 53:
        # No partial sum can overflow, so their order does not matter: fp64 is exact, and fast.
        return np.rint(a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    sums = np.zeros((a.shape[0], b.shape[1]), np.int64)
    for first in range(0, a.shape[1], depth):
        streamed, stationary = a[:, first : first + depth], b[first : first + depth]
        if composed:
            shape = (*sums.shape, streamed.shape[1])
            together = np.broadcast_to(streamed[:, None, :], shape)
            part = product_sum(together, np.broadcast_to(stationary.T, shape), bits, limit)
        else:
            part = streamed @ stationary
        sums = fitting(sums + part, config.accumulator_bits, "an accumulator's sum")
    return sums


# --------------------------------------------------------------------------- how long it takes


def tile_cycles(
    config: RmmuConfig, rows: int, inner: int, columns: int, *, bits: int = 16, fold: int = 1
) -> int:
    """Cycles of the whole array for rows x inner x columns, tiles filled or not, without fill.

    Args:
        config: the array.
        rows, inner, columns: of the product.
        bits: of the operands; narrow ones are multiplied several at a time.
        fold: groups of rows that take columns of their own (fewer tokens than rows).
    """
    return _tiles(config, rows, columns, bits, fold) * -(-inner // config.depth(bits))


def product_cycles(
    config: RmmuConfig,
    rows: int,
    inner: int,
    columns: int,
    *,
    bits: int = 16,
    double_buffered: bool = True,
) -> int:
    """`tile_cycles`, and fill and drain: once if tiles are double-buffered, else for each one."""
    tiles = _tiles(config, rows, columns, bits, 1)
    exposed = min(tiles, 1) if double_buffered else tiles
    cycles = tile_cycles(config, rows, inner, columns, bits=bits)
    return cycles + exposed * config.overhead_cycles


def _tiles(config: RmmuConfig, rows: int, columns: int, bits: int, fold: int) -> int:
    across = config.columns * config.sets(bits) * fold
    return -(-rows // config.rows) * -(-columns // across)


def step_rate(
    config: RmmuConfig, head_dim: int, *, parallel_queries: int = 4, rows: int | None = None
) -> Fraction:
    """Steps per cycle in which each of the parallel queries meets one key (or value).

    Args:
        config: the array.
        head_dim: elements of a key, or of a value.
        parallel_queries: T; each has the same number of rows, what is left over idles.
        rows: that compute, all by default.

    Raises:
        MachineError: fewer rows than queries.
    """
    computing = config.rows if rows is None else rows
    each = computing // parallel_queries
    if each < 1 or computing > config.rows:
        raise MachineError(
            f"rows must be in [{parallel_queries}, {config.rows}] for {parallel_queries} "
            f"parallel queries, got {computing}"
        )
    if head_dim <= config.columns:
        return Fraction(each * (config.columns // head_dim))
    return Fraction(each, -(-head_dim // config.columns))


def attention_cycles(
    config: RmmuConfig,
    steps: int,
    head_dim: int,
    *,
    parallel_queries: int = 4,
    rows: int | None = None,
    alone: bool = False,
) -> int:
    """Cycles of so many steps of Q·Kᵀ or of P·V.

    One product follows the other without a gap, so fill and drain are hidden; a product `alone`,
    as the first one of a call, shows them.
    """
    rate = step_rate(config, head_dim, parallel_queries=parallel_queries, rows=rows)
    cycles = -(-steps * rate.denominator // rate.numerator)
    return cycles + config.overhead_cycles if alone and steps else cycles


def score_cycles(
    config: RmmuConfig, scores: int, width: int, *, bits: int, rows: int | None = None
) -> int:
    """Cycles in which `rows` rows (default all) predict so many scores of `width` products."""
    elements = (config.rows if rows is None else rows) * config.columns * config.sets(bits)
    return -(-scores // elements) * -(-width // config.depth(bits))


def detecting_rows(config: RmmuConfig, detect: float, attend: float) -> int:
    """Rows that detect, so that they take about as long as the others attend: at least one.

    ⌈rows · detect / (detect + attend)⌉ of work in element cycles; 0 where nothing is detected,
    all where nothing is attended to.

    Raises:
        MachineError: negative work.
    """
    if min(detect, attend) < 0:
        raise MachineError(f"detect and attend must be at least 0, got {detect} and {attend}")
    if detect == 0:
        return 0
    if attend == 0:
        return config.rows
    return min(config.rows - 1, int(np.ceil(config.rows * detect / (detect + attend))))


def overlapped_cycles(config: RmmuConfig, detect: float, attend: float) -> float:
    """Cycles of a group in the steady state, from its element cycles of both kinds.

    With `split`, the longer one of the two on its rows; with `sequential`, both on all of them.
    """
    rows = detecting_rows(config, detect, attend)
    if config.policy == "sequential" or rows in (0, config.rows):
        return (detect + attend) / config.elements
    detecting = detect / (rows * config.columns)
    return max(detecting, attend / ((config.rows - rows) * config.columns))
