"""The benchmark of decoding: its contenders, what it says they read, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest

from sparseloom.experiments.bench_decode import DecodeCase, bench_decode
from sparseloom.kernels.cpu import native
from sparseloom.kernels.cpu.peaks import Peaks
from sparseloom.results import BenchRow

PEAKS = Peaks("torch", None, 2, 100.0, None, None, 10.0, None)
OURS = {"cpu", "cpu bfloat16", "cpu int8", "progressive", "progressive+low"}


def _rows(case: DecodeCase) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in bench_decode([case], repeats=1, peaks=PEAKS)}


@pytest.mark.parametrize(("heads", "q_len"), [(2, 1), (4, 3)])
def test_rows_say_what_was_read(heads: int, q_len: int) -> None:
    if (reason := native.missing_reason()) is not None:
        pytest.skip(f"no C++ backend: {reason}")
    case = DecodeCase(kv_len=400, heads=heads, kv_heads=2, q_len=q_len, kept=0.25)
    rows = _rows(case)
    assert set(rows) == OURS | {"sdpa", "sdpa bfloat16"}
    elements = 2 * 2 * 400 * 64
    for name, width in [("sdpa", 4), ("sdpa bfloat16", 2), ("cpu", 4), ("cpu int8", 1)]:
        assert rows[name]["bytes_read"] == elements * width
    if q_len == 1:
        listed = 2 * 100 * (64 + 8) + heads * 20 * 64
        assert rows["progressive"]["bytes_read"] == listed
        assert rows["progressive+low"]["bytes_read"] == listed + 2 * 100 * 32
    assert rows["progressive"]["refetched"] == 0
    assert rows["progressive+low"]["refetched"] == 1
    for row in rows.values():
        BenchRow.model_validate({"record": "bench", **row})
        assert row["gbytes_s"] == pytest.approx(row["bytes_read"] / row["ms"] / 1e6)
        assert row["peak_fraction"] == pytest.approx(row["gbytes_s"] / 10)
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"])


def test_without_the_library_the_rows_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: "no compiler")
    rows = _rows(DecodeCase(kv_len=40, heads=1, kv_heads=1))
    assert {name for name, row in rows.items() if row.get("note") == "no compiler"} == OURS
    assert rows["sdpa"]["ms"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"q_len": 0}, "q_len must be at least 1, got 0"),
        ({"heads": 5}, "heads must be a multiple of kv_heads, got 5 and 8"),
        ({"kept": 0.0}, r"kept must be in \(0, 1\], got 0.0"),
        ({"value_keep": 1.5}, r"value_keep must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_cases_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecodeCase(**settings)
