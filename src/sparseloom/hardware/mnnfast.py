"""MnnFast (Jang et al., ISCA 2019): columns streamed in chunks, one division, values skipped."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from sparseloom.hardware.attention_core import (
    EnergySource,
    FlatMemory,
    Sampled,
    Tally,
    core_report,
    sampled,
    visible,
    visible_counts,
)
from sparseloom.hardware.config import Section
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Fidelity, Report, Stage
from sparseloom.trace import AttentionCall, Operator, Selection, Trace, Workload

Reference = Literal["exact", "streaming"]


class Engine(Section):
    """The arithmetic and how it is shared."""

    multipliers: int = Field(ge=2)
    arrays: Literal["separate", "shared"]
    query_overhead_cycles: int = Field(ge=0)
    bits: int = Field(ge=1, le=64)


class Skipping(Section):
    """Zero-skipping of values; the machine file says what each choice means."""

    threshold: float = Field(ge=0, le=1)
    reference: Reference
    chunk_rows: int = Field(ge=1)
    evidence: Literal["tensors", "selection", "defaults"]
    kept_share: float = Field(gt=0, le=1)
    fetched: Literal["kept", "union", "all"]


class MnnFastConfig(MachineConfig):
    """A machine file of kind `mnnfast`."""

    kind: Literal["mnnfast"]  # pyright: ignore[reportIncompatibleVariableOverride]
    engine: Engine
    skipping: Skipping
    dram: FlatMemory
    energy: EnergySource


class Streamed(NamedTuple):
    """Output (q_len, value_dim), and which values were weighed (q_len, kv_len)."""

    output: np.ndarray
    kept: np.ndarray


def lazy_softmax(
    query: Float[np.ndarray, "q_len head_dim"],
    key: Float[np.ndarray, "kv_len head_dim"],
    value: Float[np.ndarray, "kv_len value_dim"],
    allowed: Bool[np.ndarray, "q_len kv_len"],
    *,
    scale: float,
    threshold: float,
    reference: Reference,
    chunk_rows: int,
) -> Streamed:
    """Attention in one pass over chunks of keys and values: Σ e·v and Σ e together, one division.

    A value is skipped where its weight is below `threshold`: of the final sum ("exact", a second
    pass over the scores), or of the sum so far ("streaming"), which is never larger, so that it
    skips nothing which the exact test keeps.  Skipped weights stay in the sum.  The running
    maximum rescales what was added before (MnnFast streams without; the result is the same).
    A query that may see nothing gives zeros.
    """
    q_len, kv_len = allowed.shape
    kept = np.zeros((q_len, kv_len), np.bool_)
    largest = np.full((q_len, 1), -np.inf)
    total = np.zeros((q_len, 1))
    output = np.zeros((q_len, value.shape[1]))
    chunks = [slice(at, at + chunk_rows) for at in range(0, kv_len, chunk_rows)]
    if reference == "exact":
        for rows in chunks:
            largest, total, _, _ = _fold(query, key[rows], allowed[:, rows], scale, largest, total)
        final, so_far = total, np.zeros((q_len, 1))
        for rows in chunks:
            _, so_far, e, _ = _fold(query, key[rows], allowed[:, rows], scale, largest, so_far)
            kept[:, rows] = allowed[:, rows] & (e >= threshold * final)
            output += np.where(kept[:, rows], e, 0.0) @ value[rows]
        return Streamed(output / np.where(final > 0, final, 1.0), kept)
    for rows in chunks:
        largest, total, e, shrink = _fold(query, key[rows], allowed[:, rows], scale, largest, total)
        kept[:, rows] = allowed[:, rows] & (e >= threshold * total)
        output = output * shrink + np.where(kept[:, rows], e, 0.0) @ value[rows]
    return Streamed(output / np.where(total > 0, total, 1.0), kept)


def _fold(
    query: np.ndarray,
    key: np.ndarray,
    allowed: np.ndarray,
    scale: float,
    largest: np.ndarray,
    total: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One chunk: the new maximum, the new sum, the exponentials, and what rescales earlier sums."""
    scores = np.where(allowed, scale * (query @ key.T), -np.inf)
    above = np.maximum(largest, scores.max(axis=1, keepdims=True))
    base = np.where(np.isfinite(above), above, 0.0)
    e = np.exp(scores - base)
    shrink = np.exp(np.where(np.isfinite(largest), largest, -np.inf) - base)
    return above, total * shrink + e.sum(axis=1, keepdims=True), e, shrink


class MnnFast(Machine):
    """Keys are read and scored whole; values whose weight is small are neither read nor weighed.

    With separate arrays for Q·Kᵀ and P·V a query takes n + overhead cycles however many values are
    skipped; with one shared array, (1 + κ) / 2 of that.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic",)
    Config: ClassVar[type[MachineConfig]] = MnnFastConfig

    @property
    def settings(self) -> MnnFastConfig:
        """The checked machine file."""
        return cast("MnnFastConfig", self.config)

    def area(self) -> dict[str, float]:
        """Area in mm²: 0, the design is an FPGA's."""
        return self.table.area({"core": 1})

    def power(self) -> dict[str, float]:
        """Power in W, as the published comparison assumes it."""
        return self.table.power({"core": 1})

    def roof(self) -> Roof:
        """Every multiplier busy, and the DRAM's bandwidth."""
        s = self.settings
        peak = 2e9 * s.engine.multipliers * s.clock_ghz
        return Roof(peak, 1e9 * s.dram.gbytes_per_second)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, tally = self.settings, Tally()
        for i, operator in enumerate(trace.workload.attention()):
            looks = s.skipping.evidence == "tensors"
            values = sampled(trace, i, operator) if looks else None
            for b in range(operator.batch):
                found = self._skipped(
                    trace.workload, operator, selection.calls[i], b, values, tally
                )
                tally.stages.append(self._stage(trace.workload, operator, b, *found, tally))
        return core_report(
            self,
            trace,
            selection,
            options.fidelity,
            tally,
            memory=s.dram,
            energy=s.energy,
            blocks=(),
            assumptions=self._assumptions(selection),
        )

    def _skipped(
        self,
        workload: Workload,
        operator: Operator,
        call: AttentionCall,
        sequence: int,
        values: Sampled | None,
        tally: Tally,
    ) -> tuple[float, float]:
        """Of a sequence: pairs whose value is weighed, and value rows fetched, over all heads."""
        s = self.settings.skipping
        seen = visible_counts(workload, operator, sequence)
        rows = operator.kv_len * operator.heads
        if values is None:
            share, where = s.kept_share, f"the default share, {s.kept_share:g}"
            pairs = share * float(seen.sum()) * operator.heads
            if s.evidence == "selection":
                found = call.value_pairs(operator, workload.padding_of(operator))[sequence]
                pairs, where = float(found.sum()), "the pairs that the selection keeps"
                share = pairs / max(1.0, float(seen.sum()) * operator.heads)
            elif s.evidence == "tensors":
                where += ": the trace holds no queries, keys and values"
            tally.note(f"values are skipped by {where}")
            some = {"kept": share, "union": 1 - (1 - share) ** operator.q_len, "all": 1.0}
            return pairs, some[s.fetched] * rows
        allowed = visible(workload, operator, sequence)
        pairs, fetched = 0, 0.0
        for h in range(operator.heads):
            query, key, value = values.head(sequence, h)
            kept = lazy_softmax(
                query.astype(np.float64),
                key.astype(np.float64),
                value.astype(np.float64),
                allowed,
                scale=operator.head_dim**-0.5,
                threshold=s.threshold,
                reference=s.reference,
                chunk_rows=s.chunk_rows,
            ).kept
            weighed = int(kept.sum())
            pairs += weighed
            share = weighed / max(1, int(seen.sum()))
            union = float(kept.any(axis=0).sum())
            some = {"kept": share * operator.kv_len, "union": union, "all": operator.kv_len}
            fetched += some[s.fetched]
        return float(pairs), fetched

    def _stage(
        self,
        workload: Workload,
        operator: Operator,
        sequence: int,
        pairs: float,
        value_rows: float,
        tally: Tally,
    ) -> Stage:
        s, op = self.settings, operator
        seen = float(visible_counts(workload, op, sequence).sum()) * op.heads
        queries = op.q_len * op.heads
        half = max(1, s.engine.multipliers // 2)
        if s.engine.arrays == "separate":
            scoring, weighing = -(-op.head_dim // half), -(-op.value_dim // half)
            cycles = max(scoring * seen, weighing * pairs)
        else:
            macs = seen * op.head_dim + pairs * op.value_dim
            cycles = macs / s.engine.multipliers
        cycles += queries * s.engine.query_overhead_cycles
        width = s.engine.bits / 8
        keys = op.kv_len * op.heads * op.head_dim * width
        ends = queries * (op.head_dim + op.value_dim) * width
        moved = keys + value_rows * op.value_dim * width + ends
        wait = max(0.0, moved / s.dram.bytes_per_cycle(s.clock_ghz) - cycles)
        self._count(op, seen, pairs, value_rows, tally)
        tally.dram_bytes += moved
        tally.useful_bytes += moved
        tally.operations += 2 * (seen * op.head_dim + pairs * op.value_dim)
        for name, macs in (("qk", seen * op.head_dim), ("pv", pairs * op.value_dim)):
            tally.busy[name] = tally.busy.get(name, 0.0) + macs / half
        return Stage(
            component="attention",
            cycles=cycles + wait,
            layer=op.layer,
            step=op.step,
            sequence=sequence,
            stall_cycles=wait,
            stall_cause="dram" if wait else "",
            facts={"visible": seen, "weighed": pairs, "kept_share": pairs / seen if seen else 0.0},
        )

    def _count(
        self, op: Operator, seen: float, pairs: float, value_rows: float, tally: Tally
    ) -> None:
        bits, queries = self.settings.engine.bits, op.q_len * op.heads
        for name, macs in (("qk", seen * op.head_dim), ("pv", pairs * op.value_dim)):
            tally.act(name, "multiply", macs, bits)
            tally.act(name, "add", macs, bits)
        # e^x as five multiplications and additions; lazy softmax divides once per output element,
        # which is as many subtractions as bits.
        tally.act("softmax", "multiply", 5 * seen, bits)
        tally.act("softmax", "add", 6 * seen + queries * op.value_dim * bits, bits)
        tally.act("softmax", "compare", seen, bits)
        read = (op.kv_len * op.heads + queries) * op.head_dim + value_rows * op.value_dim
        tally.act("dram", "dram_read", read, bits)
        tally.act("dram", "dram_write", queries * op.value_dim, bits)

    def _assumptions(self, selection: Selection) -> tuple[str, ...]:
        s = self.settings
        fetched = {
            "kept": "the share of the value rows that a query weighs, as for one query",
            "union": "the value rows that any query of the head weighs",
            "all": "every value row",
        }[s.skipping.fetched]
        found = [
            "a chunk of keys and values is read once for all queries of a head; DRAM reads keys "
            f"whole and {fetched}, at {s.dram.gbytes_per_second:g} GB/s, behind the arithmetic",
            f"operands have {s.engine.bits} bits, in DRAM too (default)",
            f"values below {s.skipping.threshold:g} of the {s.skipping.reference} sum are skipped",
            "the embedding cache has no part in attention and is not modelled",
        ]
        if s.engine.arrays == "separate":
            found.append("scoring and weighing have an array each: skipped values save no time")
        if s.skipping.evidence != "selection":
            found.append(
                f"selection {selection.name!r} is not followed: MnnFast scores every key and "
                "skips values by itself"
            )
        return tuple(found)
