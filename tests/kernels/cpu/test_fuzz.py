"""Any call: drawn shapes, masks and layouts, with gradients, against the reference in fp64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparseloom as sl
from sparseloom.kernels.cpu import native

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
BLOCKS = st.one_of(
    st.sampled_from([(1, 1), (4, 1), (8, 1), (16, 1), (16, 32), (64, 64)]),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
DIMS = st.sampled_from([8, 24, 32, 64, 80, 96, 104, 128, 256])
LENGTHS = st.integers(1, 70)


def tensor(draw: st.DrawFn, *size: int, dtype: torch.dtype) -> Tensor:
    """Random numbers in a drawn layout: plain, heads inside, or a slice of something larger."""
    batch, heads, length, dim = size
    layout = draw(st.sampled_from(["plain", "heads inside", "slice", "dims apart"]))
    if layout == "heads inside":
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    if layout == "slice":
        return torch.randn(batch, heads + 1, length + 2, dim + 3).to(dtype)[:, 1:, 1:-1, 3:]
    if layout == "dims apart":
        return torch.randn(batch, heads, dim, length).to(dtype).transpose(2, 3)
    return torch.randn(size).to(dtype)


@st.composite
def kept(draw: st.DrawFn, batch: int, heads: int, q_len: int, kv_len: int) -> sl.SparseMask:
    """A mask of any block size; rows are empty, full or between, each by its own draw."""
    block = draw(BLOCKS)
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    density = torch.tensor([0.0, 0.05, 0.3, 0.9, 1.0])
    row_density = density[torch.randint(5, (batch, heads, rows, 1))]
    keep = torch.rand(batch, heads, rows, columns) < row_density
    return sl.SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    dtype = draw(st.sampled_from(list(CLOSE)))
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    q_len, kv_len = draw(LENGTHS), draw(LENGTHS)
    head_dim, value_dim = draw(DIMS), draw(DIMS)
    inputs = [
        tensor(draw, batch, heads, q_len, head_dim, dtype=dtype),
        tensor(draw, batch, kv_heads, kv_len, head_dim, dtype=dtype),
        tensor(draw, batch, kv_heads, kv_len, value_dim, dtype=dtype),
    ]
    mask_heads = draw(st.sampled_from([1, kv_heads, heads]))
    masks = kept(draw(st.sampled_from([1, batch])), mask_heads, q_len, kv_len)
    return inputs, {
        "mask": draw(st.none() | masks),
        "is_causal": draw(st.booleans()),
        "key_padding": torch.rand(batch, kv_len) < 0.7 if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([None, 0.05, 1.0])),
        "enable_gqa": True,
    }


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_call_equals_the_reference(data: st.DataObject) -> None:
    inputs, options = data.draw(calls())
    tolerance = CLOSE[inputs[0].dtype] * (8 if options["scale"] == 1.0 else 1)
    extras = data.draw(st.booleans())
    leaves = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    with native.use_tier(data.draw(st.sampled_from(native.available_tiers()))):
        got = sl.attention(
            *leaves, **options, return_lse=extras, return_importance=extras, backend="cpu"
        )
        mine = got if isinstance(got, tuple) else (got,)
        wanted = sl.attention(
            *wide, **options, return_lse=True, return_importance=True, backend="reference"
        )
        assert isinstance(wanted, tuple)
        upstream = torch.randn_like(mine[0])
        mine[0].backward(upstream)
    wanted[0].backward(upstream.double())
    for left, right in zip(mine, wanted, strict=False):
        assert left is not None
        assert right is not None
        close(left.detach(), right.detach(), tolerance)
    for left, right in zip(leaves, wide, strict=True):
        close(left.grad, right.grad, tolerance)


def close(left: Tensor | None, right: Tensor | None, tolerance: float) -> None:
    """Near in absolute terms, or by the size of the largest number."""
    assert left is not None
    assert right is not None
    finite = right[right.isfinite()]
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(left.double(), right, rtol=0, atol=tolerance * size)
