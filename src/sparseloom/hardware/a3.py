"""A3 (Ham et al., HPCA 2020): the exact pipeline, and the one that searches for candidates."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from sparseloom.hardware.a3_algorithm import FixedPoint, bitonic_compares, choose, quantise
from sparseloom.hardware.a3_pipeline import Jobs, closed_form, cycle_by_cycle
from sparseloom.hardware.actions import Block
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


class Numbers(Section):
    """Operands: integer bits with the sign, and fraction bits."""

    integer_bits: int = Field(ge=1, le=16)
    fraction_bits: int = Field(ge=0, le=12)


class Pipeline(Section):
    """Modules in a row, each of which streams the rows of one query."""

    multipliers: int = Field(ge=2)
    module_overhead_cycles: int = Field(ge=0)
    query_buffer: int = Field(ge=1)


class Search(Section):
    """How keys are chosen; the machine file says what each choice means."""

    mode: Literal["base", "approximate"]
    iterations_share: float = Field(gt=0, le=1)
    threshold_percent: float = Field(gt=0, le=100)
    evidence: Literal["tensors", "selection", "defaults"]
    candidate_share: float = Field(gt=0, le=1)
    kept_keys: float = Field(ge=1)


class Preprocessing(Section):
    """Sorting the columns of a key matrix."""

    time: Literal["hidden", "charged"]
    per: Literal["key_matrix", "query"]
    compare_exchanges_per_cycle: int = Field(ge=1)


class Sram(Section):
    """Key, value and sorted-key memories, and how many heads they hold."""

    copies: int = Field(ge=1, le=2)
    key_kib: float = Field(gt=0)
    value_kib: float = Field(gt=0)
    sorted_kib: float = Field(gt=0)
    table_kib: float = Field(gt=0)


class A3Config(MachineConfig):
    """A machine file of kind `a3`."""

    kind: Literal["a3"]  # pyright: ignore[reportIncompatibleVariableOverride]
    numbers: Numbers
    pipeline: Pipeline
    search: Search
    preprocessing: Preprocessing
    sram: Sram
    dram: FlatMemory
    energy: EnergySource


class Work(NamedTuple):
    """Per head and query of a sequence (heads, q_len): keys seen, iterations, candidates, kept."""

    seen: Int64[np.ndarray, "heads q_len"]
    iterations: Int64[np.ndarray, "heads q_len"]
    candidates: Int64[np.ndarray, "heads q_len"]
    kept: Int64[np.ndarray, "heads q_len"]


class A3(Machine):
    """One A3 unit that runs heads one after another.

    Base: three modules of n + 9 cycles, so a query every n + 9 and 3n + 27 cycles of latency.
    Approximate: M iterations, C candidates and K kept keys take four modules, a query every
    max(M, C, K) + 9 and M + C + 2K + 36 cycles of latency. K and V are fetched whole either way.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic", "cycle")
    Config: ClassVar[type[MachineConfig]] = A3Config

    @property
    def settings(self) -> A3Config:
        """The checked machine file."""
        return cast("A3Config", self.config)

    @property
    def fixed_point(self) -> FixedPoint:
        """The format of queries, keys and values."""
        return FixedPoint(self.settings.numbers.integer_bits, self.settings.numbers.fraction_bits)

    def area(self) -> dict[str, float]:
        """Area in mm² (published total: 2.08)."""
        return self.table.area({"core": 1})

    def power(self) -> dict[str, float]:
        """Power in W, DRAM included, as the published comparison implies it."""
        return self.table.power({"core": 1})

    def blocks(self) -> list[Block]:
        """What the arithmetic and the memories are made of, for leakage and estimated area."""
        s, bits = self.settings, self.fixed_point.bits
        half = max(1, s.pipeline.multipliers // 2)
        found = [
            Block("dot_product", "multiply", half, bits),
            Block("dot_product", "add", half, 2 * bits),
            Block("exponent", "multiply", 1, 2 * bits),
            Block("exponent", "sram", 2, 2 * bits, s.sram.table_kib),
            Block("output", "multiply", half, max(bits, 2 * s.numbers.fraction_bits + 1)),
            Block("output", "add", half + 2 * bits, 3 * bits),
            Block("key_sram", "sram", s.sram.copies, half * bits, s.sram.key_kib),
            Block("value_sram", "sram", s.sram.copies, half * bits, s.sram.value_kib),
        ]
        if s.search.mode == "approximate":
            # One memory per column, none smaller than the smallest macro of the table.
            banks = max(1.0, s.sram.sorted_kib) * s.sram.copies
            found += [
                Block("search", "multiply", 2, bits),
                Block("search", "compare", 2 * (half - 1), 2 * bits),
                Block("sorted_sram", "sram", banks, 2 * bits, 1.0),
                Block("post_scoring", "compare", 1, 2 * bits),
            ]
        return found

    def roof(self) -> Roof:
        """Every multiplier busy, and the DRAM's bandwidth."""
        s = self.settings
        peak = 2e9 * s.pipeline.multipliers * s.clock_ghz
        return Roof(peak, 1e9 * s.dram.gbytes_per_second)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, tally = self.settings, Tally()
        for i, operator in enumerate(trace.workload.attention()):
            call = selection.calls[i]
            values = sampled(trace, i, operator) if self._looks else None
            for b in range(operator.batch):
                work = self._work(trace.workload, operator, call, b, values, tally)
                tally.stages += self._stages(operator, b, work, options.fidelity, tally)
        return core_report(
            self,
            trace,
            selection,
            options.fidelity,
            tally,
            memory=s.dram,
            energy=s.energy,
            blocks=self.blocks(),
            assumptions=self._assumptions(trace, selection, options.fidelity),
        )

    @property
    def _looks(self) -> bool:
        return self.settings.search.mode == "approximate" and (
            self.settings.search.evidence == "tensors"
        )

    def _work(
        self,
        workload: Workload,
        operator: Operator,
        call: AttentionCall,
        sequence: int,
        values: Sampled | None,
        tally: Tally,
    ) -> Work:
        search = self.settings.search
        shape = (operator.heads, operator.q_len)
        seen = np.broadcast_to(visible_counts(workload, operator, sequence), shape)
        if search.mode == "base":
            return Work(seen, np.zeros_like(seen), seen, seen)
        iterations = np.maximum(1, np.floor(search.iterations_share * seen)).astype(np.int64)
        if values is not None:
            return self._searched(workload, operator, sequence, values, seen, iterations)
        kept = np.full(shape, search.kept_keys)
        where = "defaults"
        if search.evidence == "selection":
            pairs = call.kept_pairs(operator, workload.padding_of(operator))[sequence]
            kept = np.broadcast_to((pairs / operator.q_len)[:, None], shape)
            where = "the pairs that the selection keeps, and candidates from defaults"
        elif search.evidence == "tensors":
            where = "defaults where the trace holds no queries, keys and values"
        tally.note(
            f"kept keys per query come from {where}: {search.candidate_share:g} of the keys are "
            f"candidates and {search.kept_keys:g} are kept by default"
        )
        candidates = np.maximum(search.candidate_share * seen, kept)
        whole = [np.clip(np.rint(part), 0, seen).astype(np.int64) for part in (candidates, kept)]
        return Work(seen, iterations, *whole)

    def _searched(
        self,
        workload: Workload,
        operator: Operator,
        sequence: int,
        values: Sampled,
        seen: Int64[np.ndarray, "heads q_len"],
        iterations: Int64[np.ndarray, "heads q_len"],
    ) -> Work:
        search, fixed = self.settings.search, self.fixed_point
        pairs = visible(workload, operator, sequence)
        candidates, kept = np.zeros_like(seen), np.zeros_like(seen)
        for h in range(operator.heads):
            query, key, _ = values.head(sequence, h)
            found = choose(
                quantise(query, fixed),
                quantise(key, fixed),
                pairs,
                iterations_share=search.iterations_share,
                threshold_percent=search.threshold_percent,
                number=fixed,
                scale=operator.head_dim**-0.5,
            )
            candidates[h], kept[h] = found.candidates, found.kept.sum(axis=1)
        return Work(seen, iterations, candidates, kept)

    def _stages(
        self, operator: Operator, sequence: int, work: Work, fidelity: Fidelity, tally: Tally
    ) -> list[Stage]:
        s = self.settings
        jobs = self.jobs(operator, work)
        self._count(operator, work, tally)
        if fidelity == "cycle":
            timing = cycle_by_cycle(jobs, s.sram.copies, s.pipeline.query_buffer)
        else:
            timing = closed_form(jobs, s.sram.copies)
        sums = [int(part.sum()) for part in work]
        facts = dict(zip(("visible", "iterations", "candidates", "kept"), sums, strict=True))
        at = partial(Stage, layer=operator.layer, step=operator.step, sequence=sequence)
        stages = [
            at(
                component="attention",
                cycles=timing.cycles,
                stall_cycles=timing.dram,
                stall_cause="dram" if timing.dram else "",
                facts={**facts, "drain_cycles": timing.drain},
            )
        ]
        compares = self._compares(operator)
        if compares and s.preprocessing.time == "charged":
            cycles = compares / s.preprocessing.compare_exchanges_per_cycle
            facts = {"compare_exchanges": compares}
            stages.insert(0, at(component="sorting", cycles=cycles, facts=facts))
        return stages

    def jobs(self, operator: Operator, work: Work) -> Jobs:
        """The queries of a call and how long each module takes for each."""
        s = self.settings
        # A module is half of the multipliers wide; wider heads take several cycles per row.
        beats = -(-operator.head_dim // max(1, s.pipeline.multipliers // 2))
        parts = [work.seen] * 3
        if s.search.mode == "approximate":
            parts = [work.iterations, work.candidates, work.kept, work.kept]
        service = np.stack([part.reshape(-1) for part in parts]) * beats
        service = np.maximum(1, service + s.pipeline.module_overhead_cycles)
        per_cycle = s.dram.bytes_per_cycle(s.clock_ghz)
        kv, query = self._bytes(operator)
        return Jobs(
            service.astype(np.int64),
            np.repeat(np.arange(operator.heads), operator.q_len),
            max(1, int(np.ceil(kv / per_cycle))),
            max(1, int(np.ceil(query / per_cycle))),
        )

    def _bytes(self, operator: Operator) -> tuple[float, float]:
        """Bytes of a head's keys and values, and of a query with its output."""
        width = self.fixed_point.bits / 8
        both = operator.head_dim + operator.value_dim
        return operator.kv_len * both * width, both * width

    def _compares(self, operator: Operator) -> int:
        """Compare-exchanges of the sorting in one sequence of a call."""
        s = self.settings
        if s.search.mode == "base":
            return 0
        sorts = operator.heads * (operator.q_len if s.preprocessing.per == "query" else 1)
        return sorts * bitonic_compares(operator.kv_len, operator.head_dim)

    def _count(self, operator: Operator, work: Work, tally: Tally) -> None:
        d, dv, heads = operator.head_dim, operator.value_dim, operator.heads
        bits = self.fixed_point.bits
        wide = 2 * bits + max(1, int(d - 1).bit_length())
        iterations, candidates, kept = (float(part.sum()) for part in work[1:])
        weight = 2 * self.settings.numbers.fraction_bits + 1
        kv, query = self._bytes(operator)
        compares = self._compares(operator)
        if compares:
            entry = bits + max(1, int(operator.kv_len - 1).bit_length())
            tally.act("sorting", "compare", compares, bits)
            sorts = compares / bitonic_compares(operator.kv_len, d)
            for op in ("sram_read", "sram_write"):
                tally.act("sorting", op, sorts * operator.kv_len * d, entry, 1.0)
            # Two products and two comparisons over all columns per iteration.
            tally.act("search", "multiply", 2 * iterations, bits)
            tally.act("search", "compare", 2 * iterations * (d - 1), 2 * bits)
            tally.act("search", "add", 2 * iterations, wide)
            tally.act("search", "sram_read", 2 * iterations, entry, 1.0)
            tally.act("post_scoring", "compare", candidates, wide)
        sram, sizes = self.settings.sram, operator.kv_len * bits / 8192
        key_kib, value_kib = max(sram.key_kib, sizes * d), max(sram.value_kib, sizes * dv)
        tally.act("dot_product", "multiply", candidates * d, bits)
        tally.act("dot_product", "add", candidates * d, wide)
        # Two table entries and their product; the quotient is as many subtractions as bits.
        tally.act("exponent", "sram_read", 2 * kept, 2 * bits, sram.table_kib)
        tally.act("exponent", "multiply", kept, 2 * bits)
        tally.act("exponent", "add", kept, wide)
        tally.act("output", "add", kept * 2 * bits, 2 * bits)
        tally.act("output", "multiply", kept * dv, max(bits, weight))
        tally.act("output", "add", kept * dv, 3 * bits)
        tally.act("key_sram", "sram_write", operator.kv_len * heads, d * bits, key_kib)
        tally.act("key_sram", "sram_read", candidates, d * bits, key_kib)
        tally.act("value_sram", "sram_write", operator.kv_len * heads, dv * bits, value_kib)
        tally.act("value_sram", "sram_read", kept, dv * bits, value_kib)
        tally.act("dram", "dram_read", (kv + query / 2 * operator.q_len) * heads, 8)
        tally.act("dram", "dram_write", query / 2 * operator.q_len * heads, 8)
        moved = (kv + query * operator.q_len) * heads
        tally.dram_bytes += moved
        tally.useful_bytes += moved
        tally.operations += 2 * (candidates * d + kept * dv)
        beats = -(-d // max(1, self.settings.pipeline.multipliers // 2))
        for name, rows in (("search", iterations), ("dot_product", candidates), ("output", kept)):
            tally.busy[name] = tally.busy.get(name, 0.0) + rows * beats

    def _assumptions(
        self, trace: Trace, selection: Selection, fidelity: Fidelity
    ) -> tuple[str, ...]:
        s = self.settings
        found = [
            "one unit, heads one after another; a call starts when the one before has left the "
            "pipeline",
            "keys and values of a head are fetched whole, whatever is kept, at "
            f"{s.dram.gbytes_per_second:g} GB/s, "
            + (
                "after the head before has left" if s.sram.copies == 1 else "behind the head before"
            ),
            "the key and value memories hold a whole head, also beyond the published 320 rows",
            f"operands have {s.numbers.integer_bits}.{s.numbers.fraction_bits} bits, in DRAM too",
        ]
        if fidelity == "analytic":
            found.append("a query takes as long as its slowest module; buffers could hide more")
        if s.search.mode == "base":
            found.append("every key that causality and padding allow is scored")
        else:
            hidden = s.preprocessing.time == "hidden"
            each = "query" if s.preprocessing.per == "query" else "head and call"
            found.append(
                f"keys are sorted once per {each}; sorting "
                + ("is counted and costs no time" if hidden else "comes before the call")
            )
            if any(operator.is_causal for operator in trace.workload.attention()):
                found.append("keys that a query may not see are passed over in the search for free")
        if s.search.mode == "base" or s.search.evidence != "selection":
            found.append(f"selection {selection.name!r} is not followed: A3 chooses by itself")
        return tuple(found)
