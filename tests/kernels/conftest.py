"""Inputs and a second, independent implementation for the kernel tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.mask import SparseMask


@dataclass
class Case:
    """One drawn attention call."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: SparseMask | None
    is_causal: bool
    key_padding: Tensor | None
    scale: float | None

    @property
    def options(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "key_padding": self.key_padding,
            "scale": self.scale,
            "enable_gqa": True,
        }

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as fp64 leaves that require gradients."""
        q, k, v = (t.detach().double().requires_grad_() for t in self.inputs)
        return q, k, v


def _draw_case(
    data: st.DataObject,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    masked: bool | None = None,
    longest: int = 9,
) -> Case:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    q_len, kv_len = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    head_dim, value_dim = draw(st.sampled_from([(1, 1), (4, 4), (5, 3)]))
    dtype = draw(st.sampled_from(dtypes))
    sizes = ((heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, value_dim))
    query, key, value = (torch.randn(batch, *size, dtype=dtype) for size in sizes)
    mask = None
    if masked is not False and (masked or draw(st.booleans())):
        block = draw(st.sampled_from([(1, 1), (4, 1), (1, 3), (3, 2), (16, 16)]))
        mask_heads = draw(st.sampled_from([1, kv_heads, heads]))
        mask_batch = draw(st.sampled_from([1, batch]))
        grid = (mask_batch, mask_heads, -(-q_len // block[0]), -(-kv_len // block[1]))
        keep = torch.rand(grid) < draw(st.sampled_from([0.0, 0.4, 0.8, 1.0]))
        mask = SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)
    padding = torch.rand(batch, kv_len) < 0.7 if draw(st.booleans()) else None
    scale = draw(st.sampled_from([None, 0.3]))
    return Case(query, key, value, mask, draw(st.booleans()), padding, scale)


def _allowed(case: Case, b: int, h: int, i: int, j: int) -> bool:
    q_len, kv_len = case.query.shape[2], case.key.shape[2]
    if case.is_causal and j > i + kv_len - q_len:
        return False
    if case.key_padding is not None and not case.key_padding[b, j]:
        return False
    if case.mask is None:
        return True
    mask = case.mask
    row = mask.offsets[b % mask.batch, h * mask.heads // case.query.shape[1]]
    block = i // mask.block_size[0]
    kept = mask.indices[int(row[block]) : int(row[block + 1])].tolist()
    return j // mask.block_size[1] in kept


def _naive(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention as four loops over Python numbers: out, lse, key and head importance in fp64."""
    query, key, value = (t.detach().double() for t in case.inputs)
    batch, heads, q_len, head_dim = query.shape
    kv_len, value_dim = value.shape[2:]
    scale = 1 / math.sqrt(head_dim) if case.scale is None else case.scale
    out = torch.zeros(batch, heads, q_len, value_dim, dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    columns = torch.zeros(batch, heads, kv_len, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            shared = h * key.shape[1] // heads
            keys, values = key[b, shared].tolist(), value[b, shared].tolist()
            for i, row in enumerate(query[b, h].tolist()):
                visible = [j for j in range(kv_len) if _allowed(case, b, h, i, j)]
                if not visible:
                    continue
                scores = [scale * sum(map(mul, row, keys[j])) for j in visible]
                total = math.fsum(math.exp(s) for s in scores)
                lse[b, h, i] = math.log(total)
                for j, score in zip(visible, scores, strict=True):
                    p = math.exp(score) / total
                    columns[b, h, j] += p
                    for d in range(value_dim):
                        out[b, h, i, d] += p * values[j][d]
    return out, lse, columns, out.abs().sum((2, 3))


@pytest.fixture(scope="session")
def draw_case() -> Callable[..., Case]:
    return _draw_case


@pytest.fixture(scope="session")
def naive() -> Callable[[Case], tuple[Tensor, Tensor, Tensor, Tensor]]:
    return _naive


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """A fixed case with grouped heads, a shared mask head, causality, padding and empty rows."""

    def make(
        *,
        dtype: torch.dtype = torch.float64,
        q_len: int = 7,
        kv_len: int = 9,
        block: tuple[int, int] = (2, 1),
        heads: int = 4,
        head_dim: int = 4,
        density: float = 0.5,
        padded: bool = True,
        is_causal: bool = True,
        seed: int = 0,
    ) -> Case:
        torch.manual_seed(seed)
        query = torch.randn(2, heads, q_len, head_dim, dtype=dtype)
        key = torch.randn(2, 2, kv_len, head_dim, dtype=dtype)
        value = torch.randn(2, 2, kv_len, head_dim + 1, dtype=dtype)
        keep = torch.rand(1, 2, -(-q_len // block[0]), -(-kv_len // block[1])) < density
        keep[:, 0, 1] = False
        mask = SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)
        padding = torch.ones(2, kv_len, dtype=torch.bool) if padded else None
        if padding is not None:
            padding[0, :2] = False
            padding[1, -2:] = False
        return Case(query, key, value, mask, is_causal, padding, None)

    return make
