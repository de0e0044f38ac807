"""Energy and area of logic at another technology node and voltage (Stillmaker & Baas, 2017).

Energy: f(n, V) = a2·V² + a1·V + a0, E_y = E_x · f_y / f_x. Area: ratios to 45 nm. Between two nodes
of the fit both are interpolated on logarithms, so that a node scales to itself by exactly 1.
SRAM does not follow logic below 7 nm, and nothing here reaches below 7 nm.
"""

from __future__ import annotations

from math import exp, log
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.config import MachineError

# Stillmaker & Baas, "Scaling equations for the accurate prediction of CMOS device performance from
# 180 nm to 7 nm", Integration 58 (2017): (a2, a1, a0) by node in nm.
ENERGY_FIT: dict[int, tuple[float, float, float]] = {
    130: (7.171, -6.709, 2.904),
    90: (4.762, -4.781, 2.092),
    65: (3.755, -4.398, 1.975),
    45: (1.103, -0.362, 0.2767),
    32: (0.9559, -0.7823, 0.471),
    20: (0.373, -0.1582, 0.04104),
    16: (0.2958, -0.1241, 0.03024),
    14: (0.2363, -0.09675, 0.02239),
    10: (0.2068, -0.09311, 0.02375),
    7: (0.1776, -0.09097, 0.02447),
}
# The same source: area of one circuit relative to 45 nm.
AREA: dict[int, float] = {
    130: 6.4, 90: 2.8, 65: 1.5, 45: 1.0, 32: 0.46, 20: 0.21, 16: 0.19, 14: 0.17, 10: 0.10, 7: 0.059,
}  # fmt: skip
# Nominal supply by node in V, ITRS as the same source uses it.
NOMINAL: dict[int, float] = {
    130: 1.2, 90: 1.1, 65: 1.1, 45: 1.0, 32: 0.97, 20: 0.9, 16: 0.8, 14: 0.8, 10: 0.75, 7: 0.7,
}  # fmt: skip
VOLTS = (0.5, 1.4)


class Scale(NamedTuple):
    """Factors of area, and of power at one clock, from one node to another."""

    area: float
    power: float


def fitted(coefficients: tuple[float, float, float], volts: float) -> float:
    """a2·V² + a1·V + a0."""
    a2, a1, a0 = coefficients
    return (a2 * volts + a1) * volts + a0


def energy_scale(
    from_nm: float, to_nm: float, *, from_volts: float, to_volts: float | None = None
) -> float:
    """Energy of an operation at `to_nm` over its energy at `from_nm`.

    Args:
        from_nm, to_nm: nodes, 7 to 130 nm.
        from_volts: supply at which the energy is known.
        to_volts: supply wanted; None = the same. (The choice of voltage alone is a factor of 2.)

    Raises:
        MachineError: a node or a voltage outside the fit.
    """
    to_volts = from_volts if to_volts is None else to_volts
    return _energy(to_nm, to_volts) / _energy(from_nm, from_volts)


def area_scale(from_nm: float, to_nm: float) -> float:
    """Area of logic at `to_nm` over its area at `from_nm`, both 7 to 130 nm."""
    return _between(to_nm, AREA) / _between(from_nm, AREA)


def nominal_volts(nm: float) -> float:
    """Nominal supply of a node in V."""
    return _between(nm, NOMINAL)


def named_scales(from_nm: float, to_nm: float) -> dict[str, Scale]:
    """What logic at one node takes at another, by the name of the rule: they disagree by much.

    Raises:
        MachineError: a node outside the fit.
    """
    volts, other = nominal_volts(from_nm), nominal_volts(to_nm)
    ratio, area = to_nm / from_nm, area_scale(from_nm, to_nm)
    kept = energy_scale(from_nm, to_nm, from_volts=volts)
    nominal = energy_scale(from_nm, to_nm, from_volts=volts, to_volts=other)
    return {
        "area by the square of the node, power by the node": Scale(ratio * ratio, ratio),
        "Stillmaker & Baas at one voltage": Scale(area, kept),
        "Stillmaker & Baas at nominal voltages": Scale(area, nominal),
    }


def _energy(nm: float, volts: float) -> float:
    if not VOLTS[0] <= volts <= VOLTS[1]:
        raise MachineError(f"voltage must be {VOLTS[0]} to {VOLTS[1]} V, got {volts}")
    return _between(nm, {node: fitted(fit, volts) for node, fit in ENERGY_FIT.items()})


def _between(nm: float, values: dict[int, float]) -> float:
    nodes = sorted(values)
    if not nodes[0] <= nm <= nodes[-1]:
        raise MachineError(f"node must be {nodes[0]} to {nodes[-1]} nm, got {nm}")
    if nm in values:
        return values[int(nm)]
    logs = [log(values[node]) for node in nodes]
    return exp(float(np.interp(log(nm), [log(node) for node in nodes], logs)))
