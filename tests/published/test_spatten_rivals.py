"""SpAtten's rivals: published arithmetic in one unit, and A3's published ranges."""

from __future__ import annotations

import pytest

from sparseloom.experiments.reproduce.spatten_rivals import TABLES, a3_gains, table3


def test_table3_in_both_units() -> None:
    rows = {row["quantity"]: row for row in table3()}
    found = rows["A3 base with the published speed-up, GOP/s (two operations per MAC)"]
    assert found["ours"] == pytest.approx(431, abs=1)
    assert isinstance(found["published"], str)
    assert found["ours"] / 1.73 == pytest.approx(249, abs=0.1)
    assert rows["A3, 128 multipliers × 1.73, GOP/s"]["within"]
    assert rows["SpAtten-1/8 over A3, throughput, one unit for both"]["ours"] < 1
    judged = [row for row in rows.values() if row["within"] is not None]
    assert all(row["within"] for row in judged)
    assert all(row["assumptions"] for row in rows.values() if row["basis"] == "scenario")
    assert list(TABLES) == ["table3", "a3-ranges", "devices"]


@pytest.mark.parametrize(
    ("length", "kept", "throughput", "latency"),
    [(20, 3, 2.4, 1.9), (186, 5, 6.1, 6.5), (320, 5, 6.7, 8.0)],
)
def test_a3_gains(length: int, kept: int, throughput: float, latency: float) -> None:
    """2.6–7.0× throughput and 1.6–8.0× latency over n = 20 … 320, aggressive setting."""
    found = a3_gains(length, kept=kept)
    assert found == pytest.approx((throughput, latency), abs=0.06)
    conservative = a3_gains(length, kept=kept, iterations_share=0.5, candidate_share=0.33)
    assert 1.5 < conservative[0] < 2.0
