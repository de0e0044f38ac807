"""Regions: the reference against loops, the planned path against the reference, theory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom import regions as rg
from sparseloom.kernels.api import AttentionOutput
from sparseloom.kernels.regions import plan_regions, region_attention, tile_mask, valid_keys
from sparseloom.kernels.regions_integer import integer_region_attention
from sparseloom.kernels.regions_reference import reference_attention
from sparseloom.quantize import quantize
from sparseloom.region_model import integer_attention
from sparseloom.regions import HeadRegions, Mode, Region, band, dilated, rows, stripe
from sparseloom.softermax import SoftermaxFormat

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
_few = settings(max_examples=15, deadline=None, derandomize=True)


@st.composite
def region_lists(draw: st.DrawFn, modes: tuple[Mode, ...] = tuple(Mode)) -> HeadRegions:
    found: list[Region] = []
    for _ in range(draw(st.integers(1, 4))):
        mode = draw(st.sampled_from(modes))
        r0 = draw(st.integers(0, 3))
        found.append(
            Region(
                mode,
                r0,
                draw(st.integers(r0 + 1, 6)),
                draw(st.integers(-4, 4)),
                draw(st.integers(1, 6)),
                draw(st.integers(0, 1)),
                draw(st.integers(1, 3)) if mode is Mode.COARSE else 0,
                draw(st.booleans()),
                draw(st.integers(1, 255)) if mode is Mode.STRIDED else 0,
                draw(st.integers(1, 5)) if mode is Mode.LOW_PRECISION else 0,
            )
        )
    return tuple(found)


def draw_inputs(
    q_len: int, kv_len: int, *, heads: int = 2, batch: int = 2, dim: int = 8, seed: int = 0,
    dtype: torch.dtype = torch.float64, grad: bool = False,
) -> Three:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
        for n in (q_len, kv_len, kv_len)
    )
    return query, key, value


def four_bits(x: np.ndarray, shift: int) -> np.ndarray:
    """Codes of one head (length, dim), bit by bit: 8 bits, then as few of them lost as will do."""
    scale = np.abs(x).max() / 127
    scale = np.float32(scale) if x.dtype == np.float32 else scale
    eight = np.clip(np.rint(x / (scale or 1.0)), -127, 127)
    out = np.zeros_like(x)
    for row, codes in enumerate(eight):
        lost = 0
        while lost < shift and np.rint(np.abs(codes).max() / 2**lost) > 7:
            lost += 1
        out[row] = np.clip(np.rint(codes / 2**lost), -7, 7) * 2**lost * scale
    return out


def by_loops(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, regions: HeadRegions, attend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One head, pair by pair, from the owners of the tiles alone."""
    q_len, kv_len, shift = len(q), len(k), len(k) - len(q)
    owner = rg.owners(regions, q_len, kv_len)
    shifts = {r.low_precision_shift for r in regions}
    there = (q, *(np.where(attend[:, None], x, 0.0) for x in (k, v)))
    low = {few: tuple(four_bits(x, few) for x in there) if few else (q, k, v) for few in shifts}
    out, lse = np.zeros((q_len, v.shape[1])), np.full(q_len, -np.inf)
    for i in range(q_len):
        terms: list[tuple[float, np.ndarray]] = []
        for u in range(owner.shape[1]):
            if owner[i // 16, u] < 0:
                continue
            region = regions[owner[i // 16, u]]
            tile = range(32 * u, min(32 * u + 32, kv_len))
            if region.mode is Mode.COARSE:
                for first in range(32 * u, tile.stop, region.segment):
                    keys = [
                        j for j in range(first, min(first + region.segment, tile.stop)) if attend[j]
                    ]
                    if keys:
                        score = q[i] @ k[keys].mean(0) / math.sqrt(q.shape[1])
                        terms.append((score + math.log(len(keys)), v[keys].mean(0)))
                continue
            few = region.low_precision_shift
            for j in tile:
                if not attend[j] or (region.causal and j > i + shift):
                    continue
                if region.mode is Mode.STRIDED and not region.pattern >> j % 8 & 1:
                    continue
                a, b, c = low[few]
                terms.append((float(a[i] @ b[j]) / math.sqrt(q.shape[1]), c[j]))
        if terms:
            weights = np.exp([score for score, _ in terms])
            out[i] = weights @ np.array([x for _, x in terms]) / weights.sum()
            lse[i] = np.log(weights.sum())
    return out, lse


def run_both(
    inputs: Three, heads: tuple[HeadRegions, ...], **options: Any
) -> tuple[AttentionOutput, AttentionOutput]:
    """The planned path and the reference."""
    plan = plan_regions(
        heads, inputs[0].shape[2], inputs[1].shape[2], is_causal=options.pop("is_causal", False)
    )
    fast = region_attention(*inputs, plan, return_lse=True, **options)
    options["backend"] = "reference"
    slow = region_attention(*inputs, plan, return_lse=True, **options)
    assert isinstance(fast, AttentionOutput)
    assert isinstance(slow, AttentionOutput)
    return fast, slow


@given(region_lists(), st.integers(1, 70), st.integers(1, 80), st.data())
@_few
def test_the_reference_is_what_loops_over_numbers_give(
    regions: HeadRegions, q_len: int, kv_len: int, data: st.DataObject
) -> None:
    inputs = draw_inputs(q_len, kv_len, heads=1, batch=1)
    attend = np.ones(kv_len, bool)
    kind = data.draw(st.sampled_from(["none", "right", "anywhere"]))
    if kind == "right":
        attend[data.draw(st.integers(0, kv_len)) :] = False
    elif kind == "anywhere":
        attend = np.random.default_rng(q_len).random(kv_len) < 0.7
    padding = None if kind == "none" else torch.from_numpy(attend)[None]
    found = reference_attention(*inputs, (regions,), key_padding=padding, return_lse=True)
    assert isinstance(found, AttentionOutput)
    query, key, value = (x[0, 0].numpy() for x in inputs)
    out, lse = by_loops(query, key, value, regions, attend)
    np.testing.assert_allclose(found.out[0, 0], out, rtol=0, atol=1e-12)
    assert found.lse is not None
    np.testing.assert_allclose(found.lse[0, 0], lse, rtol=0, atol=1e-12)


@given(
    st.lists(region_lists(), min_size=2, max_size=2), st.integers(1, 90), st.integers(1, 90),
    st.booleans(), st.sampled_from(["none", "right", "anywhere"]), st.booleans(),
)  # fmt: skip
@_few
def test_the_plan_gives_what_the_reference_gives(
    lists: list[HeadRegions], q_len: int, kv_len: int, is_causal: bool, padded: str, single: bool
) -> None:
    heads = tuple(lists)
    dtype = torch.float32 if single else torch.float64
    inputs = draw_inputs(q_len, kv_len, dtype=dtype)
    padding = {
        "none": None,
        "right": valid_keys([kv_len, kv_len // 2], kv_len),
        "anywhere": torch.rand(2, kv_len, generator=torch.Generator().manual_seed(1)) < 0.7,
    }[padded]
    fast, slow = run_both(inputs, heads, key_padding=padding, is_causal=is_causal)
    atol = 3e-6 if single else 1e-12
    torch.testing.assert_close(fast.out, slow.out, rtol=0, atol=atol)
    torch.testing.assert_close(fast.lse, slow.lse, rtol=0, atol=atol)


def test_full_regions_are_dense_attention_with_a_mask() -> None:
    heads = (
        (rows(0, 1, 150), band(-32, 80), stripe(64, 32)),
        (band(0, 16), stripe(0, 32), stripe(96, 64)),
    )
    inputs = draw_inputs(150, 150, dtype=torch.float32)
    padding = valid_keys([150, 99], 150)
    keep = torch.from_numpy(np.stack([rg.exact_pairs(r, 150, 150) for r in heads]))
    mask = keep[None] & padding[:, None, None]
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    live = mask.any(-1)
    for found in run_both(inputs, heads, key_padding=padding):
        torch.testing.assert_close(found.out[live], expected[live], rtol=0, atol=1e-6)
    tiles = plan_regions(heads, 150, 150).tiles
    assert torch.equal(tiles.to_bool()[0], keep)
    assert tiles == tile_mask(np.stack([rg.owners(r, 150, 150) >= 0 for r in heads]), 150, 150)


@pytest.mark.parametrize("n", [96, 101])
def test_coarse_is_exact_where_the_keys_of_a_segment_are_equal(n: int) -> None:
    query, key, value = draw_inputs(n, n)
    key, value = (x[:, :, ::8].repeat_interleave(8, 2)[:, :, :n] for x in (key, value))
    padding = valid_keys([n, 61], n)
    everything = F.scaled_dot_product_attention(query, key, value, padding[:, None, None])
    for size in (2, 4, 8):
        coarse = ((band(0, 16), stripe(0, 128, mode=Mode.COARSE, segment=size)),)
        for found in run_both((query, key, value), coarse * 2, key_padding=padding):
            torch.testing.assert_close(found.out, everything, rtol=0, atol=1e-12)


def test_half_precision_is_the_reference_rounded() -> None:
    heads = ((band(-32, 80), stripe(0, 256, mode=Mode.COARSE, segment=4)),)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = draw_inputs(250, 250, dim=32, dtype=dtype)
        fast, slow = run_both(inputs, heads, key_padding=valid_keys([250, 77], 250))
        assert fast.out.dtype == dtype
        torch.testing.assert_close(fast.out, slow.out, rtol=0.02, atol=0.02)
        torch.testing.assert_close(fast.lse, slow.lse, rtol=0, atol=0.02)


def test_key_heads_are_shared() -> None:
    query, key, value = draw_inputs(64, 64, heads=4)
    heads = tuple((band(0, 16 * h + 16), stripe(0, 32)) for h in range(4))
    shared = run_both((query, key[:, :2], value[:, :2]), heads, enable_gqa=True)
    two_keys, two_values = (x[:, :2].repeat_interleave(2, 1) for x in (key, value))
    for found, expected in zip(shared, run_both((query, two_keys, two_values), heads), strict=True):
        torch.testing.assert_close(found.out, expected.out, rtol=0, atol=1e-12)
    one = run_both((query, key, value), heads[:1])
    for found, expected in zip(one, run_both((query, key, value), heads[:1] * 4), strict=True):
        torch.testing.assert_close(found.out, expected.out, rtol=0, atol=1e-12)


def test_gradients_flow_alike() -> None:
    heads = (
        (band(0, 16), dilated(0, 96, 0b10010010, diagonal=False)),
        (band(0, 16), stripe(0, 96, mode=Mode.COARSE, segment=4)),
    )
    inputs = draw_inputs(70, 70, grad=True)
    padding = valid_keys([70, 30], 70)
    fast, slow = run_both(inputs, heads, key_padding=padding)
    weights = torch.randn(fast.out.shape, generator=torch.Generator().manual_seed(3)).double()
    grads = [torch.autograd.grad((x.out * weights).sum(), inputs) for x in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert a.isfinite().all()


def test_the_gradient_of_the_reference_is_its_derivative() -> None:
    heads = ((band(0, 16), stripe(0, 48, mode=Mode.COARSE, segment=8)),)
    inputs = draw_inputs(34, 34, heads=1, batch=1, dim=2, grad=True)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        padding = valid_keys([29], 34)
        found = reference_attention(query, key, value, heads, key_padding=padding)
        assert isinstance(found, Tensor)
        return found

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    # Codes of few bits pass the gradient of exact ones on.
    low = ((band(0, 64, mode=Mode.LOW_PRECISION),),)
    out = reference_attention(*inputs, low)
    assert isinstance(out, Tensor)
    for x in torch.autograd.grad(out.sum(), inputs):
        assert x.isfinite().all()


def test_rows_without_keys_give_nothing() -> None:
    heads = ((stripe(32, 32), stripe(64, 32, mode=Mode.COARSE, segment=2)),)
    inputs = draw_inputs(40, 96, batch=1, grad=True)
    for found in run_both(inputs, heads, key_padding=valid_keys([20], 96)):
        assert (found.out == 0).all()
        assert found.lse is not None
        assert (found.lse == -torch.inf).all()
        for grad in torch.autograd.grad(found.out.sum(), inputs):
            assert (grad == 0).all()
    empty = region_attention(*inputs, plan_regions([()], 40, 96))
    assert isinstance(empty, Tensor)
    assert (empty == 0).all()


@given(region_lists(modes=(Mode.FULL, Mode.COARSE)), st.randoms(use_true_random=False))
@_few
def test_the_order_of_disjoint_regions_changes_nothing(regions: HeadRegions, random: Any) -> None:
    """Ownership fixed, the order in which runs are computed is free."""
    n = 90
    pieces = [
        Region(region.mode, int(t), int(t) + 1, 2 * int(begin), 2 * int(end - begin),
               log2s=region.log2s, causal=region.causal)
        for t, begin, end, owner in zip(*rg.runs(regions, n, n), strict=True)
        for region in [regions[owner]]
    ]  # fmt: skip
    inputs = draw_inputs(n, n, heads=1, batch=1)
    whole, _ = run_both(inputs, (regions,))
    random.shuffle(pieces)
    shuffled, _ = run_both(inputs, (tuple(pieces),))
    torch.testing.assert_close(shuffled.out, whole.out, rtol=0, atol=1e-12)


def test_calls_that_do_not_fit_are_refused() -> None:
    inputs = draw_inputs(40, 40)
    coarse = plan_regions([(stripe(0, 64, mode=Mode.COARSE, segment=8),)], 40, 40)
    with pytest.raises(ValueError, match="plan must be for 40 queries and 40 keys, got one for 8"):
        region_attention(*inputs, plan_regions([(band(0, 16),)], 8, 8))
    three = plan_regions([(band(0, 16),)] * 3, 40, 40)
    with pytest.raises(ValueError, match="number of heads that divides 2, got 3"):
        region_attention(*inputs, three)
    with pytest.raises(ValueError, match="number of region lists that divides 2, got 3"):
        region_attention(*inputs, three, backend="reference")
    with pytest.raises(ValueError, match=r"n_valid must be in \[0, 40\], got 41"):
        valid_keys([41], 40)
    with pytest.raises(ValueError, match="scale must not be 0"):
        region_attention(*inputs, coarse, key_padding=valid_keys([3, 4], 40), scale=0.0)
    with pytest.raises(ValueError, match="number of region lists that divides 0, got 0"):
        plan_regions([], 4, 4)


def test_one_part_is_one_call() -> None:
    """Whole tiles need no second pass: only then may FlexAttention, without sums, run them."""
    plain = plan_regions([(rows(0, 1, 128), band(-32, 80, causal=False))], 128, 128)
    assert [(p.segment, p.is_causal, p.mask.block_size) for p in plain.parts] == [
        (1, False, (16, 32))
    ]
    causal = plan_regions([(band(-32, 80),)], 128, 128, is_causal=True)
    assert [(p.segment, p.is_causal, p.mask.block_size) for p in causal.parts] == [
        (1, True, (16, 32))
    ]
    mixed = plan_regions([(band(-32, 80),), (band(-32, 80, causal=True),)], 128, 128)
    assert [p.mask.block_size for p in mixed.parts] == [(16, 32), (1, 1)]
    holes = plan_regions([(dilated(0, 64, 1),)], 128, 128)
    assert [p.mask.block_size for p in holes.parts] == [(16, 1)]
    coarse = plan_regions([(band(0, 16), stripe(0, 128, mode=Mode.COARSE, segment=4))], 128, 128)
    assert [(p.segment, p.mask.block_size, p.mask.kv_len) for p in coarse.parts] == [
        (1, (16, 32), 128), (4, (16, 8), 32),
    ]  # fmt: skip


# ------------------------------------------------------------------------------- theory


@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.floats(0.01, 4))
@_few
def test_a_mean_never_claims_more_than_its_keys_and_little_less(
    seed: int, size: int, spread: float
) -> None:
    """Jensen: s e^{q·k̄} ≤ Σ e^{q·k_j}. Hoeffding: ≤ s e^{q·k̄} e^{(b−a)²/8}."""
    n = 16 * size
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 1, 16, 4, generator=generator).double() * spread
    key = torch.randn(1, 1, n, 4, generator=generator).double()
    coarse = ((Region(Mode.COARSE, 0, 1, 0, size, log2s=size.bit_length() - 1),),)
    fine = ((Region(Mode.FULL, 0, 1, 0, size),),)
    lses = []
    for heads in (coarse, fine):
        # Values mark the segments, so that the outputs hold their masses.
        marks = torch.eye(16).double().repeat_interleave(size, 0)[None, None]
        found = reference_attention(query, key, marks, heads, return_lse=True)
        assert isinstance(found, AttentionOutput)
        assert found.lse is not None
        lses.append(found.lse[0, 0, :, None] + found.out[0, 0].log())
    scores = (query @ key.mT / 2)[0, 0].unflatten(-1, (16, size))
    width = scores.amax(-1) - scores.amin(-1)
    gap = lses[1] - lses[0]
    assert (gap >= -1e-10).all()
    assert (gap <= width**2 / 8 + 1e-10).all()


@given(st.integers(0, 10_000), st.floats(0.1, 6))
@_few
def test_what_a_mask_leaves_out_costs_the_log_of_the_mass_it_keeps(
    seed: int, spread: float
) -> None:
    """KL(masked ‖ full) = −ln m, total variation = 1 − m, |õ − o| ≤ 2 (1 − m) max |v|."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 1, n, 4, generator=generator).double() * spread for n in (33, 100))
    identity = torch.eye(100).double()[None, None]
    kept = ((stripe(32, 32), band(0, 16)),)
    masked = reference_attention(query, key, identity, kept)
    full = reference_attention(query, key, identity, ((rows(0, 512, 100),),))
    assert isinstance(masked, Tensor)
    assert isinstance(full, Tensor)
    keep = torch.from_numpy(rg.exact_pairs(kept[0], 33, 100))
    mass = (full[0, 0] * keep).sum(-1)
    divergence = torch.special.xlogy(masked, masked) - torch.special.xlogy(masked, full)
    torch.testing.assert_close(divergence.sum(-1)[0, 0], -mass.log(), rtol=0, atol=1e-9)
    variation = (masked - full).abs().sum(-1)[0, 0] / 2
    torch.testing.assert_close(variation, 1 - mass, rtol=0, atol=1e-12)
    value = torch.randn(100, 3, generator=generator).double()
    moved = ((masked - full)[0, 0] @ value).norm(dim=-1)
    assert (moved <= 2 * (1 - mass) * value.norm(dim=-1).max() + 1e-12).all()


@given(st.integers(0, 10_000), st.integers(2, 200), st.floats(0.01, 10))
@_few
def test_low_entropy_bounds_the_tail(seed: int, n: int, alpha: float) -> None:
    """Mass beyond the k most probable keys ≤ H / ln(k + 1)."""
    p = np.sort(np.random.default_rng(seed).dirichlet(np.full(n, alpha)))[::-1]
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
    tail = 1 - p.cumsum()
    k = np.arange(1, n + 1)
    assert (tail <= entropy / np.log(k + 1) + 1e-12).all()


def test_regions_that_are_causal_one_by_one_are_causal_all_at_once() -> None:
    heads = ((band(-32, 80), stripe(0, 256, mode=Mode.COARSE, segment=2)),)
    one_by_one = tuple(tuple(replace(r, causal=True) for r in regions) for regions in heads)
    inputs = draw_inputs(130, 130)
    at_once, _ = run_both(inputs, heads, is_causal=True)
    each, _ = run_both(inputs, one_by_one)
    torch.testing.assert_close(at_once.out, each.out, rtol=0, atol=1e-12)
    changed = draw_inputs(130, 130)
    for x in changed:
        x[:, :, 100:] = 7.0
    later, _ = run_both(changed, heads, is_causal=True)
    assert torch.equal(later.out[:, :, :100], at_once.out[:, :, :100])


def test_integers_are_those_of_the_model_and_pass_gradients_on() -> None:
    heads = (
        (band(-32, 80), stripe(0, 96, mode=Mode.COARSE, segment=4)),
        (stripe(0, 32), band(0, 16), stripe(64, 32, mode=Mode.LOW_PRECISION)),
    )
    query, key, value = draw_inputs(70, 100, heads=4, dtype=torch.float32, grad=True)
    key, value = key[:, :2], value[:, :2]
    lengths, form = [100, 61], SoftermaxFormat(output_fraction=11)
    found = integer_region_attention(
        query, key, value, heads, n_valid=lengths, enable_gqa=True, form=form
    )
    for b, h in ((0, 1), (1, 2)):
        there = [x[b, g][:n] for x, g, n in (
            (query, h, 70), (key, h // 2, lengths[b]), (value, h // 2, lengths[b]),
        )]  # fmt: skip
        codes = [quantize(x.detach(), 8, granularity="matrix") for x in there]
        q, k, v = (x.codes.long().numpy() for x in codes)
        k, v = (np.pad(x, ((0, 100 - lengths[b]), (0, 0))) for x in (k, v))
        steps = [float(x.scale) for x in codes]
        factor = steps[0] * steps[1] * 8**-0.5
        sums = integer_attention(q, k, v, heads[h // 2], factor, n_valid=lengths[b], form=form)
        expected = torch.from_numpy(sums) * (steps[2] / 2**11)
        torch.testing.assert_close(found[b, h].detach(), expected.float(), rtol=1e-6, atol=0)
    padding = valid_keys(lengths, 100)
    exact = reference_attention(query, key, value, heads, key_padding=padding, enable_gqa=True)
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.15)
    grads = [torch.autograd.grad(x.square().sum(), query)[0] for x in (found, exact)]
    assert float(grads[0].norm()) == pytest.approx(float(grads[1].norm()), rel=0.1)
    with pytest.raises(ValueError, match="n_valid must have 2 entries, got 1"):
        integer_region_attention(query, key, value, heads, n_valid=[3], enable_gqa=True)
