"""Fixed patterns against their definitions, pair by pair, and their exact numbers of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseloom.methods import (
    AttentionInputs,
    BigBird,
    BlockLocal,
    Fixed,
    Longformer,
    Selector,
    Strided,
)

N = 23


def call(q_len: int, kv_len: int, *, is_causal: bool, heads: int = 3, layer: int = 0) -> Any:
    return AttentionInputs(
        query=torch.zeros(1, heads, q_len, 4),
        key=torch.zeros(1, heads, kv_len, 4),
        layer=layer,
        is_causal=is_causal,
        scale=1.0,
    )


def kept(method: Selector, q_len: int, kv_len: int, **sizes: Any) -> Tensor:
    inputs = call(q_len, kv_len, **sizes)
    keep = method.select(inputs).to_bool().expand(1, inputs.query.shape[1], q_len, kv_len)[0]
    if inputs.is_causal:
        keep = keep & torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    return keep


Rule = Callable[[int, int], bool]
RULES: list[tuple[Selector, Rule]] = [
    (Strided(stride=5), lambda i, j: abs(i - j) <= 5 or (i - j) % 5 == 0),
    (
        Strided(stride=2, block=3),
        lambda i, j: abs(i // 3 - j // 3) <= 2 or (i // 3 - j // 3) % 2 == 0,
    ),
    (Fixed(stride=6, columns=2), lambda i, j: i // 6 == j // 6 or j % 6 >= 4),
    (
        Fixed(stride=6, columns=2, global_tokens=1),
        lambda i, j: i // 6 == j // 6 or j % 6 >= 4 or 0 in (i, j),
    ),
    (Longformer(window=6), lambda i, j: abs(i - j) <= 3 or 0 in (i, j)),
    (Longformer(window=7, global_tokens=0), lambda i, j: abs(i - j) <= 3),
    (
        Longformer(window=4, dilation=3, global_tokens=2),
        lambda i, j: (i - j) in (-6, -3, 0, 3, 6) or i < 2 or j < 2,
    ),
    (Longformer(window=2, block=4), lambda i, j: abs(i // 4 - j // 4) <= 1 or i < 4 or j < 4),
    (BlockLocal(block=5), lambda i, j: i // 5 == j // 5),
    (BlockLocal(blocks=3), lambda i, j: i // 8 == j // 8),  # 23 tokens in three are 8
    (BlockLocal(blocks=3, shifts=(1,)), lambda i, j: (i // 8 + 1) % 3 == j // 8),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("method", "rule"), RULES, ids=[str(method) for method, _ in RULES])
def test_every_pair_follows_the_rule(method: Selector, rule: Rule, is_causal: bool) -> None:
    if is_causal and method == BlockLocal(blocks=3, shifts=(1,)):
        pytest.skip("a shift ahead keeps the own block in causal models; tested apart")
    expected = torch.tensor([[rule(i, j) for j in range(N)] for i in range(N)])
    expected = expected.tril() if is_causal else expected
    keep = kept(method, N, N, is_causal=is_causal)
    assert torch.equal(keep, expected.expand_as(keep))


@pytest.mark.parametrize(
    "method",
    [
        Strided(stride=5),
        Strided(stride=2, block=3, parts="heads"),
        Fixed(stride=6, columns=2),
        Fixed(stride=2, columns=1, block=4, parts="layers", global_tokens=1),
        Longformer(window=6),
        Longformer(window=2, block=4),
        BigBird(block=3),
        BigBird(block=1, random_blocks=2, seed=3),
        BlockLocal(block=5, shifts=(0, 1, 2)),
    ],
    ids=str,
)
def test_causal_rows_are_the_same_in_prefill_and_decoding(method: Selector) -> None:
    whole = kept(method, N, N, is_causal=True, layer=1)
    for last in (1, 2, 5, N):
        part = kept(method, last, N, is_causal=True, layer=1)
        assert torch.equal(part, whole[:, N - last :])
    if not isinstance(method, BlockLocal):  # a shift past the end wraps around
        for length in (1, 7, 16):  # the rows of a prefix do not change as the text grows
            prefix = kept(method, length, length, is_causal=True, layer=1)
            assert torch.equal(prefix, whole[:, :length, :length])


def test_parts_split_over_layers_and_heads() -> None:
    eye = torch.eye(N, dtype=torch.bool)
    near = torch.tensor([[i // 6 == j // 6 for j in range(N)] for i in range(N)])
    ends = torch.tensor([[j % 6 >= 4 for j in range(N)]] * N) | eye
    layers = Fixed(stride=6, columns=2, parts="layers")
    assert torch.equal(kept(layers, N, N, is_causal=False, layer=2)[0], near)
    assert torch.equal(kept(layers, N, N, is_causal=False, layer=3)[0], ends)
    heads = kept(Fixed(stride=6, columns=2, parts="heads"), N, N, is_causal=False)
    assert torch.equal(heads, torch.stack([near, near, ends]))
    with pytest.raises(ValueError, match="parts must be 'merged' or 'layers' in a model of 1 head"):
        kept(Strided(stride=3, parts="heads"), N, N, is_causal=False, heads=1)


def test_shifted_blocks_differ_by_groups_of_heads() -> None:
    keep = kept(BlockLocal(block=8, shifts=(0, 0, 1)), 24, 24, is_causal=False, heads=6)
    own = torch.eye(3, dtype=torch.bool).repeat_interleave(8, 0).repeat_interleave(8, 1)
    for head in range(6):
        assert torch.equal(keep[head], own if head < 4 else own.roll(8, 1))
    causal = kept(BlockLocal(block=8, shifts=(1,)), 24, 24, is_causal=True)
    expected = own.clone()
    expected[16:] = own.roll(8, 1)[16:]  # the last block looks back to the first
    assert torch.equal(causal[0], expected.tril())


@pytest.mark.parametrize("is_causal", [False, True])
def test_bigbird_draws_other_blocks_for_each_head_never_one_twice(is_causal: bool) -> None:
    method = BigBird(block=2, random_blocks=3, seed=1)
    keep = kept(method, 64, 64, is_causal=is_causal, heads=4)
    again = kept(method, 64, 64, is_causal=is_causal, heads=4)
    assert torch.equal(keep, again)
    blocks = keep.view(4, 32, 2, 32, 2).any(2).any(-1)
    draws: set[tuple[int, ...]] = set()
    for head in range(4):
        for row in range(32):
            fixed = {j for j in (row - 1, row, row + 1, 0) if 0 <= j < 32}
            if not is_causal:
                fixed |= {31} | (set(range(32)) if row in (0, 31) else set())
            else:
                fixed = {j for j in fixed if j <= row} | (set() if row else {0})
            found = {int(j) for j in blocks[head, row].nonzero()[:, 0]}
            assert fixed <= found
            possible = (row - 2) if is_causal else 32 - len(fixed)
            assert len(found - fixed) == min(3, max(0, possible))
            if row == 20:
                draws.add(tuple(sorted(found - fixed)))
    assert len(draws) == 4
    for other in (BigBird(block=2, random_blocks=3, seed=2), method):
        layer = 0 if other is not method else 1
        assert not torch.equal(kept(other, 64, 64, is_causal=is_causal, heads=4, layer=layer), keep)


@pytest.mark.parametrize(
    ("method", "density"),
    [
        # Sanger's configurations: block 16, 24 and 32 blocks
        (Longformer(window=2, block=16), {384: 114 / 576, 512: 154 / 1024}),
        (Fixed(stride=4, columns=1, block=16), {384: 216 / 576, 512: 352 / 1024}),
        (BlockLocal(blocks=3), {384: 1 / 3}),
        (BigBird(block=16, random_blocks=0, global_blocks=0), {384: 70 / 576}),
    ],
    ids=str,
)
def test_exact_densities(method: Selector, density: dict[int, float]) -> None:
    for length, expected in density.items():
        mask = method.select(call(length, length, is_causal=False))
        assert mask.density() == pytest.approx(expected, abs=1e-12)
    published = {"longformer": {384: 0.198, 512: 0.150}, "fixed": {384: 0.375, 512: 0.344}}
    for length, value in published.get(method.name, {}).items():
        assert round(density[length], 3) == value


def test_selecting_is_worthwhile_only_where_something_is_left_out() -> None:
    assert not Longformer(window=512).worthwhile(257, 257)
    assert Longformer(window=512).worthwhile(259, 259)
    assert not BlockLocal(block=50).worthwhile(50, 50)
    assert BlockLocal(block=50).worthwhile(51, 51)
    assert not BigBird(block=64).worthwhile(448, 448)
    assert BigBird(block=64).worthwhile(1024, 1024)
    assert not Fixed(stride=128).worthwhile(128, 128)
    assert Fixed(stride=128).worthwhile(129, 129)
    assert not Longformer(window=4).worthwhile(0, 9)
