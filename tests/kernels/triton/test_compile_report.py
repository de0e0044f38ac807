"""Kernels compiled for cards that are not there. One process compiles all that is looked at."""

from __future__ import annotations

import subprocess

import pytest

from sparseloom.kernels.triton.compile_report import (
    CompileReport,
    assembler_version,
    compile_report,
    reports_of,
    tensor_core_instructions,
)

triton = pytest.importorskip("triton")

KERNELS = """
import triton
import triton.language as tl
from sparseloom.kernels.triton.compile_report import Variant

@triton.jit
def product(a, b, out, steps, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None]
    total = tl.zeros((N, N), tl.float32)
    for step in range(steps):
        total = tl.dot(tl.load(a + step * N * N + tile), tl.load(b + step * N * N + tile), total)
    tl.store(out + tile, total)

@triton.jit
def crowded(a, out, steps, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.load(a + i)
    for step in range(steps):
        total = total * tl.load(a + step) + tl.load(a + step + N + i)
    tl.store(out + i, total)

def compiled_variants():
    types = {"a": "*bf16:16", "b": "*bf16:16", "out": "*fp32:16", "steps": "i32", "N": "constexpr"}
    yield Variant("product", product, types, {"N": 64}, {"num_warps": 4, "num_stages": 2})
    yield "product on Hopper", product, types, {"N": 128}, {"num_warps": 8}, (90,)
    types = {"a": "*fp32:16", "out": "*fp32:16", "steps": "i32", "N": "constexpr"}
    yield "crowded", crowded, types, {"N": 2048}, {"num_warps": 1, "maxnreg": 32}, (80,)
    yield "left out", crowded, types, {"N": 2048}
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], CompileReport]:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "some_kernels.py").write_text(KERNELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        # The command compiles all the same: the variable does not reach it.
        patch.setenv("TRITON_INTERPRET", "1")
        found = reports_of(["some_kernels"], only="^(product|crowded)")
    return {(report.name, report.arch): report for report in found}


def test_each_variant_is_compiled_for_its_architectures(reports):
    assert set(reports) == {
        ("product", 80), ("product", 90), ("product on Hopper", 90), ("crowded", 80),
    }  # fmt: skip


def test_tensor_core_instructions_of_both_generations(reports):
    assert reports["product", 80].tensor_cores == ("mma.m16n8k16.f32.bf16.bf16.f32",)
    assert reports["product", 90].tensor_cores == ("wgmma.m64n64k16.f32.bf16.bf16",)
    assert reports["crowded", 80].tensor_cores == ()


def test_what_a_block_takes(reports):
    report = reports["product", 90]
    # Two stages of two 64 x 64 bf16 tiles, and the few bytes of the barriers between them.
    assert 2 * 2 * 64 * 64 * 2 <= report.shared_bytes < 2 * 2 * 64 * 64 * 2 + 1024
    assert report.threads == 128
    assert 32 < report.registers <= 255
    assert 0 < report.warps_per_multiprocessor <= 64
    assert not report.serialized
    assert reports["product on Hopper", 90].threads == 256


def test_what_fits_in_registers_does_not_spill(reports):
    for arch in (80, 90):
        report = reports["product", arch]
        assert report.stack_bytes == report.spill_store_bytes == report.spill_load_bytes == 0
        assert report.loop_spill_bytes == 0


def test_spills_are_counted_and_those_in_loops_told(reports):
    report = reports["crowded", 80]  # 64 sums per thread in 32 registers
    assert report.registers == 32
    assert report.stack_bytes >= 4 * (64 - 32)
    assert report.spill_store_bytes > 0
    spilled = report.spill_store_bytes + report.spill_load_bytes
    assert 0 < report.loop_spill_bytes <= spilled


def test_instructions_are_told_from_ptx():
    ptx = """
        wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f1}, %rd1, %rd2, p, 1, 1;
        wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f2}, %rd1, %rd2, p, 1, 1;
        wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%r1}, %rd1, %rd2, p;
        mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};
        fma.rn.f32 %f1, %f2, %f3, %f4;
    """
    assert tensor_core_instructions(ptx) == (
        "mma.m16n8k32.s32.s8.s8.s32",
        "wgmma.m64n128k32.f32.e4m3.e4m3",
        "wgmma.m64n64k32.s32.s8.s8",
    )


def test_failures_say_what_the_compiler_said(monkeypatch):
    def failed(words, **_):
        return subprocess.CompletedProcess(words, 1, "", "PassManager::run failed")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match=r"kernels failed:\nPassManager::run failed"):
        reports_of(["some_kernels"])
    with pytest.raises(ValueError, match=r"arch must be one of 80, 90 .*, got 70"):
        reports_of(["some_kernels"], archs=[70])


def test_what_cannot_be_compiled_is_refused():
    def kernel(a, out):
        pass

    with pytest.raises(RuntimeError, match=r"kernel kernel must be one that triton.jit compiles"):
        compile_report(kernel, {}, {})
    compiled = triton.JITFunction(kernel)
    with pytest.raises(ValueError, match=r"signature must name every .* \['out'\] are missing"):
        compile_report(compiled, {"a": "*bf16"}, {})
    with pytest.raises(ValueError, match=r"arch must be one of 80, 90 .*, got 100"):
        compile_report(compiled, {"a": "*bf16", "out": "*bf16"}, {}, arch=100)


def test_the_assembler_has_a_version():
    assert assembler_version().split(".")[0].isdigit()
