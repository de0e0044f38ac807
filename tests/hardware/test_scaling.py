"""Scaling between nodes: the source's own numbers, and what any scaling must satisfy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hardware import MachineError
from sparseloom.hardware.scaling import (
    ENERGY_FIT,
    area_scale,
    energy_scale,
    fitted,
    named_scales,
    nominal_volts,
)

nodes = st.floats(7, 130)
volts = st.floats(0.6, 1.2)


def test_erratum_of_the_source() -> None:
    at_09 = fitted((0.8367, -0.4341, 0.1701), 0.9)
    at_13 = fitted(ENERGY_FIT[65], 1.3)
    assert at_09 == pytest.approx(0.4571, abs=5e-5)
    assert at_13 == pytest.approx(2.604, abs=5e-4)
    assert at_09 / at_13 == pytest.approx(0.1755, abs=1e-4)


@pytest.mark.parametrize(
    ("nm", "at_08", "at_nominal"),
    [
        (130, 3.07, 5.1), (90, 1.90, 2.55), (65, 1.24, 1.65), (45, 1, 1), (32, 0.66, 0.60),
        (20, 0.22, 0.20), (16, 0.17, 0.12), (7, 0.094, 0.047),
    ],
)  # fmt: skip
def test_energy_relative_to_45_nm(nm: float, at_08: float, at_nominal: float) -> None:
    assert energy_scale(45, nm, from_volts=0.8) == pytest.approx(at_08, rel=0.025)
    ours = energy_scale(45, nm, from_volts=1.0, to_volts=nominal_volts(nm))
    assert ours == pytest.approx(at_nominal, rel=0.05)


def test_40_nm_lies_between_its_neighbours() -> None:
    assert energy_scale(40, 40, from_volts=0.9) == 1
    assert area_scale(40, 40) == 1
    assert 0.66 < energy_scale(45, 40, from_volts=0.8) < 1
    # A plain shrink is (40/45)²; the source's ratios say a little less.
    assert area_scale(45, 40) == pytest.approx((40 / 45) ** 2, rel=0.05)


@settings(deadline=None)
@given(nodes, nodes, nodes, volts, volts, volts)
def test_scaling_composes(a: float, b: float, c: float, va: float, vb: float, vc: float) -> None:
    direct = energy_scale(a, c, from_volts=va, to_volts=vc)
    first = energy_scale(a, b, from_volts=va, to_volts=vb)
    assert first * energy_scale(b, c, from_volts=vb, to_volts=vc) == pytest.approx(direct)
    assert area_scale(a, b) * area_scale(b, c) == pytest.approx(area_scale(a, c))
    assert energy_scale(a, a, from_volts=va) == 1


@settings(deadline=None)
@given(nodes, nodes)
def test_smaller_nodes_take_less(a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert energy_scale(large, small, from_volts=0.8) <= 1 + 1e-12
    assert area_scale(large, small) <= 1 + 1e-12


def test_rules_by_name_disagree() -> None:
    found = named_scales(40, 22)
    assert [scale.power for scale in found.values()] == pytest.approx(
        [0.55, 0.354, 0.297], abs=5e-4
    )
    assert [scale.area for scale in found.values()] == pytest.approx(
        [0.3025, 0.322, 0.322], abs=5e-4
    )
    assert set(named_scales(40, 40).values()) == {(1.0, 1.0)}


def test_outside_the_fit() -> None:
    with pytest.raises(MachineError, match="node must be 7 to 130 nm, got 5"):
        area_scale(45, 5)
    with pytest.raises(MachineError, match=r"voltage must be 0.5 to 1.4 V, got 0.3"):
        energy_scale(45, 40, from_volts=0.9, to_volts=0.3)
