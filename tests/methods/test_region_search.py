"""Mask selection: what regions cover and cost, the budget, and what calibration sums up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.methods import AttentionInputs
from sparseloom.methods.region_candidates import (
    allowed_tiles,
    candidates,
    forced_regions,
)
from sparseloom.methods.region_head import Head, full_rows, segments_of, slimmed
from sparseloom.methods.region_polish import hull
from sparseloom.methods.region_search import (
    SearchSettings,
    forced_within,
    least_density,
    search,
    tile_values,
)
from sparseloom.methods.region_tiles import best_tiles
from sparseloom.methods.tile_statistics import TileStatistics
from sparseloom.regions import Mode, band, block, computed_tiles, owners, region_limit, stripe

LENGTH = 320


def statistics(
    seed: int = 0, *, is_causal: bool = False, layers: int = 2, heads: int = 3, even: float = 0.3
) -> TileStatistics:
    """Local, striped and broad heads, drawn at random."""
    found = TileStatistics(LENGTH, is_causal, layers, heads, inputs=1)
    draw = np.random.default_rng(seed)
    _, _, q_tiles, k_tiles = found.mass.shape
    t, u = np.arange(q_tiles)[:, None] * 16 + 8, np.arange(k_tiles)[None] * 32 + 16
    for layer, head in np.ndindex(layers, heads):
        mass = np.exp(-np.abs(t - u) / draw.choice([8.0, 30.0, 500.0]))
        mass += draw.uniform(0, 1) * (u < 32) + 0.2 * draw.uniform(size=(q_tiles, k_tiles))
        mass *= (u - 16 <= t + 7) if is_causal else 1
        found.mass[layer, head] = 16 * mass / mass.sum(1, keepdims=True)
        found.saliency[layer, head] = found.mass[layer, head] * draw.uniform(0, 2)
    found.even[:] = found.mass * np.array([even + 0.2, even + 0.1, even])[:, None, None, None, None]
    return found


def head_of(found: TileStatistics, *, is_causal: bool = False) -> Head:
    forced, _ = forced_regions(LENGTH, is_causal=is_causal, force=("diagonal",))
    offered = candidates(LENGTH, is_causal=is_causal)
    return Head(LENGTH, found.mass[0, 0], found.evenness[:, 0, 0], offered, forced)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=6), st.booleans())
def test_gains_and_costs_are_those_of_the_regions(picked: list[int], is_causal: bool) -> None:
    head = head_of(statistics(is_causal=is_causal), is_causal=is_causal)
    offered = head.offered.regions
    regions = head.forced + tuple(offered[i % len(offered)] for i in picked)
    segments = segments_of(regions, LENGTH)
    owner = owners(regions, LENGTH, LENGTH)
    kinds = np.array([r.log2s for r in regions] + [-1])
    assert np.array_equal(segments, kinds[owner])
    value, tiles = head.score(regions)
    assert tiles == computed_tiles(regions, LENGTH, LENGTH)
    gains, costs = (part[0] for part in head._margins([segments]))
    for c in range(0, len(offered), 97):
        after, more = head.score((*regions, offered[c]))
        assert after - value == pytest.approx(gains[c], rel=1e-6, abs=1e-5)  # summed in fp32
        assert abs(more - tiles - costs[c]) <= head.offered.touched[c]
        if all(r.mode is Mode.FULL for r in (*regions, offered[c])):
            assert more - tiles == costs[c]
    slim = slimmed(regions, LENGTH)
    assert np.array_equal(segments_of(slim, LENGTH) >= 0, segments >= 0)
    assert head.score(slim)[0] == pytest.approx(value)


@pytest.mark.parametrize("is_causal", [True, False])
def test_candidates_are_told_apart_and_never_hidden(is_causal: bool) -> None:
    found = candidates(LENGTH, is_causal=is_causal)
    keys = {(tiles.tobytes(), int(c)) for tiles, c in zip(found.tiles, found.coarse, strict=True)}
    assert len(keys) == len(found.regions)
    assert found.tiles.any(1).all()
    assert all(region.causal == is_causal for region in found.regions)
    assert any(r.slope for r in found.regions)
    assert {r.log2s for r in found.regions} == {0, 1, 2, 3}
    assert not candidates(LENGTH, is_causal=is_causal, coarse=False).coarse.any()
    grid = -(-LENGTH // 16), -(-LENGTH // 32)
    assert allowed_tiles(LENGTH, is_causal=is_causal) == (
        sum((16 * t + 15) // 32 + 1 for t in range(grid[0])) if is_causal else np.prod(grid)
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("density", [0.4, 0.6])
@pytest.mark.parametrize(
    "changes",
    [{}, {"coarse": False}, {"budget": "head"}, {"by": "mass"}, {"cover": "tiles"}],
    ids=str,
)
def test_masks_meet_their_budget(density: float, is_causal: bool, changes: Any) -> None:
    found = search(statistics(is_causal=is_causal), SearchSettings(density, **changes))
    allowed = 6 * allowed_tiles(LENGTH, is_causal=is_causal)
    assert found.budget == int(density * allowed + 1e-6)
    assert found.tiles <= found.budget
    # of six small heads a budget of their own leaves up to a tile each unused
    slack = 6 if changes.get("budget") == "head" else 2
    if changes.get("cover") != "tiles":  # whose runs beyond three are dropped
        assert found.tiles >= 0.99 * found.budget - slack
    heads = [head for layer in found.regions for head in layer]
    assert sum(computed_tiles(head, LENGTH, LENGTH) for head in heads) == found.tiles
    assert all(full_rows(head, LENGTH).all() for head in heads)
    if changes.get("cover") != "tiles":
        assert all(len(head) <= region_limit(head) for head in heads)
    if "coarse" in changes or "cover" in changes:
        assert {r.mode for head in heads for r in head} == {Mode.FULL}
    if changes.get("budget") == "head":
        tiles = [computed_tiles(head, LENGTH, LENGTH) for head in heads]
        assert max(tiles) <= found.budget // 6
    assert density < found.value < 1


def test_heads_share_one_budget_unequally_and_gain_from_it() -> None:
    shared = search(statistics(), SearchSettings(0.4))
    apart = search(statistics(), SearchSettings(0.4, budget="head"))
    tiles = {computed_tiles(h, LENGTH, LENGTH) for layer in shared.regions for h in layer}
    assert len(tiles) > 1
    assert shared.value > apart.value


def test_coarse_regions_go_where_attention_is_even() -> None:
    even, uneven = statistics(even=0.78), statistics(even=0.0)
    coarse = [
        sum(r.mode is Mode.COARSE for layer in found.regions for head in layer for r in head)
        for found in (search(even, SearchSettings(0.4)), search(uneven, SearchSettings(0.4)))
    ]
    assert coarse[0] > coarse[1]
    assert (
        search(even, SearchSettings(0.4)).value
        > search(even, SearchSettings(0.4, coarse=False)).value
    )


def test_what_is_forced_stays_when_its_cover_goes() -> None:
    head = head_of(statistics())
    everything = stripe(0, LENGTH)
    head.take(slimmed((*head.forced, everything), LENGTH))
    assert head.regions == (everything,)
    assert head.without(everything) == head.forced
    coarse = stripe(0, LENGTH, mode=Mode.COARSE, segment=4)
    assert head.without(everything, coarse) == (*head.forced, coarse)


def test_polishing_never_loses_value() -> None:
    rough = search(statistics(3), SearchSettings(0.4, polishing=0))
    assert search(statistics(3), SearchSettings(0.4)).value >= rough.value


def test_saliency_keeps_what_the_answer_hangs_on() -> None:
    found = statistics(heads=1, layers=1)
    found.mass[:] = 1.0
    found.saliency[:] = 0.0
    found.saliency[0, 0, 8:, 2] = 1.0
    kept: dict[str, bool] = {}
    ways: tuple[Any, ...] = ("mass", "saliency")
    for name in ways:
        chosen = SearchSettings(0.5, by=name, force=("diagonal",), coarse=False)
        regions = search(found, chosen).regions[0][0]
        kept[name] = (segments_of(regions, LENGTH) == 0)[8:, 2].all()
    assert kept["saliency"]
    values = tile_values(found, SearchSettings())
    assert values.sum() == pytest.approx(1.0)
    assert values[0, 0, 8, 2] > 20 * values[0, 0, 0, 0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density must be at least 0\.\d+ at 320 tokens"):
        search(statistics(), SearchSettings(0.1))
    with pytest.raises(ValueError, match="statistics must hold at least one calibration input"):
        search(TileStatistics(LENGTH, False, 1, 1), SearchSettings())
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        SearchSettings(0)
    with pytest.raises(ValueError, match="force must hold 'diagonal'"):
        SearchSettings(force=("row",))


def test_longer_inputs_hold_what_is_forced_in_a_smaller_budget() -> None:
    settings = SearchSettings(0.4)
    shares = [least_density(settings, n, is_causal=False) for n in (128, 256, 384, 512)]
    assert shares == pytest.approx([17 / 32, 37 / 128, 57 / 288, 77 / 512])
    assert least_density(settings, 128, is_causal=True) == pytest.approx(14 / 20)
    with pytest.raises(ValueError, match=r"density must be at least 0\.5312 at 128 tokens"):
        forced_within(settings, 128, is_causal=False)
    assert len(forced_within(settings, 256, is_causal=False)) == 3


def test_the_hull_of_two_regions() -> None:
    assert hull(band(-16, 32), band(32, 32)) == band(-16, 80)
    assert hull(band(0, 32, r0=2), band(16, 32)) == band(0, 48)
    assert hull(block(0, 2, 0, 32), block(4, 6, 64, 32)) == block(0, 6, 0, 96)
    assert hull(stripe(0, 32), band(0, 32)) is None


def test_best_tiles_of_any_grid() -> None:
    value = np.arange(16.0).reshape(1, 4, 4)
    must = np.eye(4, dtype=bool)[None]
    kept = best_tiles(value, must, 0.5)
    assert kept.sum() == 8
    assert (kept >= must).all()
    assert kept[0, 3].all()


# ------------------------------------------------------------------ statistics


def call(length: int, *, is_causal: bool = False, padding: bool = False) -> AttentionInputs:
    generator = torch.Generator().manual_seed(length)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, length, 8, generator=generator)

    real = torch.ones(2, length, dtype=torch.bool)
    real[1, length - 9 :] = False
    return AttentionInputs(
        query=draw(4),
        key=draw(2),
        value=draw(2),
        layer=1,
        is_causal=is_causal,
        scale=0.4,
        key_padding=real if padding else None,
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_saliency_is_the_gradient_of_the_scores(is_causal: bool, padding: bool) -> None:
    length = 45
    one = call(length, is_causal=is_causal, padding=padding)
    assert one.value is not None
    key, value = (x.repeat_interleave(2, 1) for x in (one.key, one.value))
    scores = (one.query @ key.transpose(-1, -2) * one.scale).requires_grad_()
    hidden = torch.zeros(2, 1, length, length, dtype=torch.bool)
    if is_causal:
        hidden = hidden | ~torch.ones(length, length, dtype=torch.bool).tril()
    if one.key_padding is not None:
        hidden = hidden | ~one.key_padding[:, None, None]
    p = scores.masked_fill(hidden, -1e9).softmax(-1)
    p.retain_grad()
    weight = torch.randn(2, 4, length, 8, generator=torch.Generator().manual_seed(5))
    if one.key_padding is not None:
        weight = weight * one.key_padding[:, None, :, None]
    (p @ value * weight).sum().backward()
    found = TileStatistics(60, is_causal, 2, 4)
    found.add(one, weight)
    assert found.mass.shape == (2, 4, 4, 2)
    assert not found.mass[0].any()
    real = torch.ones(2, length) if one.key_padding is None else one.key_padding.float()
    assert scores.grad is not None
    for name, wanted in {"saliency": scores.grad.abs(), "mass": p.detach()}.items():
        wanted = wanted * real[:, None, :, None]
        wide = torch.zeros(2, 4, 64, 64)
        wide[:, :, :length, :length] = wanted
        tiles = wide.unflatten(3, (2, 32)).unflatten(2, (4, 16)).sum((0, 3, 5))
        np.testing.assert_allclose(getattr(found, name)[1], tiles.numpy(), atol=2e-4)


def test_evenness_is_one_where_segments_are_even_and_falls_where_they_are_not() -> None:
    flat, length = call(45), 45
    zero = AttentionInputs(
        query=flat.query * 0, key=flat.key, value=flat.value, layer=0, is_causal=False, scale=1.0
    )
    found = TileStatistics(length, False, 1, 4)
    found.add(zero, flat.query)
    np.testing.assert_allclose(found.evenness, 1.0, atol=1e-5)
    sharp = TileStatistics(length, False, 2, 4)
    sharp.add(AttentionInputs(query=flat.query * 40, key=flat.key, value=flat.value, layer=0,
                              is_causal=False, scale=1.0), flat.query)  # fmt: skip
    eta = sharp.evenness[:, 0][:, sharp.mass[0] > 1]
    # one key of a segment of s has everything: half of |1 - 1/s| + (s - 1)/s is misplaced
    np.testing.assert_allclose(eta.min(1), [1 / 2, 1 / 4, 1 / 8], atol=0.02)
    with pytest.raises(ValueError, match="at most 30, got 45 and 45"):
        TileStatistics(30, False, 1, 4).add(zero, flat.query)
