"""SDDMM, sparse softmax and SpMM beside the dense product, softmax and product of torch.

The three unfused steps of sparse attention at the shape that Liu et al. (IEEE TC 2022, table 3 and
figure 11) time them at: Long Range Arena Text, 2000 tokens, 4 heads of 64, batch 16.  All
contenders of a step take turns in one process.  Dense results go into memory that is there already;
ours allocate theirs, from memory that the process keeps, as allocators on a GPU do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseloom.experiments.bench_cases import DTYPES
from sparseloom.experiments.bench_masks import random_mask
from sparseloom.experiments.on_device import Device, timed
from sparseloom.experiments.parts import kept_part
from sparseloom.experiments.timing import Timing
from sparseloom.kernels import sddmm, sparse_softmax, spmm
from sparseloom.mask import SparseMask

Step = Literal["sddmm", "softmax", "spmm"]
STEPS: tuple[Step, ...] = ("sddmm", "softmax", "spmm")
BLOCKS = ((1, 1), (4, 1), (8, 1))
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
Block = tuple[int, int]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the three steps; batch entries and heads are alike to them."""

    batch: int = 16
    heads: int = 4
    length: int = 2000
    head_dim: int = 64


SOFTMAX_SHARE = Shape(batch=1, heads=8, length=4096)
"""Where the paper says that softmax is 47 % of dense attention."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is timed.

    Attributes:
        shape: of table 3, at `table_sparsity`.
        curve: of figure 11, over `sparsities`.
        share: of the three dense steps on their own.
        repeats: measured rounds.
        dtypes: of the dense steps; the first is the baseline.
        sparse_dtype: of queries, keys and values in ours.
        device: where.
    """

    shape: Shape = Shape()
    curve: Shape = Shape()
    share: Shape = SOFTMAX_SHARE
    table_sparsity: float = 0.9
    sparsities: tuple[float, ...] = SPARSITIES
    repeats: int = 7
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sparse_dtype: str = "float32"
    device: Device = "cpu"


SMALL = Plan(curve=Shape(batch=4))
PAPER = Plan()


def on_card(plan: Plan) -> Plan:
    """The same on the current CUDA device, in FP16 as on the V100, beside other dense steps."""
    dtypes = ("float32", "float16", "bfloat16")
    return replace(plan, device="cuda", dtypes=dtypes, sparse_dtype="float16")


def run_study(
    plan: Plan, out: Path, *, seed: int = 0, step: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Rows of op "sddmm", "softmax" and "spmm"; parts that are in `out` are not timed again."""
    keep_freed_memory()
    runs: list[tuple[str, Step, Shape, tuple[float, ...]]] = []
    for name in STEPS:
        runs.append(("table3", name, plan.shape, (plan.table_sparsity,)))
        runs.append(("fig11", name, plan.curve, plan.sparsities))
    rows: list[Row] = []
    for label, name, shape, sparsities in runs:
        step(f"{label}: {name}, batch {shape.batch}, sparsity {', '.join(map(str, sparsities))}")
        settings = [asdict(plan) | {"shape": asdict(shape)}, sparsities, seed]
        rows += kept_part(
            out / f"{label}-{name}.json",
            settings,
            partial(time_step, name, shape, sparsities, plan, seed, label),
        )
    step(f"dense attention in three steps, {plan.share.length} tokens")
    rows += kept_part(
        out / "share.json",
        [asdict(plan.share), plan.repeats, seed, plan.device],
        partial(time_dense_steps, plan, seed),
    )
    return rows


def keep_freed_memory() -> None:
    """Make malloc keep what is freed; it gives large blocks back to Linux at once otherwise.

    A result of 32 MiB or more would then cost a page fault for every 4 KiB, each time, which is
    several times what the softmax takes.  Nothing happens where the C library is not GNU's.
    """
    largest, most_mapped, trim = (1 << 31) - 1, -4, -1  # parameters of mallopt(3)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(most_mapped, 0)
        library.mallopt(trim, largest)


def time_step(
    name: Step, shape: Shape, sparsities: Sequence[float], plan: Plan, seed: int, label: str
) -> list[Row]:
    """One step under every block and sparsity, beside the dense step in the plan's dtypes."""
    tensors = _Tensors.draw(shape, seed, plan.device)
    runs: dict[str, Callable[[], object]] = {
        f"dense {kind}": tensors.dense(name, DTYPES[kind]) for kind in plan.dtypes
    }
    about: dict[str, tuple[Block | None, float]] = dict.fromkeys(runs, (None, 0.0))
    for sparsity in sparsities:
        for block in BLOCKS:
            mask = random_mask(
                shape.length, shape.length, heads=tensors.query.shape[1], block_size=block,
                sparsity=sparsity, is_causal=False, seed=seed, device=plan.device,
            )  # fmt: skip
            key = f"{block[0]}x{block[1]} {sparsity}"
            runs[key] = tensors.sparse(name, mask, DTYPES[plan.sparse_dtype])
            about[key] = (block, sparsity)
    with torch.inference_mode():
        times = timed(runs, device=plan.device, repeats=plan.repeats)
    base = times["dense float32"]
    return [
        _row(name, label, shape, contender, block, sparsity, times[contender], base)
        | {"device": plan.device}
        | ({} if block is None else {"dtype": plan.sparse_dtype})
        for contender, (block, sparsity) in about.items()
    ]


def time_dense_steps(plan: Plan, seed: int) -> list[Row]:
    """The three dense steps in fp32 on their own, for the share of the softmax."""
    shape = plan.share
    tensors = _Tensors.draw(shape, seed, plan.device)
    runs = {name: tensors.dense(name, torch.float32) for name in STEPS}
    with torch.inference_mode():
        times = timed(runs, device=plan.device, repeats=plan.repeats)
    return [
        _row(name, "share", shape, "dense float32", None, 0.0, times[name], times[name])
        | {"device": plan.device}
        for name in STEPS
    ]


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Inputs of the dense steps; batch entries and heads as one dimension of heads."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def draw(cls, shape: Shape, seed: int, device: Device = "cpu") -> _Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        size = (1, shape.batch * shape.heads, shape.length, shape.head_dim)
        return cls(*(torch.randn(size, generator=generator, device=device) for _ in range(3)))

    def dense(self, name: Step, dtype: torch.dtype) -> Callable[[], object]:
        """The dense step, written into memory that has been touched before."""
        length, width = self.query.shape[2:]
        if name == "softmax":
            scores = self.query.new_zeros(*self.query.shape[:2], length, length, dtype=dtype)
            probs = torch.zeros_like(scores)
            return lambda: torch.softmax(scores, -1, out=probs)
        if name == "sddmm":
            q, k = (self.query * width**-0.5).to(dtype), self.key.to(dtype)
            out = q.new_zeros(*q.shape[:2], length, length)
            return lambda: torch.matmul(q, k.mT, out=out)
        probs = self.query.new_zeros(*self.query.shape[:2], length, length, dtype=dtype)
        value = self.value.to(dtype)
        out = torch.zeros_like(value)
        return lambda: torch.matmul(probs, value, out=out)

    def sparse(self, name: Step, mask: SparseMask, dtype: torch.dtype) -> Callable[[], object]:
        """The step on the kept blocks, with values between the steps in fp32."""
        query, key, value = (t.to(dtype) for t in (self.query, self.key, self.value))
        if name == "sddmm":
            return lambda: sddmm(query, key, mask)
        values = self.value.new_zeros(mask.nnz, *mask.block_size)
        if name == "softmax":
            return lambda: sparse_softmax(values, mask)
        return lambda: spmm(values, mask, value)


def _row(
    name: Step,
    label: str,
    shape: Shape,
    contender: str,
    block: Block | None,
    sparsity: float,
    time: Timing,
    base: Timing,
) -> Row:
    return {
        "op": name,
        "path": "given",
        "part": label,
        "contender": contender if block is None else "sparse",
        "batch": shape.batch,
        "heads": shape.heads,
        "q_len": shape.length,
        "kv_len": shape.length,
        "head_dim": shape.head_dim,
        "block_size": None if block is None else list(block),
        "sparsity": sparsity,
        "dtype": contender.removeprefix("dense "),
        "causal": False,
        "ms": time.ms,
        "spread": time.spread,
        "repeats": time.repeats,
        "baseline": "dense float32",
        "baseline_ms": base.ms,
        "speedup": base.ms / time.ms,
    }


def tiny() -> Plan:
    """A plan of milliseconds, for trying it out."""
    small = Shape(batch=1, heads=1, length=64, head_dim=16)
    return replace(SMALL, shape=small, curve=small, share=small, sparsities=(0.9,), repeats=2)
