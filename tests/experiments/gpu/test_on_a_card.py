"""What only a card can tell: the benchmark from end to end, at small sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparseloom.experiments import end_to_end, unfused_time
from sparseloom.experiments.bench_cases import AttentionCase
from sparseloom.experiments.gpu import contenders
from sparseloom.experiments.gpu.bench import bench_cuda
from sparseloom.experiments.gpu.clock import CudaClock
from sparseloom.experiments.gpu.peaks import measure_peaks
from sparseloom.kernels import attention
from sparseloom.results import results

pytestmark = pytest.mark.gpu

CASE = AttentionCase(
    q_len=2048, kv_len=2048, heads=4, kv_heads=4, head_dim=128, block_size=(64, 1), sparsity=0.9,
    dtype="bfloat16",
)  # fmt: skip


def test_a_graph_computes_what_the_call_does() -> None:
    a = torch.randn(256, 256, device="cuda")
    out = torch.zeros_like(a)
    ready = CudaClock().prepare(lambda: torch.matmul(a, a, out=out))
    assert ready.captured, ready.note
    out.zero_()
    assert 0 < CudaClock().seconds(ready, 10) < 0.1
    torch.testing.assert_close(out, a @ a)


def test_peaks_are_in_order() -> None:
    peaks = measure_peaks(CudaClock(), repeats=3, size=4096, copied=256 << 20)
    assert peaks.int8_gops > peaks.bf16_gflops > peaks.gflops > 1000
    assert peaks.dram_gbytes_s > 100


@pytest.mark.parametrize("gradients", [False, True])
def test_every_contender_computes_what_it_should(gradients: bool) -> None:
    case = dataclasses.replace(CASE, gradients=gradients)
    found, memory, refused = contenders.contenders_of(case, contenders.makers_of(case, 0))
    assert contenders.OURS in found, refused
    assert contenders.WHOLE in found, refused
    assert any(name in found for name in contenders.SDPA), refused
    assert all(memory[name].total >= memory[name].result > 0 for name in found)
    if gradients:
        return
    drawn = contenders.draw_tensors(case, 0, "cuda").to(torch.bfloat16, gradients=False)
    q, k, v = (t.double() for t in (drawn.query, drawn.key, drawn.value))
    with torch.inference_mode():
        for name, contender in found.items():
            if contender.path == "given":
                expected = attention(q, k, v, contender.mask, is_causal=True, backend="reference")
                error = (contender.run().double() - expected).norm() / expected.norm()
                assert error < 1e-2, f"{name}: {error}"


def test_the_benchmark_from_end_to_end() -> None:
    rows = bench_cuda([CASE], repeats=3)
    assert results(rows).rows
    timed = {row["contender"]: row for row in rows if row.get("op")}
    assert {contenders.OURS, contenders.WHOLE, contenders.SELECT} <= timed.keys()
    for row in timed.values():
        assert row["ms"] > 0
        assert row.get("peak_fraction", 0.5) < 1.2
    assert timed[contenders.OURS]["timed_as"] == "graph", timed[contenders.OURS]


def test_memory_grows_with_kept_pairs() -> None:
    taken = []
    for length in (4096, 16384):
        case = dataclasses.replace(CASE, q_len=length, kv_len=length, sparsity=0.95)
        _, memory, refused = contenders.contenders_of(
            case,
            {contenders.WHOLE: contenders.makers_of(case, 0)[contenders.WHOLE]},
        )
        assert not refused
        taken.append(memory[contenders.WHOLE].total)
    assert taken[1] <= 1.1 * 16 * taken[0]
    # The scores of one head alone would be this large in bf16.
    assert taken[1] < 2 * CASE.heads * 16384**2


def test_the_tables_of_the_paper_run(tmp_path) -> None:
    plan = unfused_time.on_card(unfused_time.tiny())
    rows = unfused_time.run_study(plan, tmp_path)
    assert {row["device"] for row in rows} == {"cuda"}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    small = end_to_end.Plan(batch=1, length=256, layers=1, repeats=2)
    rows = end_to_end.run_study(end_to_end.on_card(small), tmp_path)
    assert {row["contender"] for row in rows} == {
        end_to_end.SDPA, end_to_end.EAGER, *end_to_end.METHODS,
    }  # fmt: skip
    assert all(row["peak_bytes"] > 0 for row in rows)
