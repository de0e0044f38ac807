"""What a simulation found: cycles, energy, area, stalls, and the stages behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any, Literal

import numpy as np

from sparseloom.hardware import timeline
from sparseloom.results import results

Fidelity = Literal["analytic", "cycle", "rtl"]


@dataclass(frozen=True)
class Stage:
    """A stretch of time in which one kind of work ran, on one sequence.

    Args:
        component: the kind of work.
        cycles: how long it took, stalls included.
        stall_cycles: how much of it was waiting, and `stall_cause` for what.
        layer, step, sequence: where in the workload it belongs.
        facts: what the timeline shows beside it.
    """

    component: str
    cycles: float
    layer: int | None = None
    step: int = 0
    sequence: int = 0
    stall_cycles: float = 0.0
    stall_cause: str = ""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Events:
    """Intervals of the event log inside a window: what each unit did, for what, and when.

    Args:
        units, causes: names of the numbers in `intervals`.
        intervals: (n, 5) int64: unit, cause, first cycle, one past the last, tag (−1: none).
        window: first cycle and one past the last.
        dropped: intervals that did not fit.
        tags: what a tag stands for.
        component: the kind of stage whose cycles are counted here; None: every kind. Stages in
            closed form that lie between simulated ones have no place on this axis.
    """

    units: tuple[str, ...]
    causes: tuple[str, ...]
    intervals: np.ndarray
    window: tuple[int, int]
    dropped: int = 0
    tags: str = "row"
    component: str | None = None


@dataclass(frozen=True)
class Report:
    """One selection of a trace on one machine.

    Args:
        machine, trace, selection: names.
        scope: "model" where the trace lists every operator, "attention" where only attention.
        stages: in the order in which they ran; nothing overlaps.
        energy: joules by component; their sum is `total_energy`.
        area: mm² by module; their sum is `total_area`.
        actions: counts of events behind the energy ("idle …" for clock-gated ones).
        utilisation: shares in [0, 1] by unit.
        dram_bytes, useful_bytes: bytes moved, and bytes of those that were needed.
        assumptions: what the numbers rest on, as sentences.
        row_hits: share of DRAM reads that found their row open, where rows are modelled.
        seed: of whatever a run draws, such as pivots.
        operations: arithmetic of the machine's large arrays, a multiply-accumulate counting as
            two; None where the machine does not count it.
        unit_cycles: cycles of each unit by what it did ("busy", "idle", or the cause it waited
            for), at cycle fidelity; they add up to the cycles that were simulated.
        events: what the units did in a window of cycles, for the timeline.
    """

    machine: str
    trace: str
    selection: str
    scope: Literal["model", "attention"]
    fidelity: Fidelity
    clock_ghz: float
    stages: tuple[Stage, ...]
    energy: Mapping[str, float]
    energy_table: str
    area: Mapping[str, float]
    actions: Mapping[str, float]
    utilisation: Mapping[str, float]
    dram_preset: str
    dram_bytes: int
    useful_bytes: int
    config_hash: str
    assumptions: tuple[str, ...]
    value: float | int | None = None
    dense_value: float | int | None = None
    row_hits: float | None = None
    seed: int | None = None
    operations: float | None = None
    unit_cycles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    events: Events | None = None

    @cached_property
    def components(self) -> dict[str, float]:
        """Cycles by kind of work."""
        found: dict[str, float] = {}
        for stage in self.stages:
            found[stage.component] = found.get(stage.component, 0.0) + stage.cycles
        return found

    @property
    def cycles(self) -> int:
        """Cycles of everything, one sequence after another, rounded up."""
        return _ceil(sum(stage.cycles for stage in self.stages))

    @property
    def latency_cycles(self) -> int:
        """Cycles of the slowest sequence alone, rounded up."""
        found: dict[int, float] = {}
        for stage in self.stages:
            found[stage.sequence] = found.get(stage.sequence, 0.0) + stage.cycles
        return _ceil(max(found.values(), default=0.0))

    @property
    def seconds(self) -> float:
        """`cycles` at the machine's clock."""
        return self.cycles / (self.clock_ghz * 1e9)

    @property
    def stalls(self) -> dict[str, int]:
        """Cycles lost, by cause; empty where nothing waited or waiting is not modelled.

        At cycle fidelity they are summed over the units, several of which wait at a time.
        """
        found: dict[str, float] = {}
        for codes in self.unit_cycles.values():
            for cause, cycles in codes.items():
                if cause not in ("busy", "idle"):
                    found[cause] = found.get(cause, 0.0) + cycles
        for stage in self.stages:
            if stage.stall_cycles > 0:
                found[stage.stall_cause] = found.get(stage.stall_cause, 0.0) + stage.stall_cycles
        return {cause: _ceil(lost) for cause, lost in found.items()}

    @property
    def total_energy(self) -> float:
        """Joules."""
        return math.fsum(self.energy.values())

    @property
    def total_area(self) -> float:
        """Square millimetres."""
        return math.fsum(self.area.values())

    def rows(self) -> list[dict[str, Any]]:
        """The report as one row of the results schema (`simulate`)."""
        return [
            {
                "machine": self.machine,
                "trace": self.trace,
                "selection": self.selection,
                "value": self.value,
                "dense_value": self.dense_value,
                "scope": self.scope,
                "fidelity": self.fidelity,
                "cycles": self.cycles,
                "latency_cycles": self.latency_cycles,
                "seconds": self.seconds,
                "cycles_by_stage": self.components,
                "energy_j": dict(self.energy),
                "energy_total_j": self.total_energy,
                "energy_table": self.energy_table,
                "area_mm2": self.total_area,
                "dram_preset": self.dram_preset,
                "dram_bytes": self.dram_bytes,
                "useful_bytes": self.useful_bytes,
                "row_hits": self.row_hits,
                "operations": self.operations,
                "utilisation": dict(self.utilisation),
                "stalls": self.stalls,
                "unit_cycles": {unit: dict(codes) for unit, codes in self.unit_cycles.items()},
                "config_hash": self.config_hash,
                "seed": self.seed,
                "assumptions": list(self.assumptions),
            }
        ]

    def to_json(self, *, command: str | None = None) -> str:
        """The report as the text of a results file."""
        return results(self.rows(), command=command).to_json()

    def to_perfetto(self, path: str | PathLike[str]) -> None:
        """Write a timeline that ui.perfetto.dev and chrome://tracing open.

        It holds the stages, or, where events were kept, their window and a track for every unit.
        The file is compressed where its name ends in `.gz`.
        """
        stages, only = self.stages, self.events and self.events.component
        if only is not None:
            stages = tuple(stage for stage in stages if stage.component == only)
        timeline.write(path, self.machine, self.clock_ghz, stages, self.events)


def _ceil(cycles: float) -> int:
    """Whole cycles; sums of exact fractions must not gain one from rounding error."""
    return math.ceil(cycles - 1e-9 * max(1.0, cycles))
