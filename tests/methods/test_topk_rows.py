"""The compiled row selection against the plain torch one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.methods import _topk_numba
from sparseloom.methods._topk import keep_rows


def compiled(
    scores: Tensor, visible: Tensor, budget: Tensor, diagonal: Tensor, attended: Tensor | None
) -> Tensor:
    batch, heads, rows, _ = scores.shape
    counts = budget[:, None].expand(batch, heads, rows).reshape(-1)
    starts = (counts.cumsum(0) - counts).view(batch, heads, rows)
    out = torch.full((int(counts.sum()) + 1,), -7, dtype=torch.int32)
    _topk_numba.select_rows(scores, visible, budget, diagonal, attended, starts, out)
    assert out[-1] == -7  # nothing is written past the end
    keep = torch.zeros_like(scores, dtype=torch.bool)
    flat = keep.view(-1, scores.shape[-1])
    for row, (start, count) in enumerate(zip(starts.reshape(-1), counts, strict=True)):
        kept = out[start : start + count].long()
        assert (kept.diff() > 0).all()
        flat[row, kept] = True
    return keep


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_compiled_equals_plain(data: st.DataObject) -> None:
    batch, heads, rows, keys = (data.draw(st.integers(1, n)) for n in (3, 2, 4, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    kind = data.draw(st.sampled_from(["integers", "floats", "wide", "odd"]))
    scores = torch.randn(batch, heads, rows, keys, generator=generator)
    if kind == "integers":
        scores = (scores * 2).round()
    elif kind == "wide":
        scores = scores * torch.exp(20 * torch.randn(scores.shape, generator=generator))
    elif kind == "odd":
        values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38])
        scores = values[torch.randint(0, 8, scores.shape, generator=generator)]
    visible = torch.randint(0, keys + 1, (batch, rows), generator=generator)
    attended = None
    if data.draw(st.booleans()):
        attended = torch.rand(batch, keys, generator=generator) < 0.7
    column = torch.arange(keys)
    may = column < visible[..., None]
    may = may if attended is None else may & attended[:, None]
    start = torch.randint(0, keys, (rows,), generator=generator)
    diagonal = torch.stack([start, start + torch.randint(0, 3, (rows,), generator=generator)], -1)
    must = may & (column >= diagonal[:, :1]) & (column < diagonal[:, 1:])
    share = data.draw(st.floats(0, 1))
    budget = (share * may.sum(-1)).long().maximum(must.sum(-1))
    expected = keep_rows(scores, visible, budget, diagonal, attended)
    assert torch.equal(expected.sum(-1), budget[:, None].expand(batch, heads, rows))
    assert (expected | ~must[:, None]).all()
    assert torch.equal(compiled(scores, visible, budget, diagonal, attended), expected)


def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_topk_numba, "_INLINE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    scores = torch.randint(0, 9, (2, 2, 17, 40), generator=torch.Generator().manual_seed(0)).float()
    visible = torch.full((1, 17), 40)
    budget = torch.arange(17)[None] + 3
    none = torch.zeros(17, 2, dtype=torch.int64)
    expected = keep_rows(scores, visible, budget, none, None)
    assert torch.equal(compiled(scores, visible, budget, none, None), expected)


def test_nothing_to_keep() -> None:
    scores = torch.randn(1, 1, 2, 5)
    visible = torch.tensor([[0, 5]])
    none = torch.zeros(2, 2, dtype=torch.int64)
    for attended in (None, torch.zeros(1, 5, dtype=torch.bool)):
        budget = torch.zeros(1, 2, dtype=torch.int64)
        assert not keep_rows(scores, visible, budget, none, attended).any()
        assert not compiled(scores, visible, budget, none, attended).any()
