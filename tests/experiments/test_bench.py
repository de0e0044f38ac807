"""The attention benchmark: what it draws and what it counts, not how fast anything is."""

from __future__ import annotations

import math

import pytest
import torch

from sparseloom.experiments.bench import AttentionCase, bench_attention, measure_peak, random_mask
from sparseloom.results import results

SMALL = {"q_len": 48, "kv_len": 48, "heads": 2, "kv_heads": 1, "head_dim": 16}


@pytest.mark.parametrize("block_size", [(1, 1), (8, 1), (5, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_mask_keeps_the_budget_of_every_block(block_size: tuple[int, int], causal: bool) -> None:
    case = AttentionCase(**SMALL, block_size=block_size, sparsity=0.75, causal=causal)
    mask = random_mask(case, seed=1)
    columns = math.ceil(48 / block_size[1])
    for row in range(mask.q_blocks):
        last = min((row + 1) * block_size[0], 48) - 1
        allowed = last // block_size[1] + 1 if causal else columns
        assert (mask.counts[0, :, row] == math.ceil(0.25 * allowed)).all()


def test_mask_of_a_longer_cache_ends_at_the_last_key() -> None:
    case = AttentionCase(**{**SMALL, "q_len": 4}, sparsity=0.9)
    mask = random_mask(case, seed=0)
    assert mask.to_bool()[0, 0].nonzero()[:, 1].max() == 47
    assert [int(row.max()) for row in mask.to_bool()[0, 0].long().cumsum(-1)] == [5, 5, 5, 5]


def test_rows_fit_the_schema_and_add_up() -> None:
    case = AttentionCase(**SMALL, sparsity=0.5)
    rows = bench_attention([case], backends=["reference", "flex"], repeats=1)
    assert results(rows).rows
    timed = {row["contender"]: row for row in rows if "op" in row}
    assert {"sdpa", "reference", "dynamic"} <= timed.keys()
    dense, given = timed["sdpa"], timed["reference"]
    assert dense["density"] == 1
    pairs = random_mask(case, seed=0).kept_pairs(is_causal=True).sum().item()
    assert given["gflops"] * given["ms"] == pytest.approx(4 * 16 * pairs / 1e6)
    refused = [row for row in rows if row.get("record") == "refused"]
    assert all(row["note"] for row in refused)
    assert {row["contender"] for row in refused} <= {"flex"}


def test_peak_is_positive() -> None:
    peak = measure_peak(torch.float32, size=64, repeats=1)
    assert peak.gflops > 0
    assert peak.gbytes_s > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_len": 0}, "q_len must be at least 1, got 0"),
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"q_len": 64}, "q_len must not exceed kv_len"),
    ],
)
def test_impossible_cases_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionCase(**{**SMALL, **change})  # type: ignore[arg-type]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend 'cuda' cannot be timed"):
        bench_attention([AttentionCase(**SMALL)], backends=["cuda"])
