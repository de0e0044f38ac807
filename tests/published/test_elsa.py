"""ELSA's published numbers, as `elsa_rows` puts them beside ours."""

from __future__ import annotations

import pytest

from sparseloom.experiments.reproduce.elsa_rows import LEVELS, TABLES, elsa, scaling


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return {row["quantity"]: row for row in elsa()}


def test_what_can_be_checked_holds(rows: dict[str, dict]) -> None:
    judged = {name: row["within"] for name, row in rows.items() if row["within"] is not None}
    assert len(judged) > 18
    assert all(judged.values()), [name for name, within in judged.items() if not within]
    assert {row["table"] for row in rows.values()} == set(TABLES)


def test_the_gates(rows: dict[str, dict]) -> None:
    for form in ("Kronecker", "one matrix"):
        bias = rows[f"bias of the angle in rad, 64 bits, {form}"]["ours"]
        assert bias == pytest.approx(0.127, abs=0.002)
    assert rows["cycles of preprocessing, 512 keys"]["ours"] == 3 * 513
    assert rows["cycles per query without approximation, 512 keys"]["ours"] == pytest.approx(
        128, abs=0.01
    )
    assert rows["cycles per query at the least, 512 keys"]["ours"] == pytest.approx(16, abs=0.02)
    assert rows["latency beside the ideal, without approximation"]["ours"] == pytest.approx(
        1.031, abs=0.002
    )


def test_levels_are_scenarios(rows: dict[str, dict]) -> None:
    for level in LEVELS:
        for text in (f"latency beside the ideal, {level}", f"attention over a V100, {level}"):
            assert rows[text]["basis"] == "scenario"
            assert any("unpublished" in one for one in rows[text]["assumptions"])
    latency = [rows[f"latency beside the ideal, {level}"]["ours"] for level in LEVELS]
    assert latency == sorted(latency, reverse=True)
    assert all(0.2 < found < 0.6 for found in latency)


def test_scaling_names_its_rule() -> None:
    found = {row["quantity"]: row["ours"] for row in scaling()}
    assert len(found) == 6
    square = [ours for name, ours in found.items() if "square of the node" in name]
    assert square == pytest.approx([2.147 * 0.3025, 1.4942 * 0.55], rel=1e-3)
    for row in scaling():
        assert "40 nm to 22 nm" in row["assumptions"][0]
