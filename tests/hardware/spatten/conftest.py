"""Small traces that exercise one thing each, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Operator,
    Selection,
    Trace,
    Workload,
)
from sparseloom.trace.spatten_benchmarks import benchmark


@dataclass
class Maker:
    """Attention calls of one shape, with calls made one by one."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    batch: int = 1

    def operator(
        self,
        layer: int,
        q_len: int,
        kv_len: int,
        step: int = 0,
        *,
        causal: bool,
        padding: int | None,
    ) -> Operator:
        """One attention operator."""
        return Operator(
            kind="attention",
            role="attention",
            layer=layer,
            step=step,
            stage="decode" if q_len == 1 else "prefill",
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            is_causal=causal,
            padding=padding,
        )

    def trace(
        self,
        lengths: list[tuple[int, int]],
        call: Callable[[Operator], AttentionCall],
        *,
        causal: bool = False,
        paddings: tuple[np.ndarray, ...] = (),
    ) -> Trace:
        """A trace of (q_len, kv_len) per step; the selection is "some"."""
        shape = ModelShape(
            layers=self.layers,
            hidden_size=self.heads * self.head_dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )
        operators = tuple(
            self.operator(layer, q, kv, step, causal=causal, padding=0 if paddings else None)
            for step, (q, kv) in enumerate(lengths)
            for layer in range(self.layers)
        )
        workload = Workload(shape, operators, "made", paddings, scope="attention")
        return Trace(workload, {"some": Selection("some", tuple(call(op) for op in operators))})


def random_mask(
    rng: np.random.Generator, op: Operator, keep: float, *, heads: int | None = None
) -> MaskArrays:
    """Each pair kept with probability `keep`, at least one key per row."""
    shape = (op.batch, heads or op.heads, op.q_len, op.kv_len)
    kept = rng.random(shape) < keep
    kept[..., 0] = True
    return MaskArrays.from_bool(kept, is_causal=op.is_causal)


def counted() -> Trace:
    """As the authors' CSV files: counts without ids, 6 + 4 bits, local value pruning."""
    rng = np.random.default_rng(1)

    def call(op: Operator) -> AttentionCall:
        kept = 61 if op.layer == 0 else 23
        counts = np.full((1, 4, 1), kept)
        return AttentionCall(
            key_counts=counts,
            value_counts=counts // 5,
            key_bits=6,
            value_bits=6,
            lsb_bits=4,
            lsb_refetch=rng.random((1, 4, 1)) < 0.4,
            token_keep=23 if op.layer == 0 else 61,
        )

    return Maker().trace([(1, 80), (1, 81), (1, 82)], call)


def grouped() -> Trace:
    """Four query heads on two KV heads, each with keys of its own, prompt and generation."""
    rng = np.random.default_rng(2)

    def call(op: Operator) -> AttentionCall:
        return AttentionCall(mask=random_mask(rng, op, 0.3), key_bits=8, value_bits=8)

    return Maker(kv_heads=2).trace([(24, 24), (1, 25), (1, 26)], call, causal=True)


def reruns() -> Trace:
    """8 + 4 bits, every third head and query fetches its low bits; values pruned by a mask."""
    rng = np.random.default_rng(3)

    def call(op: Operator) -> AttentionCall:
        mask = random_mask(rng, op, 0.6)
        kept = mask.to_bool() & (rng.random((1, 4, 1, op.kv_len)) < 0.3)
        return AttentionCall(
            mask=mask,
            value_mask=MaskArrays.from_bool(kept),
            key_bits=8,
            value_bits=8,
            lsb_bits=4,
            lsb_refetch=np.arange(4)[None, :, None] % 3 == (op.layer or 0),
        )

    return Maker().trace([(1, 70), (1, 71), (1, 72), (1, 73)], call)


def padded() -> Trace:
    """Two sequences, one half padding, a causal prompt and a mask shared by all heads."""
    rng = np.random.default_rng(4)
    padding = np.ones((2, 40), np.bool_)
    padding[1, 20:] = False

    def call(op: Operator) -> AttentionCall:
        return AttentionCall(mask=random_mask(rng, op, 0.2, heads=1))

    return Maker(batch=2).trace([(40, 40)], call, causal=True, paddings=(padding,))


def edges() -> Trace:
    """Rows of one key, rows that keep no value, dead heads."""

    def call(op: Operator) -> AttentionCall:
        kept = np.zeros((1, 4, 1, op.kv_len), np.bool_)
        kept[0, :, 0, 3] = True
        kept[0, 2, 0, :] = True
        values = np.zeros_like(kept)
        values[0, 2, 0, :2] = op.layer == 1
        return AttentionCall(
            mask=MaskArrays.from_bool(kept),
            value_mask=MaskArrays.from_bool(values),
            key_bits=8,
            value_bits=8,
            heads_alive=np.array([True, op.layer == 0, True, True]),
        )

    return Maker().trace([(1, 33), (1, 34)], call)


def cola() -> Trace:
    """The smallest of the paper's benchmarks: BERT, cascade pruning of tokens and heads."""
    found = benchmark("bert-base-cola").trace()
    return Trace(found.workload, {"some": _named(found.selection("spatten"))})


def _named(selection: Selection) -> Selection:
    return Selection("some", selection.calls, selection.method, selection.quality)


TRACES = {
    "counted": counted,
    "grouped": grouped,
    "reruns": reruns,
    "padded": padded,
    "edges": edges,
    "cola": cola,
}


@pytest.fixture(scope="session")
def traces() -> dict[str, Trace]:
    """All of them, made once."""
    return {name: make() for name, make in TRACES.items()}


@pytest.fixture(scope="session")
def maker() -> type[Maker]:
    """For traces of a test's own."""
    return Maker
