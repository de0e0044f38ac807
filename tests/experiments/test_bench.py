"""The attention benchmark: what it draws and what it counts, not how fast anything is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from sparseloom.experiments import bench
from sparseloom.experiments.bench import AttentionCase, bench_attention, bench_predict
from sparseloom.experiments.bench_contenders import contenders_of, kernels_and_peers
from sparseloom.experiments.bench_memory import peak_bytes
from sparseloom.kernels.cpu.peaks import Peaks
from sparseloom.mask import SparseMask
from sparseloom.results import results

SMALL = {"q_len": 48, "kv_len": 48, "heads": 2, "kv_heads": 1, "head_dim": 16}


@pytest.fixture(autouse=True)
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks take a second or two to measure; they have tests of their own."""
    found = Peaks("registers", "avx2", 1, 10.0, None, 40.0, 5.0, 50.0)
    monkeypatch.setattr(bench, "measure_peaks", lambda: found)


def drawn(case: AttentionCase, seed: int = 0) -> SparseMask:
    return bench.mask_of(case, seed)


@pytest.mark.parametrize("block_size", [(1, 1), (8, 1), (5, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_mask_keeps_the_budget_of_every_block(block_size: tuple[int, int], causal: bool) -> None:
    case = AttentionCase(**SMALL, block_size=block_size, sparsity=0.75, causal=causal)
    mask = drawn(case, seed=1)
    columns = math.ceil(48 / block_size[1])
    for row in range(mask.q_blocks):
        last = min((row + 1) * block_size[0], 48) - 1
        allowed = last // block_size[1] + 1 if causal else columns
        assert (mask.counts[0, :, row] == math.ceil(0.25 * allowed)).all()
        first = mask.indices[mask.offsets[0, 0, row] : mask.offsets[0, 0, row + 1]]
        assert first[-1] == allowed - 1
    assert drawn(case, seed=1) == mask
    assert drawn(case, seed=2) != mask


def test_mask_of_a_longer_cache_ends_at_the_last_key() -> None:
    case = AttentionCase(**{**SMALL, "q_len": 4}, sparsity=0.9)
    mask = drawn(case)
    assert mask.to_bool()[0, 0].nonzero()[:, 1].max() == 47
    assert [int(row.max()) for row in mask.to_bool()[0, 0].long().cumsum(-1)] == [5, 5, 5, 5]


def test_random_keys_are_spread_evenly() -> None:
    case = AttentionCase(q_len=512, kv_len=512, sparsity=0.9, causal=False)
    columns = drawn(case).to_bool()[0].float().mean(dim=(0, 1))[:-1]
    assert columns.mean() == pytest.approx(51 / 511, rel=0.02)
    assert columns.min() > 0.07
    assert columns.max() < 0.13


def test_rows_fit_the_schema_and_add_up() -> None:
    case = AttentionCase(**SMALL, sparsity=0.5)
    rows = bench_attention([case], backends=["reference", "flex", "masked", "csr"], repeats=1)
    assert results(rows).rows
    timed = {row["contender"]: row for row in rows if "op" in row}
    assert {"sdpa float32", "reference", "masked", "dynamic"} == timed.keys()
    dense, given = timed["sdpa float32"], timed["reference"]
    assert (dense["density"], dense["mask"], given["mask"]) == (1, None, "random")
    pairs = drawn(case).kept_pairs(is_causal=True).sum().item()
    assert given["gflops"] * given["ms"] == pytest.approx(4 * 16 * pairs / 1e6)
    assert given["peak_fraction"] == pytest.approx(given["gflops"] / 10)
    assert given["baseline_ms"] == dense["ms"]
    assert timed["dynamic"]["path"] == "whole"
    assert timed["dynamic"]["rule"] in ("sparse", "dense")
    assert timed["dynamic"]["pooling"] == "mass"
    refused = {row["contender"]: row["note"] for row in rows if row.get("record") == "refused"}
    assert refused.keys() == {"flex", "csr"}
    assert "1 key" in refused["csr"] or "as many key heads" in refused["csr"]
    assert rows[0]["record"] == "peaks"


def test_every_contender_computes_the_same() -> None:
    case = AttentionCase(**{**SMALL, "kv_heads": 2}, sparsity=0.7)
    mask = drawn(case)
    names = [name for name, reason in kernels_and_peers().items() if reason is None]
    found, refused = contenders_of(case, mask, names, 0)
    assert {"csr", "masked", "reference"} <= found.keys()
    assert all(refused.values())
    with torch.inference_mode():
        expected = found["reference"].run()
        assert isinstance(expected, torch.Tensor)
        for name, contender in found.items():
            if contender.mask is mask:
                torch.testing.assert_close(contender.run(), expected, msg=name)


def test_gradients_are_those_of_three_inputs() -> None:
    case = AttentionCase(**SMALL, sparsity=0.7, gradients=True)
    found, refused = contenders_of(case, drawn(case), ["reference", "csr"], 0)
    assert {"sdpa float32", "reference", "dynamic"} == found.keys()
    assert "forward" in refused["csr"]
    for contender in found.values():
        grads = contender.run()
        assert isinstance(grads, tuple)
        shapes = [tuple(grad.shape) for grad in grads]
        assert shapes == [(1, 2, 48, 16), (1, 1, 48, 16), (1, 1, 48, 16)]
    rows = bench_attention([case], backends=["reference"], repeats=1)
    timed = [row for row in rows if "op" in row]
    assert {row["passes"] for row in timed} == {"forward+backward"}
    assert results(rows).rows


def test_half_precision_is_compared_with_both_baselines() -> None:
    case = AttentionCase(**SMALL, dtype="bfloat16")
    rows = bench_attention([case], backends=["reference"], repeats=1)
    timed = {row["contender"]: row for row in rows if "op" in row}
    assert timed.keys() == {"sdpa float32", "sdpa bfloat16", "reference", "dynamic"}
    assert {row["baseline_ms"] for row in timed.values()} == {timed["sdpa float32"]["ms"]}
    assert timed["reference"]["dtype"] == "bfloat16"


def test_prediction_alone() -> None:
    case = AttentionCase(**{**SMALL, "kv_heads": 2}, block_size=(8, 1), pooling="max")
    rows = bench_predict([case], repeats=1)
    assert results(rows).rows
    row = rows[-1]
    assert (row["op"], row["path"], row["contender"]) == ("predict", "select", "select")
    assert (row["pooling"], row["bits"], row["projection"]) == ("max", 4, 0.25)
    ops = 2 * (48 * 32 * 2 * 2 * 4 + 2 * 48 * 49 // 2 * 4)  # width 4 of 16, two heads
    assert row["gflops"] * row["ms"] == pytest.approx(ops / 1e6)
    assert row["peak_fraction"] == pytest.approx(row["gflops"] / 40)
    with pytest.raises(ValueError, match="as many queries as keys"):
        bench_predict([dataclasses.replace(case, q_len=8)])


def test_masks_of_the_model_are_its_own() -> None:
    case = AttentionCase(q_len=96, kv_len=96, heads=6, kv_heads=6, mask="model", sparsity=0.5)
    mask = drawn(case)
    assert (mask.heads, mask.q_len, mask.kv_len) == (6, 96, 96)
    assert mask.density(is_causal=True) == pytest.approx(0.5, abs=0.1)
    keep = mask.to_bool()[0]
    assert not keep.triu(1).any()
    assert (keep[0] != keep[4]).any()  # another layer
    shared = (keep[:, 1:] & keep[:, :-1]).sum() / keep[:, :-1].sum()
    assert shared > 0.6  # neighbouring rows agree more than chance would have it
    with pytest.raises(ValueError, match="at most 2048 tokens, got 4096"):
        drawn(dataclasses.replace(case, q_len=4096, kv_len=4096))
    with pytest.raises(ValueError, match="has 16 heads in all layers, got 32"):
        drawn(dataclasses.replace(case, heads=32, kv_heads=32))
    with pytest.raises(ValueError, match="mask 'model' is causal"):
        dataclasses.replace(case, causal=False)
    with pytest.raises(ValueError, match="mask must be random, model or one"):
        drawn(dataclasses.replace(case, mask="mine"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_the_call() -> None:
    case = AttentionCase(q_len=1024, kv_len=1024, heads=4, kv_heads=4, sparsity=0.5, causal=False)
    output, scores = 4 * 1024 * 64 * 4, 4 * 1024 * 1024 * 4
    dense = peak_bytes(case, "sdpa float32")
    reference = peak_bytes(case, "reference")
    assert dense is not None
    assert reference is not None
    assert output / 2 < dense < scores
    assert reference > scores  # it holds scores of all pairs, and more than one copy
    with pytest.raises(RuntimeError, match="'nobody' was not measured: unknown backend"):
        peak_bytes(case, "nobody")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_len": 0}, "q_len must be at least 1, got 0"),
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"pooling": "sum"}, "pooling must be"),
        ({"q_len": 64}, "q_len must not exceed kv_len"),
    ],
)
def test_impossible_cases_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionCase(**{**SMALL, **change})  # type: ignore[arg-type]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend 'cuda' cannot be timed"):
        bench_attention([AttentionCase(**SMALL)], backends=["cuda"])
