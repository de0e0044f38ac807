"""The flex backend against the reference; compiling takes seconds, so the cases are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseloom.kernels import attention, common, flex
from sparseloom.mask import SparseMask

_needs_compiler = pytest.mark.skipif(
    flex.unavailable() is not None, reason=f"FlexAttention cannot run: {flex.unavailable()}"
)


def _call(**changes: Any) -> common.AttentionCall:
    mask = SparseMask.full(32, 48, block_size=(16, 16))
    q, k = torch.zeros(1, 2, 32, 8), torch.zeros(1, 2, 48, 8)
    settings: dict[str, Any] = {
        "query": q,
        "key": k,
        "value": k,
        "indices": mask.indices,
        "offsets": mask.offsets,
        "block_size": mask.block_size,
        "key_padding": None,
        "is_causal": False,
        "scale": 1.0,
    }
    return common.AttentionCall(**{**settings, **changes})


@_needs_compiler
def test_equals_the_reference_at_changing_lengths() -> None:
    compiled_before = flex._compiled.cache_info().misses
    # Odd lengths, empty rows, shared mask heads and grouped keys; the second pair of lengths
    # runs the code that the first one compiled.
    for q_len, kv_len, seed in [(37, 70, 0), (50, 97, 1)]:
        torch.manual_seed(seed)
        q = torch.randn(2, 4, q_len, 16, requires_grad=True)
        k, v = torch.randn(2, 2, kv_len, 16), torch.randn(2, 2, kv_len, 24)
        keep = torch.rand(1, 2, -(-q_len // 16), -(-kv_len // 32)) < 0.5
        keep[:, 0, 1] = False
        mask = SparseMask.from_block_bool(keep, block_size=(16, 32), q_len=q_len, kv_len=kv_len)
        with torch.no_grad():
            got, wanted = (
                attention(q, k, v, mask, is_causal=True, enable_gqa=True, backend=name)
                for name in ("flex", "reference")
            )
        assert isinstance(got, Tensor)
        assert isinstance(wanted, Tensor)
        assert (got - wanted).abs().max() < 1e-5
        assert (got[:, 0, 16:32] == 0).all()
    assert flex._compiled.cache_info().misses == compiled_before + 1


@_needs_compiler
def test_padding_and_half_precision() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16, dtype=torch.bfloat16) for _ in range(3))
    padding = torch.rand(2, 40) < 0.7
    padding[1, :16] = False
    keep = torch.rand(2, 2, 3, 3) < 0.7
    mask = SparseMask.from_block_bool(keep, block_size=(16, 16), q_len=40, kv_len=40)
    got = attention(q, k, v, mask, key_padding=padding, backend="flex")
    wanted = attention(q, k, v, mask, key_padding=padding, backend="reference")
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    assert got.dtype == torch.bfloat16
    # FlexAttention rounds the probabilities to bf16 before the second product.
    torch.testing.assert_close(got, wanted, rtol=2**-5, atol=2**-6)


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {"grad": True}, "no backward pass"),
        ({}, {"lse": True}, "neither log-sum-exp nor importance"),
        ({}, {"importance": True}, "neither log-sum-exp nor importance"),
        ({"dropout_p": 0.5}, {}, "no dropout, got dropout_p 0.5"),
        ({"indices": None, "offsets": None}, {}, "needs a mask"),
        ({"block_size": (16, 8)}, {}, r"at least 16x16, got \(16, 8\)"),
        ({"query": torch.zeros(1, 2, 1, 8)}, {}, "at least two queries"),
        (
            {name: torch.zeros(1, 2, 32, 8).double() for name in ("query", "key", "value")},
            {},
            "float32, bfloat16 or float16, got torch.float64",
        ),
    ],
)
def test_what_it_cannot_do_is_said(
    changes: dict[str, Any], options: dict[str, bool], sentence: str
) -> None:
    asked = {"lse": False, "importance": False, "grad": False, **options}
    reason = flex.unsupported(_call(**changes), **asked)
    assert reason is not None
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(reason)
    assert flex.unsupported(_call(), lse=False, importance=False, grad=False) is None


def test_running_what_it_refuses_raises() -> None:
    with pytest.raises(NotImplementedError, match="'flex' cannot run this call: it has no dropout"):
        flex.forward(_call(dropout_p=0.5), lse=False, importance=False)
    leaf = torch.zeros(1, 2, 32, 8, requires_grad=True)
    mask = SparseMask.full(32, 32, block_size=(16, 16))
    with pytest.raises(NotImplementedError, match=r"no backward pass .* torch.no_grad"):
        attention(leaf, leaf, leaf, mask, backend="flex")


def test_a_missing_compiler_is_the_reason_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flex.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    look_up = flex.unavailable.__wrapped__
    assert (
        look_up() == "no C++ compiler: 'no-such-compiler' is not on PATH (set CXX to another one)"
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert look_up() == "FlexAttention on the CPU needs AVX2 or better"
    monkeypatch.setattr(flex.platform, "system", lambda: "Darwin")
    assert look_up() == "FlexAttention has no CPU code generator on macOS"
