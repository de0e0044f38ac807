"""A dense accelerator with and without static regions (after Dai et al. 2023; design ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, cast

import numpy as np

from sparseloom.hardware.attention_core import number
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Events, Fidelity, Report, Stage
from sparseloom.hardware.static_dense import cycle, systolic
from sparseloom.hardware.static_dense.analytic import head_cycles
from sparseloom.hardware.static_dense.assumptions import assumptions
from sparseloom.hardware.static_dense.config import StaticDenseConfig
from sparseloom.hardware.static_dense.counts import Counts, add, head_counts, product_counts
from sparseloom.hardware.static_dense.heads import call_heads, valid_keys
from sparseloom.hardware.static_dense.lowering import HeadSize, Passes, lower
from sparseloom.hardware.static_dense.runs import HeadRuns
from sparseloom.hardware.static_dense.units import CAUSES
from sparseloom.regions import TILE_KEYS, TILE_QUERIES
from sparseloom.trace import AttentionCall, Operator, Selection, Trace, Workload
from sparseloom.trace.kept_keys import with_keys

_ROLES = {
    "core": (),
    "mha": ("qkv", "attention_output"),
    "model": ("qkv", "attention_output", "ffn", "head", "other"),
}


class _Head(NamedTuple):
    runs: HeadRuns
    work: Passes
    counts: Counts
    cycles: float


@dataclass
class _Tally:
    """What a simulation adds up."""

    stages: list[Stage] = field(default_factory=list[Stage])
    counts: Counts = field(default_factory=dict[str, float])
    units: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    intervals: list[np.ndarray] = field(default_factory=list[np.ndarray])
    dropped: int = 0
    simulated: int = 0
    dram_bytes: float = 0.0
    array_cycles: float = 0.0
    worked: float = 0.0
    kept: float = 0.0
    grid: float = 0.0
    chunked: int = 0


class StaticDense(Machine):
    """Heads one after another on one PE or several, query tiles dealt to them by their cost.

    A selection with regions, or any mask, is followed tile by tile; without one the machine is the
    dense accelerator that it extends.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic", "cycle")
    logged: ClassVar[tuple[Fidelity, ...]] = ("cycle",)
    Config: ClassVar[type[MachineConfig]] = StaticDenseConfig

    @property
    def settings(self) -> StaticDenseConfig:
        """The checked machine file."""
        return cast("StaticDenseConfig", self.config)

    @property
    def descriptor_bytes(self) -> int:
        """Descriptor RAM of a PE: two copies of a layer's words of 64 bits (1.5 KiB)."""
        sequencer = self.settings.sequencer
        return 2 * sequencer.heads_held * sequencer.max_descriptors * 8

    def units(self) -> dict[str, int]:
        """Units of the energy table's modules: multiply-accumulates, bits, gates, µm²."""
        s, there = self.settings, int(self.settings.sequencer.present)
        known = self.table.modules
        # The maximum of a run is kept per row; a weight-stationary array, whose keys are the outer
        # loop, keeps maximum and sum of every row of 512.
        tags = TILE_QUERIES * 8 * s.sequencer.run_fifo if s.array == "vector" else 512 * 24
        found = {
            "base": s.macs_per_cycle * s.pes,
            "descriptor_ram": self.descriptor_bytes * 8 * s.pes * there,
            "sequencer": known["sequencer"].units * s.pes * there,
            "pooling": known["pooling"].units * s.pes * there,
            "run_tags": tags * s.pes * there,
            "compaction": known["compaction"].units * s.pes * there,
        }
        inside = sum(area for name, area in self.table.area(found).items() if name != "base")
        return {**found, "wiring": round(inside * 1e6)}

    def area(self) -> dict[str, float]:
        """Area by module in mm²: the base's anchor, and an estimate of the extension."""
        return self.table.area(self.units())

    def area_overhead(self) -> float:
        """The extension over the base (published total: 0.026)."""
        area = self.area()
        return (sum(area.values()) - area["base"]) / area["base"]

    def power(self) -> dict[str, float]:
        """Power by module in W with everything busy."""
        return self.table.power(self.units())

    def roof(self) -> Roof:
        """Every multiplier busy, and the bandwidth of DRAM."""
        s = self.settings
        peak = 2e9 * s.macs_per_cycle * s.pes * s.clock_ghz
        return Roof(peak, 1e9 * s.scope.dram_gbytes_per_second)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, workload = self.settings, trace.workload
        tally, known = _Tally(), dict[object, _Head]()
        counted = any(not call.knows_keys for call in selection.calls)
        if counted and s.sequencer.present:
            # The model is uniform: no key is likelier than another, which aligns badly with tiles.
            selection = with_keys(trace, selection.name, seed=options.seed)
        sequences = max((op.batch for op in workload.operators), default=1)
        for sequence in range(sequences):
            calls = iter(selection.calls)
            for operator in workload.operators:
                call = next(calls) if operator.is_attention else None
                if sequence >= operator.batch:
                    continue
                if call is not None:
                    self._attention(workload, operator, call, sequence, options, tally, known)
                elif operator.kind == "gemm" and operator.role in _ROLES[s.scope.work]:
                    self._product(operator, sequence, tally)
        found = self._report(trace, selection, options, tally)
        if not counted or not s.sequencer.present:
            return found
        said = f"the trace counts kept keys without naming them: drawn evenly, seed {options.seed}"
        return replace(found, seed=options.seed, assumptions=(*found.assumptions, said))

    def _attention(
        self,
        workload: Workload,
        operator: Operator,
        call: AttentionCall,
        sequence: int,
        options: Options,
        tally: _Tally,
        known: dict[object, _Head],
    ) -> None:
        s = self.settings
        n_valid = valid_keys(workload, operator, sequence)
        runs = call_heads(operator, call, sequence, n_valid, follow=s.sequencer.present)
        size = HeadSize(operator.q_len, operator.kv_len, operator.head_dim, operator.value_dim)
        heads = [self._head(one, size, known) for one in runs]
        for head in heads:
            add(tally.counts, head.counts)
        tiles = sum(int(head.work.tiles.sum()) for head in heads)
        rows = sum(int(head.runs.descriptors > 0) * int(head.work.runs.sum()) for head in heads)
        cycles = sum(head.cycles for head in heads)
        if options.fidelity == "cycle":
            cycles = self._stepped(heads, size, options, tally)
        moved = (operator.q_len + operator.kv_len) * (size.head_dim + size.value_dim) * len(heads)
        wait = self._dram(moved, cycles, tally)
        grid = sum(head.runs.query_tiles * head.runs.key_tiles for head in heads)
        facts: dict[str, float | int | str] = {
            "heads": len(heads),
            "tiles": tiles,
            "grid": grid,
            "runs": rows,
            "passes": sum(head.work.count for head in heads),
        }
        tally.grid += grid
        tally.worked += tiles * TILE_QUERIES * TILE_KEYS
        kept = call.kept_pairs(operator, workload.padding_of(operator))
        tally.kept += float(kept[sequence].sum())
        tally.chunked += any(int(head.work.chunk.max(initial=0)) > 0 for head in heads)
        tally.stages.append(_stage("attention", operator, sequence, cycles, wait, facts))

    def _head(self, runs: HeadRuns, size: HeadSize, known: dict[object, _Head]) -> _Head:
        """Cost of a head; equal ones are worked out once."""
        key = (runs.key, size)
        if key not in known:
            s = self.settings
            work = lower(s, runs, size)
            closed = systolic.head_cycles if s.array == "systolic" else head_cycles
            known[key] = _Head(
                runs, work, head_counts(s, runs, work, size), closed(s, runs, work, size)
            )
        return known[key]

    def _stepped(
        self, heads: list[_Head], size: HeadSize, options: Options, tally: _Tally
    ) -> float:
        """Cycles of a call, stepped; the log goes into the tally."""
        s = self.settings
        some = [(head.runs, head.work) for head in heads if head.work.count]
        if not some:
            return 0.0
        window = (0, 0)
        if options.window is not None:
            window = (
                max(0, options.window[0] - tally.simulated),
                max(0, options.window[1] - tally.simulated),
            )
        module = systolic if s.array == "systolic" else cycle
        found = module.run(s, some, size, window)
        for unit, row in zip(module.unit_names(s.pes), found.log.totals.tolist(), strict=True):
            codes = tally.units.setdefault(unit, {})
            for cause, cycles in zip(CAUSES, row, strict=True):
                if cycles:
                    codes[cause] = codes.get(cause, 0) + cycles
        intervals = found.log.intervals[: int(found.log.limits[0])].copy()
        intervals[:, 2:4] += tally.simulated
        tally.intervals.append(intervals)
        tally.dropped += int(found.log.limits[1])
        tally.simulated += found.cycles
        return float(found.cycles)

    def _product(self, operator: Operator, sequence: int, tally: _Tally) -> None:
        """A matrix product on the dense array, which no selection changes."""
        s = self.settings
        add(tally.counts, product_counts(s, operator))
        if s.array == "systolic":
            cycles = systolic.product_cycles(s, operator)
        else:
            v = s.vector
            blocks = -(-operator.inner // v.vector_width) * -(-operator.columns // v.lanes)
            tiles = math.ceil(math.ceil(operator.rows / v.latches) / s.pes)
            cycles = float(tiles * v.latches * blocks)
        wait = self._dram(operator.inner * operator.columns, cycles, tally)
        tally.stages.append(_stage("linear", operator, sequence, cycles, wait, {}))

    def _dram(self, moved: float, cycles: float, tally: _Tally) -> float:
        """Count bytes of DRAM; the cycles by which they take longer than the arithmetic."""
        s = self.settings
        if not s.scope.dram:
            return 0.0
        tally.dram_bytes += moved
        return max(0.0, moved * s.clock_ghz / s.scope.dram_gbytes_per_second - cycles)

    def _report(
        self, trace: Trace, selection: Selection, options: Options, tally: _Tally
    ) -> Report:
        s = self.settings
        cycles = sum(stage.cycles for stage in tally.stages)
        counts = {**tally.counts, "idle_ns": cycles / s.clock_ghz * s.pes}
        width = {"dram_byte": s.scope.dram_pj_per_byte / self.table.events_pj["dram_byte"]}
        if s.scope.dram:
            counts["dram_byte"] = tally.dram_bytes
        macs = counts.get("mac_int8", 0.0) + counts.get("mac_int4", 0.0)
        events = None
        if options.window is not None:
            module = systolic if s.array == "systolic" else cycle
            found = tally.intervals or [np.zeros((0, 5), np.int64)]
            events = Events(
                module.unit_names(s.pes),
                CAUSES,
                np.concatenate(found),
                options.window,
                tally.dropped,
                tags="pass",
                component="attention",
            )
        return Report(
            machine=self.name,
            trace=trace.workload.name,
            selection=selection.name,
            scope="model" if s.scope.work == "model" else "attention",
            fidelity=options.fidelity,
            clock_ghz=s.clock_ghz,
            stages=tuple(tally.stages),
            energy=self.table.joules(counts, {}, width=width),
            energy_table=self.table.name,
            area=self.area(),
            actions=counts,
            utilisation={
                "mac": macs / (cycles * s.macs_per_cycle * s.pes) if cycles else 0.0,
                "tiles": tally.worked / (tally.grid * TILE_QUERIES * TILE_KEYS or 1),
                "dram": min(
                    1.0,
                    tally.dram_bytes * s.clock_ghz / s.scope.dram_gbytes_per_second / (cycles or 1),
                ),
            },
            dram_preset=f"flat_{s.scope.dram_gbytes_per_second:g}" if s.scope.dram else "none",
            dram_bytes=round(tally.dram_bytes),
            useful_bytes=round(tally.dram_bytes),
            config_hash=self.config_hash,
            assumptions=assumptions(
                s, trace, selection, options.fidelity, tally.worked, tally.kept, tally.chunked
            ),
            value=number(selection.quality, "value"),
            dense_value=number(selection.quality, "dense_value"),
            operations=2 * macs,
            unit_cycles=tally.units,
            events=events,
        )


def _stage(
    component: str,
    operator: Operator,
    sequence: int,
    cycles: float,
    wait: float,
    facts: dict[str, float | int | str],
) -> Stage:
    return Stage(
        component=component,
        cycles=cycles + wait,
        layer=operator.layer,
        step=operator.step,
        sequence=sequence,
        stall_cycles=wait,
        stall_cause="dram" if wait else "",
        facts=facts,
    )
