"""SpAtten as a machine: a trace in, a report out, at two fidelities."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import ClassVar, cast

import numpy as np

from sparseloom.hardware.actions import Action, Block
from sparseloom.hardware.attention_core import number
from sparseloom.hardware.energy import EnergyTable
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Events, Fidelity, Report, Stage
from sparseloom.hardware.spatten import analytic, cycle, power
from sparseloom.hardware.spatten import area as areas
from sparseloom.hardware.spatten import jobs as j
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.hardware.spatten.counts import counted, expected, unit_cycles_of, useful_bytes
from sparseloom.hardware.spatten.jobs import Jobs, lower
from sparseloom.hardware.spatten.layout import ATOM
from sparseloom.hardware.spatten.linear import linear_stages, measured_bandwidth
from sparseloom.hardware.units import dram
from sparseloom.hardware.units.dram_config import MemoryConfig, load_memory
from sparseloom.hardware.units.sram import check_clock
from sparseloom.trace import Selection, Trace, Workload
from sparseloom.trace.index_models import Clustered, Uniform
from sparseloom.trace.kept_keys import with_keys


class SpAtten(Machine):
    """Attention head by head, one query at a time, on survivors only (HPCA 2021, section IV)."""

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic", "cycle")
    logged: ClassVar[tuple[Fidelity, ...]] = ("cycle",)
    Config: ClassVar[type[MachineConfig]] = SpAttenConfig

    def __init__(self, config: MachineConfig, table: EnergyTable) -> None:
        super().__init__(config, table)
        s, structure = self.settings, self.structure()
        for name, buffer in (("key_sram", s.key_sram), ("value_sram", s.value_sram)):
            cycle_ns = self.energy_model.sram_cycle_ns(
                structure.sram_kib / buffer.banks, structure.line_bits
            )
            check_clock(f"{self.name}: {name}", cycle_ns, s.clock_ghz)

    @property
    def settings(self) -> SpAttenConfig:
        """The checked machine file."""
        return cast("SpAttenConfig", self.config)

    @cached_property
    def memory(self) -> MemoryConfig:
        """The memory, with this machine's channels."""
        return load_memory(self.settings.dram.preset, channels=self.settings.dram.channels)

    @cached_property
    def energy_model(self) -> EnergyModel:
        """Tables that the counts of actions are multiplied with."""
        e = self.settings.energy
        return EnergyModel(
            logic=e.logic,
            memory=e.memory,
            sram=e.sram,
            cell=e.sram_cell,
            node_nm=self.settings.technology_nm,
        )

    def structure(self, head_dim: int = 64) -> areas.Structure:
        """The sizes that decide area and energy per event."""
        s = self.settings
        return areas.Structure(
            multipliers=s.scores.multipliers,
            bits=s.scores.bits,
            head_dim=head_dim,
            sram_kib=s.energy.sram_kib or s.sram_kib(s.key_sram),
            ports=s.fetcher.ports,
            channels=s.dram.channels,
            fifo_depth=s.fetcher.address_fifo_depth,
            softmax_lanes=s.softmax.lanes,
            row_fifo_depth=s.softmax.row_fifo_depth,
            topk_lanes=s.topk.lanes,
            tokens=s.softmax.lanes * s.softmax.row_fifo_depth,
        )

    def blocks(self, head_dim: int = 64) -> list[Block]:
        """What the machine is made of, by module."""
        return areas.blocks(self.structure(head_dim))

    def area(self) -> dict[str, float]:
        """Area by module in mm², calibrated on the published breakdown of the full machine."""
        return areas.calibrated().area(self.structure())

    def power(self) -> dict[str, float]:
        """On-chip power by module in W at the published activity (GPT-2 averages), calibrated."""
        structure = self.structure()
        share = structure.multipliers / areas.FULL.multipliers
        activity = power.per_line(power.gpt2_activity() * share, structure)
        watts = power.calibrated_power(power.gpt2_activity()).watts(
            structure, activity, self.settings.clock_ghz
        )
        return {name: watt for name, watt in watts.items() if name != "dram"}

    def roof(self) -> Roof:
        """Both arrays busy in every cycle, and the peak of the memory's channels."""
        s = self.settings
        hertz = 1e9 * s.clock_ghz
        multipliers = s.scores.multipliers + s.values.multipliers
        return Roof(2 * multipliers * hertz, self.memory.peak_bytes_per_clock * hertz)

    def jobs(self, trace: Trace, selection: Selection, seed: int = 0) -> Jobs:
        """The loads and rows of a selection; keys that it only counts are drawn."""
        if any(not call.knows_keys or call.value_counts is not None for call in selection.calls):
            model = Clustered() if self.settings.layout.unknown_keys == "clustered" else Uniform()
            trace = replace(trace, selections={**trace.selections, selection.name: selection})
            selection = with_keys(trace, selection.name, model, seed=seed)
        known = {
            i: trace.tensors[name]
            for i in range(len(selection.calls))
            if (name := f"calls.{i}.probability") in trace.tensors
        }
        return lower(self.settings, trace.workload, selection, known)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, workload = self.settings, trace.workload
        jobs = self.jobs(trace, selection, options.seed)
        sizes = st.sizes(s, jobs.head_dim)
        linear: list[Stage] = []
        products = any(operator.kind == "gemm" for operator in workload.operators)
        if s.fully_connected.enabled and products:
            linear = linear_stages(s, workload, selection, measured_bandwidth(self.memory))
            jobs = _drained(jobs)
        if options.fidelity == "cycle":
            window = options.window or (0, 0)
            run = cycle.run(s, self.memory, jobs, seed=options.seed, window=window)
            stages = _stages(workload, jobs, run.state.loads[:, st.LOAD_END], run.cycles)
            activity = counted(run)
        else:
            run = None
            found = analytic.kinds(jobs, sizes)
            total = float(analytic.cycles(found, self.design()[None])[0])
            stages = _stages(workload, jobs, _even_ends(jobs, total), total)
            activity = expected(jobs)
        cycles = sum(stage.cycles for stage in stages)
        actions = power.actions(self.structure(jobs.head_dim), activity)
        actions += self._linear_actions(linear)
        whole = cycles + sum(stage.cycles for stage in linear)
        model = self.energy_model
        weight_bytes = sum(int(stage.facts["weight_bytes"]) for stage in linear)
        moved = int(activity.atoms) * ATOM + weight_bytes
        useful = useful_bytes(jobs) + weight_bytes
        macs = jobs.head_dim * (activity.scores + activity.values)
        macs += sum(int(stage.facts["macs"]) for stage in linear)
        unit_cycles: dict[str, dict[str, int]] = {}
        events = row_hits = None
        if run is not None:
            unit_cycles = unit_cycles_of(run)
            row_hits = float(run.memory.counters[dram.ROW_HITS]) / max(1.0, activity.atoms)
            if options.window is not None:
                used = int(run.log.limits[0])
                events = Events(
                    st.UNITS,
                    st.CAUSES,
                    run.log.intervals[:used],
                    options.window,
                    int(run.log.limits[1]),
                    component="attention",
                )
        return Report(
            machine=self.name,
            trace=workload.name,
            selection=selection.name,
            scope="model" if linear else "attention",
            fidelity=options.fidelity,
            clock_ghz=s.clock_ghz,
            stages=_in_order(workload, stages, linear),
            energy=model.joules(actions, whole, s.clock_ghz, self.blocks(jobs.head_dim)),
            energy_table=model.name,
            area=self.area(),
            actions={f"{a.component} {a.op} {a.bits}b": a.count for a in actions},
            utilisation=_utilisation(
                activity, cycles, whole, moved, self.memory, s.keys_per_cycle(jobs.head_dim)
            ),
            dram_preset=s.dram.preset,
            dram_bytes=moved,
            useful_bytes=useful,
            config_hash=self.config_hash,
            assumptions=self._assumptions(trace, selection, options, bool(linear)),
            value=number(selection.quality, "value"),
            dense_value=number(selection.quality, "dense_value"),
            row_hits=row_hits,
            seed=options.seed,
            operations=2 * float(macs),
            unit_cycles=unit_cycles,
            events=events,
        )

    def design(self) -> np.ndarray:
        """This machine as a row of the closed form's designs (`analytic.D_…`)."""
        s = self.settings
        peak = self.memory.peak_bytes_per_clock * s.dram.analytic_efficiency
        merge = float(s.topk.engine == "merge_sort")
        row = [peak, s.scores.multipliers, s.softmax.lanes, s.topk.lanes, s.topk.emit_per_cycle]
        return np.array([*row, merge], np.float64)

    def _linear_actions(self, linear: list[Stage]) -> list[Action]:
        macs = sum(int(stage.facts["macs"]) for stage in linear)
        moved = sum(int(stage.facts["weight_bytes"]) for stage in linear)
        if not macs:
            return []
        bits = self.settings.scores.bits
        return [
            Action("linear", "multiply", macs, bits),
            Action("linear", "add", macs, 2 * bits),
            Action("dram", "dram_read", moved * 8 / 256, 256),
            Action("dram", "dram_activate", moved / 1024),
        ]

    def _assumptions(
        self, trace: Trace, selection: Selection, options: Options, linear: bool
    ) -> tuple[str, ...]:
        s = self.settings
        found = [
            "one head and one query at a time; keys and values of a prompt's head are loaded once, "
            "in generation a row fetches its own values",
            "latencies of the fetcher are fitted on the key half of one public RTL run; those of "
            "the softmax are the authors' behavioural model's",
            f"tokens are ranked per {s.topk.token_selection}; the loads behind a ranking wait for "
            "it",
            "atoms return to their port in the order in which it asked",
            "energy is counted actions and leakage from the named tables, area is calibrated on "
            "the published breakdown",
        ]
        if s.progressive.order == "hold":
            found.append("no new row starts while one waits for its low bits")
        else:
            found.append("rows behind one that waits for its low bits overtake it")
        if options.fidelity == "analytic":
            found.append(
                "closed form: the slowest stage of each load sets its time, DRAM gives "
                f"{s.dram.analytic_efficiency:.0%} of its peak, selections take their mean time"
            )
        if any(not call.knows_keys or call.value_counts is not None for call in selection.calls):
            found.append(
                f"the trace counts kept keys without naming them: {s.layout.unknown_keys} index "
                f"model, seed {options.seed}"
            )
        if not any(f"calls.{i}.probability" in trace.tensors for i in range(len(selection.calls))):
            found.append("no probabilities were recorded: selections see distinct values")
        if any(call.mask is not None and op.q_len > 1 for op, call in _pairs(trace, selection)):
            found.append(
                "a prompt's head computes every pair of a kept query and a key that any query "
                "keeps: the machine prunes tokens, not pairs"
            )
        if any(
            call.lsb_refetch is not None and bool(call.lsb_refetch.any()) and op.q_len > 1
            for op, call in _pairs(trace, selection)
        ):
            found.append("a prompt's keys are read whole, low bits included, and never again")
        if linear:
            found.append(
                "fully connected layers run between the attention calls, alone: weights at the "
                "measured streaming bandwidth, activations on chip"
            )
        elif any(op.kind == "gemm" for op in trace.workload.operators):
            found.append("attention alone: projections and feed-forward run elsewhere")
        return tuple(found)


def _pairs(trace: Trace, selection: Selection):
    return zip(trace.workload.attention(), selection.calls, strict=True)


def _drained(jobs: Jobs) -> Jobs:
    """The same jobs, each attention call waiting for the one before: linear layers lie between."""
    loads = jobs.loads.copy()
    first = np.diff(loads[:, j.L_CALL], prepend=-1) != 0
    loads[first, j.L_DRAIN] = 1
    return replace(jobs, loads=loads)


def _stages(workload: Workload, jobs: Jobs, ends: np.ndarray, total: float) -> list[Stage]:
    """One stage per attention call: from the end of the one before to its own."""
    operators = workload.attention()
    found: list[Stage] = []
    last = 0.0
    calls = jobs.loads[:, j.L_CALL]
    for call in np.unique(calls):
        mine = ends[calls == call]
        end = max(last, float(mine.max()))
        operator = operators[call]
        found.append(
            Stage(
                component="attention",
                cycles=end - last,
                layer=operator.layer,
                step=operator.step,
                facts={"stage": operator.stage, "loads": int(mine.size), "call": int(call)},
            )
        )
        last = end
    if found and total > last:
        found[-1] = replace(found[-1], cycles=found[-1].cycles + total - last)
    return found


def _even_ends(jobs: Jobs, total: float) -> np.ndarray:
    """Ends of the loads where only the total is known: shared out by the vectors they read."""
    rows = np.bincount(jobs.rows[:, j.N_LOAD], jobs.rows[:, j.N_KEYS], len(jobs.loads))
    weight = rows + jobs.loads[:, j.L_KEYS]
    return np.cumsum(weight) / max(1.0, float(weight.sum())) * total


def _in_order(workload: Workload, stages: list[Stage], linear: list[Stage]) -> tuple[Stage, ...]:
    """Attention and linear stages in the order of the workload's operators."""
    if not linear:
        return tuple(stages)
    attention = {(stage.step, stage.layer, stage.facts["call"]): stage for stage in stages}
    products = iter(linear)
    found: list[Stage] = []
    call = 0
    for operator in workload.operators:
        if operator.is_attention:
            # A call that keeps nothing has no stage.
            stage = attention.get((operator.step, operator.layer, call))
            found += [] if stage is None else [stage]
            call += 1
        elif operator.kind == "gemm":
            found.append(next(products))
    return tuple(found)


def _utilisation(
    done: power.Activity,
    cycles: float,
    whole: float,
    moved: int,
    memory: MemoryConfig,
    per_line: int,
) -> dict[str, float]:
    if not whole:
        return {}
    return {
        "scores": done.score_lines / max(1.0, cycles),
        "scores_useful": done.scores / max(1.0, cycles * per_line),
        "values": done.value_lines / max(1.0, cycles),
        "dram": min(1.0, moved / (whole * memory.peak_bytes_per_clock)),
    }
