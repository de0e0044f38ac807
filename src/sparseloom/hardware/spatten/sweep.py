"""Many SpAttens on one trace in closed form: cycles, energy and area of 100,000 designs at once.

A module's area, leakage and energy depend on few of the settings: each distinct combination is
looked up in the tables once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparseloom.hardware.actions import Block
from sparseloom.hardware.config import MachineError
from sparseloom.hardware.spatten import analytic, power
from sparseloom.hardware.spatten import area as areas
from sparseloom.hardware.spatten import jobs as j
from sparseloom.hardware.spatten.counts import expected
from sparseloom.hardware.spatten.machine import SpAtten
from sparseloom.hardware.spatten.state import sizes
from sparseloom.trace import Trace

# What each module's blocks depend on, and its actions.
_AREA: Mapping[str, tuple[str, ...]] = {
    "qk": ("multipliers",),
    "pv": ("multipliers",),
    "fetcher": ("multipliers", "ports", "channels"),
    "softmax": ("softmax_lanes",),
    "topk": ("topk_lanes",),
    "other": ("multipliers", "softmax_lanes"),
}
_ENERGY: Mapping[str, tuple[str, ...]] = {**_AREA, "fetcher": ("multipliers",)}
SETTINGS = ("multipliers", "channels", "ports", "softmax_lanes", "topk_lanes")


@dataclass(frozen=True)
class Sweep:
    """Designs side by side, every array (designs,).

    Args:
        settings: by name, what varies and what does not.
        cycles: closed form.
        energy: joules, leakage and DRAM included.
        area: mm², calibrated on the published machine.
    """

    settings: Mapping[str, np.ndarray]
    cycles: np.ndarray
    energy: np.ndarray
    area: np.ndarray

    def pareto(self) -> np.ndarray:
        """Designs that no other one beats in cycles, energy and area at once; ascending cycles."""
        points = np.stack([self.cycles, self.energy, self.area], axis=1)
        order = np.lexsort(points.T[::-1])
        front: list[int] = []
        best = np.zeros((0, 3))
        for i in order:
            beaten = (best <= points[i]).all(axis=1) & (best < points[i]).any(axis=1)
            if not beaten.any():
                front.append(int(i))
                best = points[front]
        return np.array(front, np.int64)


def grid(**values: Sequence[float]) -> dict[str, np.ndarray]:
    """Every combination of the values, as columns for `sweep`."""
    axes = np.meshgrid(*(np.asarray(v) for v in values.values()), indexing="ij")
    return {name: axis.ravel() for name, axis in zip(values, axes, strict=True)}


def sweep(
    machine: SpAtten, trace: Trace, selection: str | None = None, **settings: np.ndarray
) -> Sweep:
    """Cycles, energy and area of designs that differ from `machine` in some settings.

    Args:
        machine: what stays as it is.
        trace: the workload and its selections.
        selection: a name; None takes the only one there is.
        settings: columns of one length: `multipliers` (of each array; a multiple of the head
            width), `channels` (bandwidth goes with them), `ports`, `softmax_lanes`, `topk_lanes`.

    Raises:
        MachineError: an unknown setting, columns of different lengths, or a size that cannot be.
    """
    jobs = machine.jobs(trace, trace.selection(selection))
    columns = _columns(machine, settings, jobs.head_dim)
    s, count = machine.settings, len(columns["multipliers"])
    found = analytic.kinds(jobs, sizes(s, jobs.head_dim))
    designs = np.repeat(machine.design()[None], count, axis=0)
    designs[:, analytic.D_BYTES] *= columns["channels"] / s.dram.channels
    designs[:, analytic.D_MULTIPLIERS] = columns["multipliers"]
    designs[:, analytic.D_SOFTMAX] = columns["softmax_lanes"]
    designs[:, analytic.D_TOPK] = columns["topk_lanes"]
    cycles = analytic.cycles(found, designs)
    base = machine.structure(jobs.head_dim)
    model, calibration = machine.energy_model, areas.calibrated()
    dram = model.dynamic(power.actions(base, expected(jobs)))["dram"]
    area_of, leakage_of = _Each(calibration.model.area), _Each(model.leakage)
    area, leakage, energy = np.zeros(count), np.zeros(count), np.full(count, dram)
    for module, names in _AREA.items():
        structures, which = _distinct(base, columns, names)
        each = [[b for b in areas.blocks(one) if b.component == module] for one in structures]
        factor = calibration.factors[module]
        area += np.array([area_of.total(mine) * factor for mine in each])[which]
        leakage += np.array([leakage_of.total(mine) for mine in each])[which]
    activity: dict[int, power.Activity] = {}
    for module, names in _ENERGY.items():
        structures, which = _distinct(base, columns, names)
        joules = np.zeros(len(structures))
        for i, one in enumerate(structures):
            width = one.multipliers
            if width not in activity:
                activity[width] = expected(_lined(jobs, one))
            acts = [a for a in power.actions(one, activity[width]) if a.component == module]
            joules[i] = model.dynamic(acts)[module]
        energy += joules[which]
    energy += leakage * cycles / (s.clock_ghz * 1e9)
    return Sweep(columns, cycles, energy, area)


def _distinct(
    base: areas.Structure, columns: Mapping[str, np.ndarray], names: Sequence[str]
) -> tuple[list[areas.Structure], np.ndarray]:
    """The structures that differ in these settings, and which of them each design has."""
    code = np.zeros(len(columns[names[0]]), np.int64)
    for name in names:
        code = code * (int(columns[name].max()) + 1) + columns[name]
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    found = [replace(base, **{name: int(columns[name][i]) for name in names}) for i in first]
    return found, which


class _Each:
    """A quantity of blocks, looked up once for each kind of block."""

    def __init__(self, of: Callable[[Sequence[Block]], Mapping[str, float]]) -> None:
        self._of = of
        self._known: dict[Block, float] = {}

    def total(self, blocks: Sequence[Block]) -> float:
        """The sum over the blocks."""
        found = 0.0
        for block in blocks:
            one = replace(block, units=1)
            if one not in self._known:
                self._known[one] = self._of([one])[one.component]
            found += block.units * self._known[one]
        return found


def _lined(jobs: j.Jobs, structure: areas.Structure) -> j.Jobs:
    """The same jobs in lines of another width."""
    per_line = structure.multipliers // structure.head_dim
    rows = jobs.rows.copy()
    rows[:, j.N_LINES] = -(-rows[:, j.N_KEYS] // per_line)
    rows[:, j.N_VALUE_LINES] = -(-rows[:, j.N_VALUES] // per_line)
    return replace(jobs, rows=rows)


def _columns(
    machine: SpAtten, settings: Mapping[str, np.ndarray], head_dim: int
) -> dict[str, np.ndarray]:
    base = machine.structure()
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise MachineError(f"settings must be among {', '.join(SETTINGS)}, got {unknown[0]!r}")
    lengths = {name: np.size(column) for name, column in settings.items()}
    if len(set(lengths.values())) > 1:
        raise MachineError(f"settings must be columns of one length, got {lengths}")
    count = next(iter(lengths.values()), 1)
    found: dict[str, np.ndarray] = {}
    for name in SETTINGS:
        column = np.ravel(settings.get(name, getattr(base, name)))
        column = np.broadcast_to(column, count)
        step = head_dim if name == "multipliers" else 1
        wrong = (column < step) | (column % step != 0)
        if wrong.any():
            raise MachineError(
                f"{name} must be multiples of {step} from {step}, got {column[wrong][0]}"
            )
        found[name] = column.astype(np.int64)
    return found
