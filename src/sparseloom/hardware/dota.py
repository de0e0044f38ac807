"""DOTA (Qu et al., ASPLOS 2022) at analytic fidelity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, cast

from sparseloom.hardware.dota_closed_form import Cost, DotaConfig, operator_costs
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Fidelity, Report, Stage
from sparseloom.trace import Operator, PredictorShape, Selection, Trace, Workload


class Dota(Machine):
    """Four Lanes that detect weak attentions in low precision and omit them.

    The closed form charges every stage at ideal utilisation, one after another; what it leaves
    out stands in the report's assumptions. Sequences run one at a time.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic",)
    Config: ClassVar[type[MachineConfig]] = DotaConfig

    @property
    def settings(self) -> DotaConfig:
        """The checked machine file."""
        return cast("DotaConfig", self.config)

    def units(self) -> dict[str, int]:
        """How many of its units each module of the energy table has here."""
        s = self.settings
        return {
            "rmmu": s.lanes * s.rmmu.elements,
            "detector": s.lanes * s.detector.parallel_queries,
            "mfu": s.lanes * s.mfu.exponentials_per_cycle,
            "accumulator": s.accumulator.additions_per_cycle,
            "sram": s.lanes * s.sram.kib_per_lane,
        }

    def area(self) -> dict[str, float]:
        """Area by module in mm² (published total: 4.44)."""
        return self.table.area(self.units())

    def power(self) -> dict[str, float]:
        """Power by module in W with everything busy (published total: 3.02)."""
        return self.table.power(self.units())

    def roof(self) -> Roof:
        """Every element of every Lane busy at full precision, and the DRAM's bandwidth."""
        s = self.settings
        elements = s.lanes * s.rmmu.elements
        return Roof(2e9 * elements * s.clock_ghz, 1e9 * s.dram.gbytes_per_second)

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, workload = self.settings, trace.workload
        bytes_per_cycle = s.dram.gbytes_per_second / s.clock_ghz
        calls = iter(selection.calls)
        stages: list[Stage] = []
        costs: list[Cost] = []
        known: dict[tuple[Operator, int, bool], list[list[Cost]]] = {}
        before: Operator | None = None
        for operator in workload.operators:
            call = next(calls) if operator.is_attention else None
            # Layers of equal sizes cost the same, unless their masks differ.
            shared = _same_input(before, operator)
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
                    stages.append(
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
        # One sequence at a time: a stable sort keeps the operators of each in order.
        stages.sort(key=lambda stage: stage.sequence)
        total = sum(stage.cycles for stage in stages)
        busy, idle = self._actions(costs, total)
        energy = self.table.joules(busy, idle, width=self._widths())
        leakage = self.power()["sram"] * total / (s.clock_ghz * 1e9)
        energy["sram_leakage"] = leakage
        moved = round(sum(cost.dram_bytes for cost in costs))
        exact = (cost.pe_cycles for cost in costs if cost.component != "detection")
        in_attention = sum(stage.cycles for stage in stages if stage.component == "attention")
        return Report(
            machine=self.name,
            trace=workload.name,
            selection=selection.name,
            scope=workload.scope,
            fidelity=options.fidelity,
            clock_ghz=s.clock_ghz,
            stages=tuple(stages),
            energy=energy,
            energy_table=self.table.name,
            area=self.area(),
            actions={**busy, **{f"idle {name}": count for name, count in idle.items()}},
            utilisation=self._utilisation(costs, total, in_attention, moved / bytes_per_cycle),
            dram_preset=s.dram.preset,
            dram_bytes=moved,
            useful_bytes=moved,
            config_hash=self.config_hash,
            assumptions=assumptions(s, workload, selection),
            value=_number(selection.quality, "value"),
            dense_value=_number(selection.quality, "dense_value"),
            operations=2 * sum(exact),
        )

    def _actions(
        self, costs: Iterable[Cost], total: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Events by the names of the energy table: busy, and idle but clock-gated."""
        s, costs = self.settings, list(costs)
        busy = {
            "rmmu_pe_cycle": sum(cost.pe_cycles for cost in costs),
            "mfu_cycle": sum(cost.mfu_cycles for cost in costs),
            "detector_cycle": sum(cost.detector_cycles for cost in costs),
            "accumulator_cycle": sum(cost.accumulator_cycles for cost in costs),
        }
        slots = {
            "rmmu_pe_cycle": s.lanes * s.rmmu.elements,
            "mfu_cycle": s.lanes,
            "detector_cycle": s.lanes,
            "accumulator_cycle": 1,
        }
        idle = {name: max(0.0, total * slots[name] - count) for name, count in busy.items()}
        busy["sram_bit"] = 8 * sum(cost.sram_bytes for cost in costs)
        busy["dram_bit"] = 8 * sum(cost.dram_bytes for cost in costs)
        return busy, idle

    def _widths(self) -> dict[str, float]:
        """How much wider than in the table the units behind a per-cycle event are."""
        s, modules = self.settings, self.table.modules
        return {
            "mfu_cycle": s.mfu.exponentials_per_cycle / modules["mfu"].units,
            "detector_cycle": s.detector.parallel_queries / modules["detector"].units,
            "accumulator_cycle": s.accumulator.additions_per_cycle / modules["accumulator"].units,
        }

    def _utilisation(
        self, costs: list[Cost], total: float, in_attention: float, dram_cycles: float
    ) -> dict[str, float]:
        s = self.settings
        peak = s.lanes * s.rmmu.elements
        kept = sum(cost.pe_cycles for cost in costs if cost.component == "attention")
        shares = {
            "rmmu": (sum(cost.pe_cycles for cost in costs), total * peak),
            "rmmu_attention": (kept, in_attention * peak),
            "mfu": (sum(cost.mfu_cycles for cost in costs), total * s.lanes),
            "accumulator": (sum(cost.accumulator_cycles for cost in costs), total),
            "dram": (dram_cycles, total),
        }
        return {name: used / of if of else 0.0 for name, (used, of) in shares.items()}


def _same_input(before: Operator | None, operator: Operator) -> bool:
    """Whether both are projections of one layer's input to queries, keys or values."""
    if before is None or (before.role, operator.role) != ("qkv", "qkv"):
        return False
    names = ("kind", "layer", "step", "batch", "rows", "inner")
    return all(getattr(before, name) == getattr(operator, name) for name in names)


def assumptions(s: DotaConfig, workload: Workload, selection: Selection) -> tuple[str, ...]:
    """What the closed form rests on for this trace, as sentences."""
    found = [
        "closed form: stages run one after another at ideal utilisation; pipeline fill, the "
        "scheduler, bank conflicts and DRAM latency are not modelled",
        "one sequence at a time; norms and activations run behind the matrix products",
        "keys and values are loaded once for each "
        f"{s.detector.parallel_queries} consecutive queries (the least possible)",
        "module power and area are unconfirmed rows whose sums agree with the published totals; "
        "SRAM and DRAM energy per bit are defaults",
    ]
    form = s.closed_form
    if form.pairs == "square":
        found.append(
            "attention is charged as density × q_len × kv_len and detection as q_len × kv_len, "
            "also where causality or padding forbids pairs"
        )
    else:
        found.append(
            "attention is charged for the pairs that the mask keeps, detection for the pairs that "
            "causality and padding allow"
        )
    if form.lane_balance == "measured":
        found.append("heads take turns on the Lanes and a call ends with its slowest Lane")
    else:
        found.append("heads share the Lanes evenly, whatever each one keeps")
    found += _about_detection(s, selection)
    if form.memory == "bandwidth":
        found.append(
            f"a stage lasts at least as long as its DRAM traffic at {s.dram.gbytes_per_second:g} "
            "GB/s: weights once per sequence, inputs and outputs of the linear and feed-forward "
            "products, and keys and values where they do not stay in SRAM"
        )
    else:
        found.append("DRAM traffic is counted for energy and costs no time")
    operators = workload.attention()
    if any(op.stage == "decode" for op in operators):
        found.append(
            "generation keeps all elements busy on one query, which the token-parallel array may "
            "not reach"
        )
    if any(op.kv_heads != op.heads for op in operators):
        found.append("query heads that share keys and values load them separately")
    if any(call.key_counts is not None for call in selection.calls):
        found.append("the trace counts kept keys without naming them: no load is shared")
    if workload.scope == "attention":
        found.append("the trace lists attention alone: projections and feed-forward are not here")
    if workload.paddings:
        found.append("padded tokens are charged in the matrix products")
    return tuple(found)


def _about_detection(s: DotaConfig, selection: Selection) -> list[str]:
    used = [call.predictor for call in selection.calls if call.predictor is not None]
    shapes = {(shape.head_dim, shape.bits): shape for shape in used}
    found: list[str] = []
    if len(used) < len(selection.calls):
        which = "some attention calls" if used else "attention"
        found.append(
            f"no detection is charged for {which}: selection {selection.name!r} computes no "
            "prediction there, so its mask costs nothing"
        )
    return found + [_detection_sentence(s, shapes[key]) for key in sorted(shapes)]


def _detection_sentence(s: DotaConfig, shape: PredictorShape) -> str:
    products = s.rmmu.products(shape.bits)
    text = (
        f"detection with {shape.head_dim} values per head in {shape.bits} bits: {products} "
        "products per element and cycle"
    )
    if shape.bits > s.rmmu.base_bits:
        text += f", the array having nothing wider than {s.rmmu.base_bits} bits"
    word = max(1, s.rmmu.stream_bits // shape.bits)
    if shape.head_dim % word:
        fuller = -(-shape.head_dim // word) * word / shape.head_dim
        how = "is charged" if s.closed_form.detection == "whole_words" else "is not charged"
        text += f"; filling words of {word} values would take {fuller:.3g} times as long and {how}"
    return text


def _number(quality: Mapping[str, object], name: str) -> float | int | None:
    value = quality.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
