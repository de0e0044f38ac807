"""The rows of the benchmark on a card: arithmetic, on times that are ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseloom.experiments.bench_cases import AttentionCase
from sparseloom.experiments.bench_contenders import Contender
from sparseloom.experiments.gpu import contenders
from sparseloom.experiments.gpu.bench import after_rule, fastest_dense, rows_of
from sparseloom.experiments.gpu.clock import Ready
from sparseloom.experiments.gpu.goals import goals
from sparseloom.experiments.gpu.memory import Peak
from sparseloom.experiments.gpu.peaks import GpuPeaks
from sparseloom.experiments.timing import Timing
from sparseloom.methods import costs
from sparseloom.results import results

CASE = AttentionCase(
    q_len=256, kv_len=256, heads=2, kv_heads=2, head_dim=16, block_size=(64, 1), sparsity=0.75,
    dtype="bfloat16",
)  # fmt: skip
PEAKS = GpuPeaks(1.0, 1000.0, 900.0, 2000.0, 400.0)
TIMES = {"sdpa cudnn": 3.0, "sdpa flash": 2.0, "triton": 0.5, "dynamic": 1.0, "select": 0.4}


def time(ms: float) -> Timing:
    return Timing(ms=ms, spread=0.1, repeats=5, best_ms=0.9 * ms)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    mask = contenders.draw_mask(CASE, CASE.block_size, 0, "cpu")
    paths = {"triton": "given", "dynamic": "whole", "select": "select"}
    found = {
        name: Contender(lambda: None, mask, paths[name], "int4" if name == "select" else "bfloat16")
        if name in paths
        else Contender(lambda: None, None, "given", "bfloat16")
        for name in TIMES
    }
    ready = {name: Ready(lambda: None, captured=True) for name in TIMES}
    ready["dynamic"] = Ready(lambda: None, captured=False, note="it waits")
    peaks = {name: Peak(3000, 1000) for name in TIMES}
    times = {name: time(ms) for name, ms in TIMES.items()}
    made = rows_of(CASE, found, ready, times, peaks, PEAKS, 0, None)
    assert results(made).rows
    return {row["contender"]: row for row in made}


def test_the_baseline_is_the_fastest_kernel_of_sdpa(rows) -> None:
    for name, row in rows.items():
        assert (row["baseline"], row["baseline_ms"]) == ("sdpa flash", 2.0)
        assert row["speedup"] == pytest.approx(2.0 / TIMES[name])
    with pytest.raises(RuntimeError, match="no kernel of SDPA took this call"):
        fastest_dense({"triton": time(1.0)})


def test_operations_are_those_on_kept_pairs(rows) -> None:
    allowed = 2 * 256 * 257 // 2
    dense, ours = rows["sdpa flash"], rows["triton"]
    assert dense["density"] == 1.0
    assert dense["gflops"] == pytest.approx(4 * 16 * allowed / 2.0 / 1e6)
    assert dense["peak_fraction"] == pytest.approx(dense["gflops"] / 1000.0)
    mask = contenders.draw_mask(CASE, CASE.block_size, 0, "cpu")
    pairs = int(mask.kept_pairs(is_causal=True).sum())
    assert ours["density"] == pytest.approx(pairs / allowed)
    assert ours["gflops"] == pytest.approx(4 * 16 * pairs / 0.5 / 1e6)
    # Queries, keys, values and the output once, in bf16, and four bytes for each index.
    moved = 4 * 2 * 256 * 16 * 2 + 4 * mask.nnz
    assert ours["gbytes_s"] == pytest.approx(moved / 0.5 / 1e6)
    # A row of keys and one of values for each entry.
    assert ours["gathered_gbytes_s"] == pytest.approx(mask.nnz * 2 * 16 * 2 / 0.5 / 1e6)
    assert ours["gathered_fraction"] == pytest.approx(ours["gathered_gbytes_s"] / 400.0)
    assert "gathered_gbytes_s" not in dense


def test_what_a_row_tells_of_its_measurement(rows) -> None:
    assert rows["triton"]["timed_as"] == "graph"
    assert "why_no_graph" not in rows["triton"]
    assert rows["dynamic"]["timed_as"] == "launches"
    assert rows["dynamic"]["why_no_graph"] == "it waits"
    assert (rows["dynamic"]["peak_bytes"], rows["dynamic"]["extra_bytes"]) == (3000, 2000)
    assert "gflops" not in rows["select"]  # it computes no attention
    assert (rows["select"]["bits"], rows["select"]["projection"]) == (4, 0.25)


def table(attend: float) -> costs.CostTable:
    """Dense pairs cost one unit, kept ones `attend`, selection nothing."""
    return costs.CostTable(
        cpu="a card", tier="sm_90", threads=1, date="2026-01-01", command="none", versions={},
        unit_seconds=1e-12, dense={"bfloat16": {"pairs": 1.0}},
        attend={"bfloat16": {"64x1": {"pairs": attend}}}, select={"64x1": {"call": 1.0}},
    )  # fmt: skip


def test_the_cost_rule_falls_back_to_dense() -> None:
    slow = {"ms": 3.0, "baseline_ms": 2.0, "speedup": 2 / 3}
    assert after_rule(slow | {"rule": "dense"}, table(9.0))["rule_over_dense"] == 1.0
    assert after_rule(slow | {"rule": "sparse"}, table(0.1))["rule_over_dense"] == 1.5
    unknown = after_rule(slow, None)
    assert unknown == {"rule": "none", "rule_ms": 3.0, "rule_over_dense": pytest.approx(1.5)}


@pytest.mark.parametrize(("attend", "verdict"), [(0.5, "sparse"), (9.0, "dense")])
def test_rows_carry_what_the_table_of_the_card_says(attend: float, verdict: str) -> None:
    mask = contenders.draw_mask(CASE, CASE.block_size, 0, "cpu")
    found = {
        "sdpa flash": Contender(lambda: None, None, "given", "bfloat16"),
        "dynamic": Contender(lambda: None, mask, "whole", "bfloat16"),
    }
    some = {name: Ready(lambda: None, captured=True) for name in found}
    times = {name: time(TIMES[name]) for name in found}
    peaks = dict.fromkeys(found, Peak(1, 1))
    row = rows_of(CASE, found, some, times, peaks, PEAKS, 0, table(attend))[-1]
    assert row["rule"] == verdict
    assert row["rule_over_dense"] == (0.5 if verdict == "sparse" else 1.0)


def whole(length: int, speedup: float, peak: int = 1000, **changes: Any) -> dict[str, Any]:
    return {
        "op": "attention", "contender": "dynamic", "q_len": length, "block_size": [64, 1],
        "sparsity": 0.95, "dtype": "bfloat16", "density": 0.05, "speedup": speedup,
        "rule_over_dense": 1 / speedup, "peak_bytes": peak, **changes,
    }  # fmt: skip


def test_goals_of_the_whole_path() -> None:
    rows = [whole(8192, 2.0), whole(32768, 3.9, 16_000), whole(131072, 0.5, 300_000)]
    found = {row["name"]: row for row in goals(rows)}
    met = {name: row["met"] for name, row in found.items()}
    assert met == {
        "whole path, 64x1 at 95%, 8192 tokens: times SDPA": True,
        "whole path, 64x1 at 95%, 32768 tokens: times SDPA": False,
        "whole path, 64x1 at 95%, 131072 tokens: times SDPA": False,
        "after the cost rule, 64x1 at 95%, 8192 tokens: over dense": True,
        "after the cost rule, 64x1 at 95%, 32768 tokens: over dense": True,
        "after the cost rule, 64x1 at 95%, 131072 tokens: over dense": False,
        # 16 times as long, 256 times the kept pairs, 300 times the memory.
        "peak memory, 64x1 at 95%, 131072 tokens over 8192: growth over that of kept pairs": False,
    }
    growth = next(row for name, row in found.items() if name.startswith("peak memory"))
    assert growth["value"] == pytest.approx(300 / 256)


def test_goals_of_the_kernel() -> None:
    dense = {"op": "attention", "contender": "sdpa flash", "q_len": 8192, "baseline_ms": 2.0,
             "baseline": "sdpa flash", "gflops": 600.0}  # fmt: skip
    other = dense | {"baseline_ms": 4.0, "gflops": 1.0}
    ours = {**dense, "contender": "triton", "block_size": [64, 1], "sparsity": 0.9,
            "gflops": 299.0}  # fmt: skip
    (found,) = goals([other, dense, ours])
    assert found["name"] == "kernel, 64x1 at 90%, 8192 tokens: of SDPA's rate"
    assert found["value"] == pytest.approx(299 / 600)
    assert not found["met"]
    assert goals([{"record": "card"}]) == []


def test_contenders_compute_the_same_where_they_run() -> None:
    """On the CPU there are SDPA's plain and flash kernels, and no more of these."""
    makers = contenders.makers_of(CASE, 0, "cpu")
    assert list(makers) == [
        "sdpa cudnn", "sdpa flash", "sdpa efficient", "sdpa math", "flex causal", "flex 128x128",
        "triton", "dynamic", "select", "quantise and project",
    ]  # fmt: skip
    with torch.inference_mode():
        out = makers["sdpa flash"]().run()
        cudnn = makers["sdpa cudnn"]()
        with pytest.raises(NotImplementedError):
            cudnn.run()
        chosen = makers["select"]().run()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (1, 2, 256, 16)
    assert (chosen.block_size, chosen.heads) == ((64, 1), 2)
