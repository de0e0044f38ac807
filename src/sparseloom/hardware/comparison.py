"""Every accelerator on one trace: at one size, and as published.

One size means the same multipliers, clock, memory bandwidth and node. Multipliers, clock and
bandwidth are settings of the machines, which are simulated anew with them; the node changes energy
and area only. Cycles mean little without accuracy: each run says what the machine computed, how
accurate that is where it was measured, and whether it may be compared with the dense baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

from pydantic import Field, model_validator

from sparseloom.hardware import load
from sparseloom.hardware.attention_core import number
from sparseloom.hardware.config import MachineError, Section, checked, find, read_yaml
from sparseloom.hardware.machine import Machine
from sparseloom.hardware.report import Report
from sparseloom.hardware.scaling import named_scales
from sparseloom.trace import Selection, Trace, TraceError

Configuration = Literal["one size", "as published"]
EVERYTHING = "every allowed pair"
RULE = "Stillmaker & Baas at nominal voltages"
"""By which energy and area are scaled to the node; rules disagree by much."""
SCALING = (
    f"energy and area of logic and SRAM at {{node}} nm by {RULE} (2017); DRAM is not scaled, and "
    "machines that the scaling does not cover (an FPGA, 5 nm) stand at their own node"
)


class Budget(Section):
    """The size that all machines get."""

    multipliers: int = Field(ge=1)
    clock_ghz: float = Field(gt=0)
    gbytes_per_second: float = Field(gt=0)
    node_nm: int = Field(ge=7, le=130)


class Accelerator(Section):
    """One machine of the comparison; the shipped file says what each key means."""

    name: str
    machine: str
    sized: str | None = None
    set: dict[str, bool | float | int | str] = Field(default_factory=dict)
    follows: Literal["every", "dense"] | list[str]
    chooses: bool = False
    computes: str
    size: str
    operands: str
    scale_energy: bool = True

    def at(self, configuration: Configuration) -> Machine:
        """The machine of this configuration."""
        if configuration == "as published":
            return load(self.machine)
        return load(self.sized or self.machine, **self.set)

    def follows_selection(self, selection: Selection) -> bool:
        """Whether it computes what the selection keeps, and nothing else."""
        if isinstance(self.follows, str):
            return self.follows == "every"
        return str(selection.method.get("method")) in self.follows


class Comparison(Section):
    """A comparison file: the size, and the machines; the first is the dense baseline."""

    schema_: Literal["sparseloom/comparison/1"] = Field(alias="schema")
    budget: Budget
    accelerators: list[Accelerator] = Field(min_length=1)

    @model_validator(mode="after")
    def _dense_first(self) -> Comparison:
        if self.accelerators[0].follows != "dense":
            first = self.accelerators[0].name
            raise ValueError(f"the first accelerator must follow dense, got {first!r}")
        return self


@dataclass(frozen=True)
class Accuracy:
    """What a run computes, and how good that is; `value` None: it was not measured."""

    computes: str
    value: float | int | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Run:
    """One accelerator on one selection. `report` is None where it cannot run, and `refusal` why.

    Args:
        energy, area: at the node of the comparison, in J and mm²; None where not known.
    """

    accelerator: Accelerator
    configuration: Configuration
    selection: str
    accuracy: Accuracy
    machine: Machine
    report: Report | None = None
    refusal: str = ""
    energy: Mapping[str, float] | None = None
    area: float | None = None


def load_comparison(name_or_path: str | PathLike[str] = "accelerators") -> Comparison:
    """A comparison file by its shipped name or by path.

    Raises:
        MachineError: there is none, it does not fit the schema, or one of its machines is not of
            the size that it states.
    """
    file = find("comparisons", name_or_path, "comparison")
    found = checked(Comparison, read_yaml(file), str(file))
    for one in found.accelerators:
        _check_size(one, found.budget)
    return found


def _check_size(one: Accelerator, budget: Budget) -> None:
    machine = one.at("one size")
    roof = machine.roof()
    wanted = (2e9 * budget.multipliers * budget.clock_ghz, 1e9 * budget.gbytes_per_second)
    if roof is None or machine.config.clock_ghz != budget.clock_ghz:
        raise MachineError(f"{one.name}: clock_ghz must be {budget.clock_ghz:g} and peaks known")
    for what, mine, limit in zip(("operations", "bytes"), roof, wanted, strict=True):
        if abs(mine / limit - 1) > 1e-6:
            raise MachineError(
                f"{one.name}: {what} per second must be {limit:g} at one size, got {mine:g}"
            )


def runs(
    comparison: Comparison,
    trace: Trace,
    selections: Sequence[str] | None = None,
    *,
    fidelity: str = "analytic",
    seed: int = 0,
) -> Iterator[Run]:
    """Every accelerator on every selection, at one size and as published.

    A machine that chooses by itself, or not at all, runs once, and one whose published size is that
    of the comparison has no second run. A machine without the fidelity takes its own; one that
    cannot run the trace or the selection says why.

    Args:
        comparison: the size and the machines.
        trace: attention alone is compared, so only that may be listed.
        selections: names; None: "dense" and all that the trace has.
        fidelity, seed: as in `Machine.simulate`.

    Raises:
        ValueError: the trace lists more than attention, or has no such selection.
    """
    if trace.workload.scope != "attention":
        raise ValueError("scope must be attention: not every accelerator runs the rest of a model")
    names = list(selections or ["dense", *(n for n in trace.selections if n != "dense")])
    chosen = [trace.selection(name) for name in dict.fromkeys(names)]
    for one in comparison.accelerators:
        machines: dict[Configuration, Machine] = {"one size": one.at("one size")}
        published = one.at("as published")
        if published.config_hash != machines["one size"].config_hash:
            machines["as published"] = published
        for selection in _selections(one, trace, chosen):
            accurate = accuracy(one, trace, selection)
            for configuration, machine in machines.items():
                run = Run(one, configuration, selection.name, accurate, machine)
                yield _simulated(run, comparison.budget, trace, fidelity, seed)


def _selections(one: Accelerator, trace: Trace, chosen: Sequence[Selection]) -> list[Selection]:
    """Those that an accelerator runs; what a machine chooses by itself, it chooses once."""
    dense = trace.selection("dense")
    if one.follows == "dense":
        return [dense]
    if one.chooses:
        return [dense, *(selection for selection in chosen if one.follows_selection(selection))]
    return list(chosen)


def _simulated(run: Run, budget: Budget, trace: Trace, fidelity: str, seed: int) -> Run:
    machine = run.machine
    own = fidelity if fidelity in machine.fidelities else machine.fidelities[0]
    try:
        report = machine.simulate(trace, run.selection, fidelity=own, seed=seed)
    except (MachineError, TraceError, NotImplementedError) as error:
        return replace(run, refusal=str(error))
    by_energy = by_area = 1.0
    here, there = machine.config.technology_nm, budget.node_nm
    if run.configuration == "one size" and run.accelerator.scale_energy and here != there:
        by_area, by_energy = named_scales(here, there)[RULE]
    energy = {
        part: joules * (1.0 if "dram" in part else by_energy)
        for part, joules in report.energy.items()
    }
    area = report.total_area * by_area
    return replace(run, report=report, energy=energy or None, area=area or None)


def accuracy(one: Accelerator, trace: Trace, selection: Selection) -> Accuracy:
    """What the accelerator computes of a selection, and the accuracy measured for just that."""
    everything = one.follows == "dense" or selection.method.get("method") == "dense"
    if everything and not one.chooses:
        return _dense(trace, EVERYTHING)
    if not one.follows_selection(selection):
        return Accuracy(one.computes)
    metric = selection.quality.get("metric")
    value = number(selection.quality, "value")
    return Accuracy(selection.name, value, None if metric is None else str(metric))


def _dense(trace: Trace, computes: str) -> Accuracy:
    """The dense value, where the selections that say one agree."""
    found = {
        (number(selection.quality, "dense_value"), str(selection.quality.get("metric")))
        for selection in trace.selections.values()
        if number(selection.quality, "dense_value") is not None
    }
    return Accuracy(computes, *(found.pop() if len(found) == 1 else (None, None)))


def verdict(run: Run, dense: Run, within: float = 0.0) -> str:
    """Why a run's time is no comparison with the dense baseline's; "" where it is one.

    Args:
        run: any run.
        dense: of the baseline, at one size.
        within: how far two accuracies may lie apart, in the metric's own unit.
    """
    if run.configuration == "as published":
        return "no comparison: another size"
    mine, other = run.accuracy, dense.accuracy
    if not run.accelerator.chooses and mine.computes == other.computes:
        return ""
    if mine.value is None or other.value is None:
        whose = mine.computes if mine.value is None else "dense attention"
        return f"no comparison: accuracy of {whose} is not known"
    if mine.metric != other.metric:
        return f"no comparison: {mine.metric} and {other.metric} are two metrics"
    # A difference of decimals is not exact in binary.
    if abs(mine.value - other.value) > within + 1e-12:
        return f"no comparison: {mine.metric} {mine.value:.4g} against {other.value:.4g}"
    return ""


def _times(dense: Run, run: Run) -> float | None:
    if dense.report is None or run.report is None or not run.report.seconds:
        return None
    return dense.report.seconds / run.report.seconds


def rows(
    found: Sequence[Run], budget: Budget, *, trace: str, within: float
) -> list[dict[str, Any]]:
    """The runs as rows of the results schema: `simulate`, or a record where one cannot run.

    Args:
        found: of one trace; the first is the dense baseline at one size.
        budget: the size.
        trace: what the user called it.
        within: as in `verdict`.
    """
    dense = found[0]
    made: list[dict[str, Any]] = []
    for run in found:
        one, machine = run.accelerator, run.machine
        roof = machine.roof()
        what: dict[str, Any] = {
            "accelerator": one.name,
            "configuration": run.configuration,
            "computes": run.accuracy.computes,
            "trace": trace,
            "selection": run.selection,
            "size": one.size if run.configuration == "one size" else machine.config.title,
            "operands": one.operands,
            "multipliers": roof and roof.operations / 2e9 / machine.config.clock_ghz,
            "gbytes_per_second": roof and roof.bytes / 1e9,
            "node_nm": (
                budget.node_nm
                if run.configuration == "one size" and one.scale_energy
                else machine.config.technology_nm
            ),
        }
        if run.report is None:
            made.append({"record": "refused", **what, "reason": run.refusal})
            continue
        energy = run.energy
        made.append(
            {
                **run.report.rows()[0],
                **what,
                "value": run.accuracy.value,
                "dense_value": dense.accuracy.value,
                "metric": run.accuracy.metric,
                "comparison": verdict(run, dense, within),
                "times_as_fast_as_dense": _times(dense, run),
                "energy_at_node_j": None if energy is None else sum(energy.values()),
                "area_at_node_mm2": run.area,
                **({} if roof is None else {"roof": roof._asdict()}),
            }
        )
    return made
