"""DOTA as a machine: a trace in, a report out, in closed form or cycle by cycle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np

from sparseloom.hardware.attention_core import number
from sparseloom.hardware.dota import state as st
from sparseloom.hardware.dota.accelerator import Accelerator, same_input
from sparseloom.hardware.dota.assumptions import assumptions
from sparseloom.hardware.dota.closed_form import Cost, operator_costs
from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.dota.groups import Lowering
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Events, Fidelity, Report, Stage
from sparseloom.trace import Operator, Selection, Trace, Workload
from sparseloom.trace.index_models import Uniform
from sparseloom.trace.kept_keys import with_keys


@dataclass
class _Found:
    """What a run left, at either fidelity. stages: of the accelerator that ends last."""

    stages: list[Stage]
    costs: list[Cost]
    cycles: float
    dram_bytes: float
    useful_bytes: float
    busy: dict[str, float]
    unit_cycles: dict[str, dict[str, int]] = field(default_factory=dict)
    events: Events | None = None


class Dota(Machine):
    """Four Lanes that detect weak attentions in low precision and omit them.

    The closed form charges every stage at ideal utilisation, one after another. Cycle by cycle,
    groups of queries pass detector, scheduler, array and softmax, operands stream from DRAM, and
    what waits says for what. Each accelerator runs one sequence at a time.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic", "cycle")
    logged: ClassVar[tuple[Fidelity, ...]] = ("cycle",)
    Config: ClassVar[type[MachineConfig]] = DotaConfig

    @property
    def settings(self) -> DotaConfig:
        """The checked machine file."""
        return cast("DotaConfig", self.config)

    def units(self) -> dict[str, int]:
        """How many of its units each module of the energy table has here."""
        s = self.settings
        per_accelerator = {
            "rmmu": s.lanes * s.rmmu.elements,
            "detector": s.lanes * s.detector.parallel_queries,
            "mfu": s.lanes * s.mfu.exponentials_per_cycle,
            "accumulator": s.accumulator.additions_per_cycle,
            "sram": s.lanes * s.sram.kib_per_lane,
        }
        return {name: s.accelerators * count for name, count in per_accelerator.items()}

    def area(self) -> dict[str, float]:
        """Area by module in mm² (published total of one accelerator: 4.44)."""
        return self.table.area(self.units())

    def power(self) -> dict[str, float]:
        """Power by module in W with everything busy (published total of one: 3.02)."""
        return self.table.power(self.units())

    def roof(self) -> Roof:
        """Every element of every Lane busy at full precision, and the DRAM's bandwidth."""
        s = self.settings
        elements = s.accelerators * s.lanes * s.rmmu.elements
        return Roof(2e9 * elements * s.clock_ghz, 1e9 * s.dram.gbytes_per_second)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, workload = self.settings, trace.workload
        seed, cycle = None, options.fidelity == "cycle"
        if cycle and _counts_only(selection):
            seed = options.seed
            drawn = {**trace.selections, selection.name: selection}
            selection = with_keys(
                Trace(workload, drawn, trace.tensors), selection.name, Uniform(), seed=seed
            )
        if cycle:
            found = self._stepped(workload, selection, options)
        else:
            found = self._closed(workload, selection)
        busy, idle = self._actions(found)
        energy = self.table.joules(busy, idle, width=self._widths())
        energy["sram_leakage"] = self.power()["sram"] * found.cycles / (s.clock_ghz * 1e9)
        moved = round(found.dram_bytes)
        exact = (cost.pe_cycles for cost in found.costs if cost.component != "detection")
        return Report(
            machine=self.name,
            trace=workload.name,
            selection=selection.name,
            scope=workload.scope,
            fidelity=options.fidelity,
            clock_ghz=s.clock_ghz,
            stages=tuple(found.stages),
            energy=energy,
            energy_table=self.table.name,
            area=self.area(),
            actions={**busy, **{f"idle {name}": count for name, count in idle.items()}},
            utilisation=self._utilisation(found, moved / s.bytes_per_cycle),
            dram_preset=s.dram.preset,
            dram_bytes=moved,
            useful_bytes=min(moved, round(found.useful_bytes)),
            config_hash=self.config_hash,
            assumptions=assumptions(s, workload, selection, options.fidelity, seed),
            value=number(selection.quality, "value"),
            dense_value=number(selection.quality, "dense_value"),
            seed=seed,
            operations=2 * sum(exact),
            unit_cycles=found.unit_cycles,
            events=found.events,
        )

    def _closed(self, workload: Workload, selection: Selection) -> _Found:
        """Every stage by its formula."""
        s = self.settings
        sharing = min(s.accelerators, _sequences(workload))
        bytes_per_cycle = s.bytes_per_cycle / sharing
        calls = iter(selection.calls)
        stages: list[list[Stage]] = [[] for _ in range(sharing)]
        costs: list[Cost] = []
        known: dict[tuple[Operator, int, bool], list[list[Cost]]] = {}
        before: Operator | None = None
        for operator in workload.operators:
            call = next(calls) if operator.is_attention else None
            # Layers of equal sizes cost the same, unless their masks differ.
            shared = same_input(before, operator)
            before = operator
            alike = (operator.model_copy(update={"layer": None, "step": 0}), id(call), shared)
            if alike not in known:
                known[alike] = operator_costs(s, workload, operator, call, input_is_here=shared)
            for sequence, parts in enumerate(known[alike]):
                for cost in parts:
                    costs.append(cost)
                    if cost.component == "hidden":
                        continue
                    wait = max(0.0, cost.dram_bytes / bytes_per_cycle - cost.cycles)
                    wait = wait if s.closed_form.memory == "bandwidth" else 0.0
                    stages[sequence % sharing].append(
                        Stage(
                            component=cost.component,
                            cycles=cost.cycles + wait,
                            layer=operator.layer,
                            step=operator.step,
                            sequence=sequence,
                            stall_cycles=wait,
                            stall_cause="dram" if wait else "",
                            facts=cost.facts,
                        )
                    )
        slowest = max(stages, key=_cycles)
        # One sequence at a time: a stable sort keeps the operators of each in order.
        slowest.sort(key=lambda stage: stage.sequence)
        moved = sum(cost.dram_bytes for cost in costs)
        busy = {
            "mfu_cycle": sum(cost.mfu_cycles for cost in costs),
            "detector_cycle": sum(cost.detector_cycles for cost in costs),
            "accumulator_cycle": sum(cost.accumulator_cycles for cost in costs),
        }
        return _Found(slowest, costs, _cycles(slowest), moved, moved, busy)

    def _stepped(self, workload: Workload, selection: Selection, options: Options) -> _Found:
        """Every accelerator cycle by cycle; the log is that of the one that ends last."""
        s = self.settings
        sequences = _sequences(workload)
        sharing = min(s.accelerators, sequences)
        lowering = Lowering(s, workload.model.hidden_size)
        window = options.window or (0, 0)
        ran = [
            Accelerator(s, workload, selection, lowering, sharing=sharing, window=window)
            for _ in range(sharing)
        ]
        for sequence in range(sequences):
            ran[sequence % sharing].run(sequence)
        slowest = max(ran, key=lambda one: one.now)
        for one in ran:
            one.close(slowest.now)
        names = st.units(s.lanes)
        log, events = slowest.log, None
        if options.window is not None:
            stored = log.intervals[: int(log.limits[0])]
            events = Events(
                names, st.CAUSES, stored, options.window, int(log.limits[1]), tags="work"
            )
        busy: dict[str, float] = {}
        for one in ran:
            for event, cycles in one.busy().items():
                busy[event] = busy.get(event, 0.0) + cycles
        return _Found(
            slowest.tally.stages,
            [cost for one in ran for cost in one.tally.costs],
            slowest.now,
            sum(one.tally.dram_bytes for one in ran),
            sum(one.tally.useful_bytes for one in ran),
            busy,
            _unit_cycles(names, log.totals),
            events,
        )

    def _actions(self, found: _Found) -> tuple[dict[str, float], dict[str, float]]:
        """Events by the names of the energy table: busy, and idle but clock-gated."""
        s = self.settings
        busy = {"rmmu_pe_cycle": sum(cost.pe_cycles for cost in found.costs), **found.busy}
        slots = {
            "rmmu_pe_cycle": s.lanes * s.rmmu.elements,
            "mfu_cycle": s.lanes,
            "detector_cycle": s.lanes,
            "accumulator_cycle": 1,
        }
        total = found.cycles * s.accelerators
        idle = {name: max(0.0, total * slots[name] - count) for name, count in busy.items()}
        busy["sram_bit"] = 8 * sum(cost.sram_bytes for cost in found.costs)
        busy["dram_bit"] = 8 * found.dram_bytes
        return busy, idle

    def _widths(self) -> dict[str, float]:
        """How much wider than in the table the units behind a per-cycle event are."""
        s, modules = self.settings, self.table.modules
        return {
            "mfu_cycle": s.mfu.exponentials_per_cycle / modules["mfu"].units,
            "detector_cycle": s.detector.parallel_queries / modules["detector"].units,
            "accumulator_cycle": s.accumulator.additions_per_cycle / modules["accumulator"].units,
        }

    def _utilisation(self, found: _Found, dram_cycles: float) -> dict[str, float]:
        s = self.settings
        total = found.cycles * s.accelerators
        peak = s.lanes * s.rmmu.elements
        kept = sum(cost.pe_cycles for cost in found.costs if cost.component == "attention")
        attention = [stage for stage in found.stages if stage.component == "attention"]
        shares = {
            "rmmu": (sum(cost.pe_cycles for cost in found.costs), total * peak),
            "rmmu_attention": (kept, _cycles(attention) * s.accelerators * peak),
            "mfu": (found.busy["mfu_cycle"], total * s.lanes),
            "accumulator": (found.busy["accumulator_cycle"], total),
            "dram": (dram_cycles, found.cycles),
        }
        return {name: used / of if of else 0.0 for name, (used, of) in shares.items()}


def _cycles(stages: Iterable[Stage]) -> float:
    return sum(stage.cycles for stage in stages)


def _sequences(workload: Workload) -> int:
    return max((operator.batch for operator in workload.operators), default=1)


def _counts_only(selection: Selection) -> bool:
    return any(not call.knows_keys or call.value_counts is not None for call in selection.calls)


def _unit_cycles(names: tuple[str, ...], totals: np.ndarray) -> dict[str, dict[str, int]]:
    """Cycles of each unit by what it did."""
    return {
        name: {cause: int(spent) for cause, spent in zip(st.CAUSES, row, strict=True) if spent}
        for name, row in zip(names, totals, strict=True)
    }
