"""Operators, workloads, calls, and the pairs they count."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Operator,
    Selection,
    Trace,
    TraceError,
    Workload,
    transformer_operators,
)

SHAPE = ModelShape(
    layers=2, hidden_size=16, heads=4, kv_heads=2, head_dim=4, intermediate_size=32, vocab_size=10
)


def attention(**changes: object) -> Operator:
    sizes: dict[str, object] = {
        "kind": "attention",
        "heads": 4,
        "kv_heads": 2,
        "q_len": 4,
        "kv_len": 4,
        "head_dim": 4,
        "value_dim": 4,
    }
    return Operator.model_validate(sizes | changes)


def test_neither_traces_nor_hardware_load_torch() -> None:
    code = (
        "import sys, sparseloom.trace, sparseloom.hardware, sparseloom.results, "
        "sparseloom.hardware.dota; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_layer_has_the_textbook_multiplications() -> None:
    operators = transformer_operators(SHAPE, q_len=8)
    by_role = {
        role: sum(op.macs for op in operators if op.role == role and op.kind == "gemm")
        for role in ("qkv", "attention_output", "ffn", "head")
    }
    # Two of the four key and value heads are shared, so q, k, v are 16 + 8 + 8 wide.
    assert by_role == {
        "qkv": 2 * 8 * 16 * 32,
        "attention_output": 2 * 8 * 16 * 16,
        "ffn": 2 * 2 * 8 * 16 * 32,
        "head": 8 * 16 * 10,
    }
    assert sum(op.macs for op in operators if op.is_attention) == 2 * 2 * 4 * 8 * 8 * 4
    gated = transformer_operators(SHAPE.model_copy(update={"gated_ffn": True}), q_len=8)
    assert sum(op.macs for op in gated) == sum(op.macs for op in operators) + 2 * 8 * 16 * 32
    assert sum(op.kind == "norm" for op in operators) == 4
    assert sum(op.elements for op in operators if op.kind == "elementwise") == 2 * 8 * 32


def test_generation_steps_see_earlier_keys() -> None:
    step = transformer_operators(SHAPE, q_len=1, kv_len=9, stage="decode", step=3, head=False)
    calls = [op for op in step if op.is_attention]
    assert [(op.q_len, op.kv_len, op.step, op.stage) for op in calls] == [(1, 9, 3, "decode")] * 2
    assert not any(op.role == "head" for op in step)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Operator(kind="gemm", rows=2, inner=3), "gemm needs columns"),
        (lambda: attention(head_dim=0), "attention needs head_dim"),
        (lambda: attention(kv_heads=3), "multiple of kv_heads"),
        (lambda: Operator.model_validate({"kind": "conv"}), "kind"),
        (lambda: ModelShape.model_validate({**SHAPE.model_dump(), "head": 3}), "head"),
    ],
)
def test_impossible_sizes_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValidationError, match=message):
        make()


def test_workload_checks_its_paddings() -> None:
    padding = np.ones((1, 4), np.bool_)
    Workload(SHAPE, (attention(padding=0),), paddings=(padding,))
    with pytest.raises(TraceError, match="points at padding 1 of 1"):
        Workload(SHAPE, (attention(padding=1),), paddings=(padding,))
    with pytest.raises(TraceError, match=r"must be \(1, 4\), got \(1, 5\)"):
        Workload(SHAPE, (attention(padding=0),), paddings=(np.ones((1, 5), np.bool_),))


def diagonal(heads: int, **changes: object) -> MaskArrays:
    keep = np.broadcast_to(np.eye(4, dtype=np.bool_), (1, heads, 4, 4)).copy()
    if heads > 1:
        keep[0, 1] = True
    return MaskArrays.from_bool(keep, is_causal=bool(changes.get("is_causal", False)))


def test_query_heads_read_the_mask_of_their_key_head() -> None:
    workload = Workload(SHAPE, (attention(),))
    trace = Trace(workload, {"m": Selection("m", (AttentionCall(mask=diagonal(2)),))})
    assert trace.kept_pairs("m")[0].tolist() == [[4, 4, 16, 16]]
    assert trace.density("m") == (4 + 4 + 16 + 16) / 64
    assert trace.density("dense") == 1.0


def test_padding_and_causality_limit_what_is_kept() -> None:
    padding = np.array([[False, True, True, True]])
    operator = attention(padding=0, is_causal=True)
    workload = Workload(SHAPE, (operator,), paddings=(padding,))
    call = AttentionCall(mask=diagonal(2, is_causal=True))
    trace = Trace(workload, {"m": Selection("m", (call,))})
    # Without the padded key the diagonal has 3 pairs and the causal triangle 6.
    assert trace.kept_pairs()[0].tolist() == [[3, 3, 6, 6]]
    assert trace.allowed_pairs()[0].tolist() == [[6, 6, 6, 6]]
    assert call.kept_pairs(operator, padding, group=2).tolist() == [[3, 3, 4, 4]]


def test_dead_tokens_and_heads_keep_nothing() -> None:
    alive = np.array([True, False, True, True])
    call = AttentionCall(heads_alive=alive, tokens_alive=np.array([[True, True, False, False]]))
    assert call.kept_pairs(attention()).tolist() == [[8, 0, 8, 8]]


def test_counts_stand_in_for_unknown_keys() -> None:
    counts = np.full((1, 4, 4), 3, np.int64)
    call = AttentionCall(key_counts=counts, value_counts=counts - 1)
    assert call.kept_pairs(attention()).tolist() == [[12] * 4]
    assert call.value_pairs(attention(), group=4).tolist() == [[8] * 4]
    assert not call.knows_keys
    assert AttentionCall(mask=diagonal(1)).value_pairs(attention()).tolist() == [[4] * 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (AttentionCall(mask=diagonal(1, is_causal=True)), "mask.is_causal is True"),
        (AttentionCall(mask=MaskArrays.from_bool(np.ones((1, 1, 4, 5), bool))), "kv_len is 5"),
        (AttentionCall(mask=MaskArrays.from_bool(np.ones((1, 3, 4, 4), bool))), "divide 4 heads"),
        (AttentionCall(mask=MaskArrays.from_bool(np.ones((2, 1, 4, 4), bool))), "1 or 1 sequences"),
        (
            AttentionCall(key_counts=np.full((1, 4, 4), 5, np.int64)),
            r"key_counts must be in \[0, 4",
        ),
        (AttentionCall(key_counts=np.zeros((1, 2, 4), np.int64)), r"must be \(1, 4, 4\)"),
        (AttentionCall(heads_alive=np.ones(3, np.bool_)), "heads_alive"),
        (
            AttentionCall(mask=diagonal(1), key_counts=np.zeros((1, 4, 4), np.int64)),
            "either a mask or key_counts",
        ),
    ],
)
def test_calls_must_fit_their_operator(call: AttentionCall, message: str) -> None:
    with pytest.raises(TraceError, match=f"selection 'm', call 0: .*{message}"):
        Trace(Workload(SHAPE, (attention(),)), {"m": Selection("m", (call,))})


def test_selections_must_fit_the_workload() -> None:
    workload = Workload(SHAPE, (attention(), attention()))
    with pytest.raises(TraceError, match="1 calls for 2 attention operators"):
        Trace(workload, {"m": Selection("m", (AttentionCall(),))})
    with pytest.raises(TraceError, match="stored under 'n'"):
        Trace(workload, {"n": Selection("m", (AttentionCall(),) * 2)})
    with pytest.raises(TraceError, match="without slashes"):
        Selection("../m", ())


def test_selections_are_found_by_name() -> None:
    calls = (AttentionCall(),)
    workload = Workload(SHAPE, (attention(),), name="w")
    one = Trace(workload, {"a": Selection("a", calls)})
    both = Trace(workload, {"a": Selection("a", calls), "b": Selection("b", calls)})
    assert one.selection().name == "a"
    assert Trace(workload).selection().name == "dense"
    with pytest.raises(ValueError, match="must be named: w has a, b, dense"):
        both.selection()
    with pytest.raises(ValueError, match="no selection 'c': w has a, b, dense"):
        both.selection("c")
