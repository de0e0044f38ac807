"""Fitting the cost rule: what synthetic times give back, and one small real calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sparseloom.experiments.bench_cases import AttentionCase
from sparseloom.experiments.calibrate import (
    Measured,
    Point,
    calibrate,
    check,
    fit,
    least_squares,
    table_rows,
)
from sparseloom.kernels import available_backends
from sparseloom.methods import costs
from sparseloom.results import results

ABOUT: dict[str, Any] = {
    "cpu": "x", "tier": "avx2", "threads": 2, "date": "2026-01-01", "command": "c", "versions": {},
}  # fmt: skip
DENSE = {"call": 1e-5, "rows": 0.0, "pairs": 2e-11}
ATTEND = {"call": 2e-5, "pairs": 5e-11}
SELECT = {"call": 4e-5, "project": 3e-12, "scores": 1e-12}


def seconds(factors: Mapping[str, float], terms: Mapping[str, float]) -> float:
    return sum(factor * terms[name] for name, factor in factors.items())


def synthetic(noise: float = 0.0) -> Measured:
    generator = np.random.default_rng(0)
    found = Measured([], [], [])
    for length in (256, 512, 1024, 2048):
        for share in (0.3, 0.6, 0.9, 0.95):
            case = AttentionCase(
                q_len=length, kv_len=length, block_size=(8, 1), sparsity=share, causal=False
            )
            dense = seconds(DENSE, costs.dense_terms(case.shape))
            point = Point(case, dense, dense)
            for part, factors in (("attend", ATTEND), ("select", SELECT)):
                terms = getattr(costs, f"{part}_terms")(case.shape, point.work)
                took = seconds(factors, terms) * (1 + noise * generator.standard_normal())
                getattr(found, part).append(Point(case, took, dense))
            plain = dataclasses.replace(case, block_size=(1, 1), sparsity=0.0)
            if share == 0.3:
                found.dense.append(Point(plain, dense, dense))
    return found


def test_least_squares_is_never_negative() -> None:
    generator = np.random.default_rng(1)
    matrix = generator.random((40, 4))
    x = np.array([2.0, 0.0, 0.5, 0.0])
    assert least_squares(matrix, matrix @ x) == pytest.approx(x, abs=1e-9)
    pulled = least_squares(matrix, matrix @ np.array([1.0, -1.0, 0.0, 0.0]))
    assert (pulled >= 0).all()
    assert least_squares(np.zeros((3, 2)), np.ones(3)).tolist() == [0.0, 0.0]


def test_synthetic_times_give_their_coefficients_back() -> None:
    table = fit(synthetic(), **ABOUT)
    assert table.unit_seconds == pytest.approx(2e-11, rel=0.01)
    for found, factors in (
        (table.dense["float32"], DENSE),
        (table.attend["float32"]["8x1"], ATTEND),
        (table.select["8x1"], SELECT),
    ):
        back = {name: factor * table.unit_seconds for name, factor in found.items()}
        assert back == pytest.approx({k: v for k, v in factors.items() if v}, rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_rule_never_errs_by_more_than_a_tenth(noise: float) -> None:
    measured = synthetic(noise)
    rows = check(fit(measured, **ABOUT), measured)
    assert {row["rule"] for row in rows} == {"sparse", "dense"}
    assert all(row["ratio"] <= 1.1 for row in rows if row["rule"] == "sparse")
    assert all(row["ratio"] >= 0.8 for row in rows if row["rule"] == "dense")


@pytest.mark.skipif(available_backends().get("cpu", "") is not None, reason="needs the CPU backend")
def test_a_small_calibration_makes_a_table() -> None:
    said: list[str] = []
    table, checks = calibrate(
        command="c", repeats=1, lengths=(64, 128), blocks=((1, 1), (8, 1)), sparsities=(0.3, 0.9),
        dtypes=("float32",), progress=said.append,
    )  # fmt: skip
    assert set(table.select) == set(table.attend["float32"]) == {"1x1", "8x1"}
    assert table.dense["float32"]
    assert len(checks) == 2 * 2 * (2 + 1)  # and the causal ones at one sparsity
    assert all(row["dense_ms"] > 0 and row["select_ms"] > 0 for row in checks)
    assert results(table_rows(table) + checks).rows
    assert said


def test_without_the_backend_there_is_nothing_to_calibrate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparseloom.experiments import calibrate as module

    monkeypatch.setattr(module, "available_backends", lambda: {"cpu": "not built"})
    with pytest.raises(ValueError, match="calibration needs the CPU backend: not built"):
        calibrate(command="c")
