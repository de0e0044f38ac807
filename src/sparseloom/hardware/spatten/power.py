"""Actions of SpAtten from what its units did, and its power by module: calibrated, then predicted.

HPCA 2021, section V-A, table II and figure 13b. Published power is an average over workloads whose
activity is unpublished: every factor rests on the activity that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from sparseloom.hardware.actions import Action
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.hardware.spatten.area import (
    ADDRESS_BITS,
    COUNT_BITS,
    DATA_BITS,
    FP_BITS,
    FULL,
    LINE,
    MODULES,
    SCORE_BITS,
    Structure,
    blocks,
    tree,
)

# Table II (DRAM) and figure 13b (on chip), in W at 1 GHz; on chip they add up to 2.60.
PUBLISHED_W: Final[dict[str, float]] = dict(
    zip((*MODULES, "dram"), (1.13, 0.53, 0.24, 0.50, 0.08, 0.12, 5.71), strict=True)
)
PUBLISHED_EIGHTH_W: Final = 360 / 382  # table III: GOP/s over GOP/J
ATOM_BITS = 256  # of one DRAM transaction (section IV-D)


@dataclass(frozen=True)
class Activity:
    """What the units did, in total or per cycle.

    Args:
        scores, values: products of the query with a key, of a probability with a value vector.
        score_lines, value_lines: lines read from the two SRAMs.
        key_vectors_written, low_vectors_written, value_vectors_written: vectors put into them.
        softmax_scores: scores that went through the softmax, reruns included.
        topk_items, rank_items: candidates that passed the comparators of the two engines, summed
            over the passes of the quick-select.
        atoms: DRAM transactions of 32 B.
        activates: of DRAM rows; 0 with a memory table that has them in its energy per bit.
    """

    scores: float = 0
    values: float = 0
    score_lines: float = 0
    value_lines: float = 0
    key_vectors_written: float = 0
    low_vectors_written: float = 0
    value_vectors_written: float = 0
    softmax_scores: float = 0
    topk_items: float = 0
    rank_items: float = 0
    atoms: float = 0
    activates: float = 0

    def __mul__(self, share: float) -> Activity:
        return Activity(*(getattr(self, f.name) * share for f in fields(self)))


def actions(structure: Structure, done: Activity) -> list[Action]:
    """The actions behind an activity, by module and "dram"."""
    return [
        *_arrays(structure, done),
        *_fetcher(structure, done),
        *_softmax(structure, done),
        *_selection(structure, done),
        Action("dram", "dram_activate", done.activates),
        Action("dram", "dram_read", done.atoms, ATOM_BITS),
    ]


def _arrays(s: Structure, done: Activity) -> list[Action]:
    d, in_line = s.head_dim, s.multipliers // s.head_dim
    keys_written = (done.key_vectors_written + done.low_vectors_written) / in_line
    written = done.value_vectors_written / in_line
    return [
        Action("qk", "multiply", done.scores * d, s.bits),
        Action("qk", "register", done.scores * d, 2 * s.bits),
        *(Action("qk", "add", done.scores * n, bits) for n, bits in tree(d, s.bits)),
        Action("qk", "sram_read", done.score_lines, s.line_bits, s.sram_kib),
        Action("qk", "sram_write", keys_written, s.line_bits, s.sram_kib),
        Action("pv", "multiply", done.values * d, s.bits),
        Action("pv", "register", done.values * d, 2 * s.bits),
        *(
            Action("pv", "add", done.values / in_line * d * n, bits)
            for n, bits in tree(in_line, s.bits)
        ),
        Action("pv", "add", done.value_lines * d, SCORE_BITS),
        Action("pv", "register", done.value_lines * d, SCORE_BITS),
        Action("pv", "sram_read", done.value_lines, s.line_bits, s.sram_kib),
        Action("pv", "sram_write", written, s.line_bits, s.sram_kib),
    ]


def _fetcher(s: Structure, done: Activity) -> list[Action]:
    words = done.atoms * ATOM_BITS / DATA_BITS
    vectors = done.key_vectors_written + done.low_vectors_written + done.value_vectors_written
    address_kib, data_kib = (s.fifo_depth * bits / 8192 for bits in (ADDRESS_BITS, DATA_BITS))
    return [
        Action("fetcher", "fifo", done.atoms, ADDRESS_BITS, address_kib),
        Action("fetcher", "crossbar", done.atoms, ADDRESS_BITS),
        Action("fetcher", "fifo", words, DATA_BITS, data_kib),
        Action("fetcher", "crossbar", words, DATA_BITS),
        Action("fetcher", "shift", vectors * s.head_dim, s.bits),
        Action("fetcher", "register", vectors * s.head_dim, s.bits),
    ]


def _softmax(s: Structure, done: Activity) -> list[Action]:
    scores, kib = done.softmax_scores, s.row_fifo_depth * FP_BITS / 8192
    return [
        Action("softmax", "multiply", 2 * scores, FP_BITS, kind="fp"),
        Action("softmax", "exp", scores, FP_BITS, kind="fp"),
        Action("softmax", "add", scores, FP_BITS, kind="fp"),
        Action("softmax", "divide", scores, FP_BITS, kind="fp"),
        Action("softmax", "fifo", scores, FP_BITS, kib),
    ]


def _selection(s: Structure, done: Activity) -> list[Action]:
    items, scores = done.topk_items + done.rank_items, done.softmax_scores
    stages = (s.topk_lanes - 1).bit_length()
    row_kib, line = s.tokens * s.item_bits / 8192, s.softmax_lanes * SCORE_BITS
    score_kib = s.tokens * SCORE_BITS / 8192
    return [
        Action("topk", "compare", 2 * items, s.bits),
        Action("topk", "add", 2 * items * stages, COUNT_BITS),
        Action("topk", "crossbar", 2 * items, s.item_bits),
        Action("topk", "fifo", items / s.topk_lanes, s.topk_lanes * s.item_bits, row_kib),
        Action("other", "sram_read", scores / s.softmax_lanes, line, score_kib),
        Action("other", "sram_write", scores / s.softmax_lanes, line, score_kib),
        Action("other", "add", scores, SCORE_BITS),
        Action("other", "compare", scores, s.bits),
        Action("other", "fifo", scores, s.bits, s.tokens * s.bits / 8192 / s.softmax_lanes),
    ]


def gpt2_activity(
    *,
    tera_operations: float = 0.43,
    operations_per_byte: float = 2.1,
    value_keep: float = 0.25,
    reruns: float = 0.059,
    passes: float = 3.4,
    structure: Structure = FULL,
) -> Activity:
    """Activity per cycle on GPT-2 from published averages, where no simulated one is at hand.

    Args:
        tera_operations, operations_per_byte: published averages over the GPT-2 benchmarks (HPCA
            2021, figure 18), per second at 1 GHz.
        value_keep: values fetched per key (assumed; the authors' two traces have 0.2 and 0.3).
        reruns: share of rows whose low bits are fetched (published average).
        passes: times a quick-select looks at each score (1024 candidates, half of them kept).
        structure: for the keys in a line.
    """
    vectors = tera_operations * 1e3 / (2 * structure.head_dim)
    keys = vectors / (1 + value_keep)
    scores = keys * (1 + reruns)
    done = Activity(
        scores=scores,
        values=vectors - keys,
        key_vectors_written=keys,
        low_vectors_written=keys * reruns,
        value_vectors_written=vectors - keys,
        softmax_scores=scores,
        topk_items=keys * passes,
        atoms=tera_operations * 1e3 / operations_per_byte * 8 / ATOM_BITS,
    )
    return per_line(done, structure)


def per_line(done: Activity, structure: Structure) -> Activity:
    """The activity with every line that is read full of vectors."""
    vectors = structure.multipliers // structure.head_dim
    return replace(done, score_lines=done.scores / vectors, value_lines=done.values / vectors)


def watts(
    model: EnergyModel, structure: Structure, per_cycle: Activity, clock_ghz: float = 1.0
) -> dict[str, float]:
    """Power by module and of the DRAM in W, leakage included, before any calibration."""
    dynamic = model.dynamic(actions(structure, per_cycle))
    leaking = model.leakage(blocks(structure))
    return {
        module: dynamic[module] * clock_ghz * 1e9 + leaking.get(module, 0.0)
        for module in (*MODULES, "dram")
    }


@dataclass(frozen=True)
class PowerCalibration:
    """One factor per module and one for DRAM: published over ours at one activity, full size."""

    model: EnergyModel
    factors: dict[str, float]

    def watts(
        self, structure: Structure, per_cycle: Activity, clock_ghz: float = 1.0
    ) -> dict[str, float]:
        """Power by module and of the DRAM in W."""
        raw = watts(self.model, structure, per_cycle, clock_ghz)
        return {name: raw[name] * factor for name, factor in self.factors.items()}


def calibrated_power(
    per_cycle: Activity, model: EnergyModel = LINE, full: Structure = FULL
) -> PowerCalibration:
    """The factors that make the full machine at this activity draw what is published.

    Args:
        per_cycle: activity per cycle of the workloads that the published averages stand for.
        model: tables.
        full: the machine that was published.
    """
    raw = watts(model, full, per_cycle)
    return PowerCalibration(model, {name: PUBLISHED_W[name] / raw[name] for name in raw})
