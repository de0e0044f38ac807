"""What SpAtten is made of, module by module, and its area: calibrated full size, predicted 1/8.

HPCA 2021, sections IV and V-A, figure 13. The published breakdown has one area per module; one
factor per module makes our tables agree with it, and the same factors predict other sizes. How
the authors' SRAM is cut is unpublished and decides everything: see `LINE` and `MACROS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sparseloom.hardware.actions import Block
from sparseloom.hardware.energy_model import EnergyModel

MODULES: Final[tuple[str, ...]] = ("qk", "pv", "fetcher", "softmax", "topk", "other")
# HPCA 2021, figure 13a, in mm² at 40 nm; the sum is 18.71.
PUBLISHED_MM2: Final[dict[str, float]] = dict(
    zip(MODULES, (7.12, 7.22, 2.65, 0.79, 0.50, 0.43), strict=True)
)
PUBLISHED_EIGHTH_MM2: Final = 1.55  # table III

# A line of the key SRAM is as wide as the array: 512 × 12 bits. "line" reads it from one CACTI
# bank of that width, "macros" from banks of 512 bits side by side, which is what one would build.
# Only "line" comes near the published full size without calibration.
LINE: Final = EnergyModel(widest_port_bits=6144)
MACROS: Final = EnergyModel()

SCORE_BITS, COUNT_BITS = 32, 5  # accumulators of token scores and prefix sums: defaults of ours
HEAD_SCORE_BITS, HEADS = 48, 16  # accumulators of head scores: defaults of ours
FP_BITS = 32  # of the softmax (section IV-F)


@dataclass(frozen=True)
class Structure:
    """Sizes that decide area; the defaults are the full machine (table I and section IV).

    Args:
        multipliers: per array. Each array has an SRAM of `sram_kib` in lines as wide as itself.
        bits: of on-chip values.
        head_dim: inputs of an adder tree.
        sram_kib: of the key and of the value SRAM each, both halves of the double buffer.
        ports, channels: of the fetcher and its two crossbars.
        fifo_depth: of each port's address (64 b) and data (128 b) FIFO.
        softmax_lanes, row_fifo_depth: scores per cycle and depth of each lane's FIFO.
        topk_lanes, topk_engines: comparators of each kind per engine, and engines.
        tokens: longest context, which sizes the FIFOs of the top-k engines and the scores.
    """

    multipliers: int = 512
    bits: int = 12
    head_dim: int = 64
    sram_kib: float = 192.0
    ports: int = 32
    channels: int = 16
    fifo_depth: int = 64
    softmax_lanes: int = 8
    row_fifo_depth: int = 128
    topk_lanes: int = 16
    topk_engines: int = 2
    tokens: int = 1024

    @property
    def line_bits(self) -> int:
        """Width of an SRAM line."""
        return self.multipliers * self.bits

    @property
    def item_bits(self) -> int:
        """A candidate of the top-k engine: its value and its id."""
        return self.bits + (self.tokens - 1).bit_length()


ADDRESS_BITS, DATA_BITS = 64, 128  # words of the fetcher's FIFOs (table I)
FULL: Final = Structure()
# Table III and the authors' run script: 64 + 64 multipliers, 4 ports, 2 channels, top-k of 16. One
# softmax lane per score and cycle is a default of ours; the SRAM is unpublished.
EIGHTH: Final = replace(
    FULL, multipliers=64, ports=4, channels=2, softmax_lanes=1, row_fifo_depth=1024
)
EIGHTH_SRAM: Final[dict[str, float]] = {
    "as in the public RTL (192 KiB each)": 192.0,
    "without double buffer (96 KiB each)": 96.0,
    "an eighth (24 KiB each)": 24.0,
}


def tree(inputs: int, bits: int) -> list[tuple[int, int]]:
    """(adders, width) by level of a tree over `inputs` products of two `bits`-bit numbers."""
    levels = range(1, (inputs - 1).bit_length() + 1)
    return [(-(-inputs // 2**level), 2 * bits + level) for level in levels]


def blocks(structure: Structure) -> list[Block]:
    """What the machine is made of, by module."""
    return [*_arrays(structure), *_fetcher(structure), *_softmax(structure), *_selection(structure)]


def _arrays(s: Structure) -> list[Block]:
    found: list[Block] = []
    scores, rows = s.multipliers // s.head_dim, s.multipliers // s.head_dim
    for module, trees, inputs in (("qk", scores, s.head_dim), ("pv", s.head_dim, rows)):
        found += [
            Block(module, "multiply", s.multipliers, s.bits),
            Block(module, "register", s.multipliers, 2 * s.bits),
            Block(module, "sram", 1, s.line_bits, s.sram_kib),
            *(Block(module, "add", trees * n, bits) for n, bits in tree(inputs, s.bits)),
        ]
    found += [
        Block("qk", "register", s.head_dim, s.bits),  # the query
        Block("pv", "add", s.head_dim, SCORE_BITS),  # the accumulators of the output
        Block("pv", "register", s.head_dim, SCORE_BITS),
    ]
    return found


def _fetcher(s: Structure) -> list[Block]:
    def kib(bits: int) -> float:
        return s.fifo_depth * bits / 8192

    return [
        Block("fetcher", "fifo", s.ports, ADDRESS_BITS, kib(ADDRESS_BITS)),
        Block("fetcher", "fifo", s.ports, DATA_BITS, kib(DATA_BITS)),
        Block("fetcher", "crossbar", s.ports * s.channels, ADDRESS_BITS),
        Block("fetcher", "crossbar", s.ports * s.channels, DATA_BITS),
        # Two lines per cycle are converted to the on-chip width.
        Block("fetcher", "shift", 2 * s.multipliers, s.bits),
        Block("fetcher", "register", 2 * s.multipliers, s.bits),
    ]


def _softmax(s: Structure) -> list[Block]:
    lanes = s.softmax_lanes
    return [
        Block("softmax", "multiply", 2 * lanes, FP_BITS, kind="fp"),  # dequantise, quantise
        Block("softmax", "exp", lanes, FP_BITS, kind="fp"),
        Block("softmax", "add", 2 * lanes, FP_BITS, kind="fp"),  # lane sums, across lanes
        Block("softmax", "divide", lanes, FP_BITS, kind="fp"),
        Block("softmax", "fifo", lanes, FP_BITS, s.row_fifo_depth * FP_BITS / 8192),
    ]


def _selection(s: Structure) -> list[Block]:
    engines, lanes, item = s.topk_engines, s.topk_lanes, s.item_bits
    stages = (lanes - 1).bit_length()
    row_kib = s.tokens * item / 8192
    return [
        Block("topk", "compare", 2 * engines * lanes, s.bits),
        # Left, right, and the original row.
        Block("topk", "fifo", 3 * engines, lanes * item, row_kib),
        # Two zero eliminators per engine: prefix sums, and a multiplexer per lane and stage.
        Block("topk", "add", 2 * engines * lanes * stages, COUNT_BITS),
        Block("topk", "crossbar", 2 * engines * lanes * stages, item),
        Block("other", "sram", 1, s.softmax_lanes * SCORE_BITS, s.tokens * SCORE_BITS / 8192),
        Block("other", "add", s.softmax_lanes, SCORE_BITS),
        Block("other", "register", HEADS, HEAD_SCORE_BITS),
        Block("other", "add", s.multipliers // s.head_dim, HEAD_SCORE_BITS),
        Block("other", "compare", s.softmax_lanes, s.bits),
        # Rows of probabilities wait for the decision whether to fetch low bits.
        Block("other", "fifo", s.softmax_lanes, s.bits, s.tokens * s.bits / 8192 / s.softmax_lanes),
    ]


@dataclass(frozen=True)
class Calibration:
    """One factor per module: published over ours, full size."""

    model: EnergyModel
    factors: dict[str, float]

    def area(self, structure: Structure) -> dict[str, float]:
        """Area by module in mm²."""
        raw = self.model.area(blocks(structure))
        return {module: raw[module] * self.factors[module] for module in MODULES}


def calibrated(model: EnergyModel = LINE, full: Structure = FULL) -> Calibration:
    """The factors that make the full machine's modules what figure 13a prints."""
    raw = model.area(blocks(full))
    return Calibration(model, {m: PUBLISHED_MM2[m] / raw[m] for m in MODULES})


def eighths(sram_kib: Sequence[float] = tuple(EIGHTH_SRAM.values())) -> list[Structure]:
    """SpAtten-1/8 with each capacity of its two SRAMs."""
    return [replace(EIGHTH, sram_kib=kib) for kib in sram_kib]
