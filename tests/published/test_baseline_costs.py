"""Multiply-accumulates per head of the fixed patterns: the usual formulas, and what they leave out.

The formulas count whole windows and stretches; the masks know the edges.  Both are pinned for 512,
1,024, 2,048 and 4,096 tokens and head_dim 64.
"""

from __future__ import annotations

import pytest
import torch

from sparseloom.methods import (
    AttentionInputs,
    BigBird,
    BlockLocal,
    Fixed,
    Longformer,
    Selector,
    SlidingWindow,
)

D = 64


def pairs(method: Selector, n: int, *, is_causal: bool = False, layer: int = 0) -> int:
    empty = torch.zeros(1, 1, n, 1)
    inputs = AttentionInputs(query=empty, key=empty, layer=layer, is_causal=is_causal, scale=1.0)
    return int(method.select(inputs).kept_pairs(is_causal=is_causal, key_padding=None).sum())


def rounded(macs: float) -> float:
    return float(f"{macs / 1e6:.3g}")


@pytest.mark.parametrize(("n", "millions"), [(512, 8.45), (1024, 16.9), (2048, 33.8), (4096, 67.6)])
def test_local(n: int, millions: float) -> None:
    assert rounded(2 * n * 129 * D) == millions
    assert pairs(SlidingWindow(width=129), n) == n * 129 - 64 * 65


@pytest.mark.parametrize(("n", "millions"), [(512, 11.2), (1024, 44.7), (2048, 179), (4096, 716)])
def test_blockbert(n: int, millions: float) -> None:
    assert rounded(2 * n * n * D / 3) == millions
    size = -(-n // 3)  # three blocks, the last a little shorter
    last = n - 2 * size
    assert pairs(BlockLocal(blocks=3), n) == 2 * size * size + last * last


@pytest.mark.parametrize(("n", "millions"), [(512, 2.62), (1024, 6.29), (2048, 16.8), (4096, 50.3)])
def test_fixed_causal_mean_of_two_heads(n: int, millions: float) -> None:
    stretch, columns = 128, 8
    own = n * stretch / 2
    summary = columns * (n / stretch) * n / 2
    assert rounded(2 * D * (own + summary) / 2) == millions
    method = Fixed(stride=stretch, columns=columns, parts="layers")
    first = pairs(method, n, is_causal=True, layer=0)
    second = pairs(method, n, is_causal=True, layer=1)
    assert first == n * (stretch + 1) // 2
    ends = [j for j in range(n) if j % stretch >= stretch - columns]
    assert second == sum(n - j for j in ends) + (n - len(ends))  # and a token itself


@pytest.mark.parametrize(("n", "millions"), [(1024, 67.5), (2048, 135), (4096, 270)])
def test_longformer(n: int, millions: float) -> None:
    formula = 2 * n * D * (513 + 1) + 2 * n * D  # the window's keys and the global one; its row
    assert formula / 1e6 == pytest.approx(millions, rel=0.001)
    band = n * 513 - 256 * 257
    both = 2 * (n - 257)  # the global row and column outside of the band
    assert pairs(Longformer(window=512), n) == band + both


@pytest.mark.parametrize(("n", "millions"), [(1024, 67.1), (2048, 134), (4096, 268)])
def test_bigbird(n: int, millions: float) -> None:
    assert rounded(2 * n * 64 * 8 * D) == millions
    blocks = n // 64
    inner = blocks - 4  # rows whose window, ends and random blocks are eight different ones
    expected = 2 * blocks + 2 * 7 + inner * 8  # two full rows, two rows next to them
    assert pairs(BigBird(), n) == expected * 64 * 64
