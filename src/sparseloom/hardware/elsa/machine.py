"""The ELSA machine: units that run heads, with the counts, energy and area of what they do."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import numpy as np

from sparseloom.hardware.actions import Block
from sparseloom.hardware.attention_core import EnergySource, Priced, Tally, core_report
from sparseloom.hardware.elsa.config import ElsaConfig
from sparseloom.hardware.elsa.costs import (
    blocks,
    count,
    modules,
    moved_bytes,
    published_energy,
    static_power,
)
from sparseloom.hardware.elsa.jobs import Candidates, hasher_of
from sparseloom.hardware.elsa.pipeline import (
    CAUSES,
    Timing,
    closed_form,
    cycle_by_cycle,
    make_unit_log,
    rates,
    units_of,
)
from sparseloom.hardware.engine.log import IDLE, Log, close
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Events, Fidelity, Report, Stage
from sparseloom.trace import Operator, Selection, Trace

_BOUNDS = ("hash", "selection", "attention", "division")


class Elsa(Machine):
    """ELSA: heads one after another on each of `units` units.

    Before a head all keys are hashed, 3·(n + 1) cycles; then a query takes
    max(3, n / (P_a · P_c), the most candidates of a bank, 4) cycles (64 numbers, 256 hash and 16
    division multipliers).  At cycle fidelity selectors, arbiters, banks and buffers are stepped.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic", "cycle")
    logged: ClassVar[tuple[Fidelity, ...]] = ("cycle",)
    Config: ClassVar[type[MachineConfig]] = ElsaConfig

    @property
    def settings(self) -> ElsaConfig:
        """The checked machine file."""
        return cast("ElsaConfig", self.config)

    def area(self) -> dict[str, float]:
        """Area in mm² of all units with their external memories."""
        return self.area_for(self.settings.memory.keys)

    def area_for(self, keys: int) -> dict[str, float]:
        """Area in mm² with memories of so many keys, at least those configured."""
        sizes = modules(self.settings, keys)
        return self.table.area({name: size * self.settings.units for name, size in sizes.items()})

    def power(self) -> dict[str, float]:
        """Power in W, everything busy: dynamic and static."""
        dynamic, static = self.dynamic_power(), self.static_power()
        return {name: watts + static[name] for name, watts in dynamic.items()}

    def dynamic_power(self) -> dict[str, float]:
        """Dynamic power in W, everything busy."""
        sizes = modules(self.settings, self.settings.memory.keys)
        return self.table.power({name: size * self.settings.units for name, size in sizes.items()})

    def static_power(self) -> dict[str, float]:
        """Static power in W."""
        return static_power(self.settings, self.table, self.settings.memory.keys)

    def blocks(self) -> list[Block]:
        """What the arithmetic and the memories are made of."""
        return blocks(self.settings, self.settings.memory.keys)

    def roof(self) -> Roof:
        """The attention modules' multipliers busy, and the bandwidth outside."""
        s = self.settings
        multipliers = 2 * s.attention.dim * s.selection.banks * s.units
        return Roof(2e9 * multipliers * s.clock_ghz, 1e9 * s.dram.gbytes_per_second)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, tally = self.settings, Tally()
        if options.window is not None and s.units > 1:
            raise NotImplementedError(
                f"{self.name} logs events of one unit only, got units={s.units}"
            )
        found = Candidates(s, trace, selection, tally, options.seed)
        log = make_unit_log(s, options.window) if options.fidelity == "cycle" else None
        operators = trace.workload.attention()
        order = [(i, b) for i, op in enumerate(operators) for b in range(op.batch)]
        if s.units == 1:
            order.sort(key=lambda pair: pair[1])  # one sequence after another, as they are reported
        now, free, last = 0.0, np.zeros(s.units), -1
        for i, b in order:
            if i != last:
                free[:] = 0.0  # a call waits for the one before it
            last = i
            stage = self._stage(found, i, operators[i], b, free, log, round(now))
            tally.stages.append(stage)
            now += stage.cycles
        cycles = sum(stage.cycles for stage in tally.stages)
        keys = max((op.kv_len for op in operators), default=0)
        report = core_report(
            self,
            trace,
            selection,
            options.fidelity,
            tally,
            memory=s.dram,
            energy=self._energy(tally, cycles, keys),
            blocks=blocks(s, keys),
            assumptions=self._assumptions(trace, found, options.fidelity, keys),
        )
        report = replace(
            report, area=self.area_for(keys), seed=options.seed if found.drawn else None
        )
        return report if log is None else self._with_events(report, log, options, round(now))

    def _stage(
        self,
        found: Candidates,
        call: int,
        operator: Operator,
        sequence: int,
        free: np.ndarray,
        log: Log | None,
        now: int,
    ) -> Stage:
        """One call of one sequence; with several units, the time by which it makes the call
        longer. `free` says when each unit has done what came before in the call."""
        s, tally = self.settings, found.tally
        hasher = hasher_of(s, operator.head_dim)
        rate = rates(s, hasher, operator.head_dim, operator.value_dim)
        before = float(free.max()) if s.units > 1 else 0.0
        if s.units == 1:
            free[:] = 0.0
        facts: dict[str, float | int | str] = dict.fromkeys(
            ("heads", "visible", "candidates", "preprocessing", "lost_to_imbalance"), 0
        )
        facts |= {f"bound_by_{name}": 0 for name in _BOUNDS}
        moved = 0.0
        for head in found.heads(call, operator, sequence):
            timing = closed_form(head, s, rate)
            unit = int(free.argmin())
            cycles = timing.cycles
            if log is not None:
                start = (
                    now + round(float(free[0])) if s.units == 1 else int(log.running[:, 1].max())
                )
                cycles = cycle_by_cycle(head, s, rate, log, start) - start
            free[unit] += cycles
            count(head, operator, s, hasher, rate, tally)
            moved += moved_bytes(head, operator, s)
            _add(facts, int(head.seen.sum()), int(head.kept.sum()), timing)
        tally.dram_bytes += moved
        tally.useful_bytes += moved
        work = float(free.max()) - before
        stall = 0.0
        if s.memory.time == "charged":
            transfer = moved / s.dram.bytes_per_cycle(s.clock_ghz)
            stall = transfer if s.memory.copies == 1 else max(0.0, transfer - work)
            stall = float(np.ceil(stall))
        return Stage(
            "attention",
            work + stall,
            layer=operator.layer,
            step=operator.step,
            sequence=sequence,
            stall_cycles=stall,
            stall_cause="dram" if stall else "",
            facts=facts,
        )

    def _energy(self, tally: Tally, cycles: float, keys: int) -> EnergySource | Priced:
        s = self.settings
        if s.energy.source == "published_modules":
            return published_energy(s, self.table, tally, cycles, keys)
        return EnergySource(
            source="actions",
            logic=s.energy.logic,
            memory=s.energy.memory,
            sram_cell=s.energy.sram_cell,
        )

    def _with_events(self, report: Report, log: Log, options: Options, end: int) -> Report:
        names = units_of(self.settings)
        for unit in range(len(names)):
            if self.settings.units == 1:
                # Between heads and while memory is waited for nothing is noted: all are idle.
                log.running[unit, 0] = IDLE
                close(log, unit, end)
        cycles = {
            name: {cause: int(n) for cause, n in zip(CAUSES, log.totals[u], strict=True) if n}
            for u, name in enumerate(names)
        }
        events = None
        if options.window is not None:
            used = int(log.limits[0])
            events = Events(
                names,
                CAUSES,
                log.intervals[:used],
                options.window,
                int(log.limits[1]),
                tags="query",
            )
        return replace(report, unit_cycles=cycles, events=events)

    def _assumptions(
        self, trace: Trace, found: Candidates, fidelity: Fidelity, keys: int
    ) -> tuple[str, ...]:
        s = self.settings
        operators = trace.workload.attention()
        said = ["keys are hashed anew in every call and head, before its first query"]
        if s.search.mode == "base":
            said = ["every key that causality and padding allow is scored, and nothing is hashed"]
        elif found.follows:
            said.append("candidates are the pairs that the selection keeps")
        else:
            said.append(
                f"selection {found.selection.name!r} is not followed: ELSA chooses by itself"
            )
        if s.memory.time == "hidden":
            said.append("inputs and outputs are moved behind earlier work, as published")
        else:
            said.append(
                f"keys, values, queries and outputs move at {s.dram.gbytes_per_second:g} GB/s, "
                + ("after" if s.memory.copies == 1 else "behind")
                + " the work of the call"
            )
        if keys > s.memory.keys:
            said.append(
                f"memories hold {keys} keys instead of {s.memory.keys}: area and static "
                "power are in proportion, an access costs the same"
            )
        widths = sorted({max(op.head_dim, op.value_dim) for op in operators})
        if any(width != s.attention.dim for width in widths):
            said.append(
                f"vectors of {', '.join(map(str, widths))} numbers run on modules of "
                f"{s.attention.dim}: shorter ones are filled up with zeros, longer ones take turns"
            )
        if any(op.is_causal for op in operators):
            said.append("selectors look only at the keys that a query may see")
        if s.units > 1:
            said.append(
                f"heads of all sequences of a call are handed to {s.units} units as they become "
                "free; a sequence is charged the time by which it makes the call longer"
            )
        if fidelity == "analytic":
            said.append("a query takes as long as its slowest module; buffers hide more")
        said.append("queues, buffers and what lies behind the last candidate are our defaults")
        return tuple(said)


def _add(facts: dict[str, float | int | str], seen: int, kept: int, timing: Timing) -> None:
    """One head's facts on top of those of the call."""
    for name, more in (
        ("heads", 1),
        ("visible", seen),
        ("candidates", kept),
        ("preprocessing", timing.preprocessing),
        ("lost_to_imbalance", timing.lost),
        *(
            (f"bound_by_{name}", queries)
            for name, queries in zip(_BOUNDS, timing.slowest, strict=True)
        ),
    ):
        facts[name] = cast("int", facts[name]) + more
