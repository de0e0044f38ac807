"""Prediction and selection in C++ against the plain torch of `methods/`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import prediction
from sparseloom.kernels.cpu import native, predict
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, DynamicSparse, Predictor
from sparseloom.methods.coding import Coded
from sparseloom.methods.compiled import encode_to_codes, threshold_of_codes, topk_of_codes
from sparseloom.methods.grid import Grid
from sparseloom.methods.pooling import pool_scores
from sparseloom.methods.predictor import LayerPredictor
from sparseloom.methods.selection import threshold_mask, topk_mask

POOLINGS = ("mass", "max", "mean")


def codes_of(
    batch: int, heads: int, q_len: int, kv_len: int, width: int, bits: int = 4, seed: int = 0
) -> tuple[Coded, Coded]:
    """Random codes, as the predictor makes them, with scores of a few units."""
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1) - 1

    def draw(length: int) -> Tensor:
        normal = torch.randn(batch, heads, length, width, generator=generator)
        return (normal * max(1.0, most / 2.5)).round().clamp(-most, most)

    scale = 2.0 / (math.sqrt(width) * max(1.0, most / 2.5) ** 2)
    rows = scale * (0.5 + torch.rand(batch, heads, q_len, 1, generator=generator))
    per_head = 0.5 + torch.rand(1, heads, 1, 1, generator=generator)
    return Coded(draw(q_len), rows), Coded(draw(kv_len), per_head)


def scores_of(q: Coded, k: Coded) -> Tensor:
    return (q.codes.float() @ k.codes.float().transpose(-1, -2)) * (q.scale * k.scale)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    q_len, kv_len = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    bits = draw(st.sampled_from([2, 4, 8]))
    width = draw(st.sampled_from([1, 3, 8, 16, 18, 32, 70]))
    padding = None
    if draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        share = draw(st.sampled_from([0.0, 0.3, 0.9]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        padding = torch.rand(rows, kv_len, generator=generator) < share
    return {
        "sizes": (batch, heads, q_len, kv_len, width, bits, draw(st.integers(0, 1000))),
        "blocks": {
            "block_size": draw(
                st.sampled_from([(1, 1), (1, 1), (4, 1), (8, 1), (1, 3), (5, 2), (20, 4), (33, 1)])
            ),
            "is_causal": draw(st.booleans()),
            "key_padding": padding,
        },
        "sparsity": draw(st.sampled_from([0.0, 0.3, 0.5, 0.9])),
        "minimum_keys": draw(st.sampled_from([1, 3, 16])),
        "pooling": draw(st.sampled_from(POOLINGS)),
        "voters": draw(st.booleans()),
        "threshold": draw(st.sampled_from([-1e9, -1.0, 0.0, 0.7, 1e9])),
    }


@given(cases())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_topk_is_that_of_the_reference(case: dict[str, Any]) -> None:
    q, k = codes_of(*case["sizes"])
    batch, _, q_len, kv_len = case["sizes"][:4]
    query_padding = None
    if case["voters"]:
        generator = torch.Generator().manual_seed(1)
        query_padding = torch.rand(batch, q_len, generator=generator) < 0.6
    common = {
        **case["blocks"],
        "sparsity": case["sparsity"],
        "minimum_keys": case["minimum_keys"],
        "query_padding": query_padding,
        "pooling": case["pooling"],
    }
    expected = topk_mask(scores_of(q, k), **common)
    whole = _block_scores(q, k, case, query_padding)
    for tier in native.available_tiers():
        with native.use_tier(tier):
            got = topk_of_codes(q, k, **common)
        assert torch.equal(got.offsets, expected.offsets), tier
        remade = SparseMask(
            got.indices,
            got.offsets,
            block_size=got.block_size,
            q_len=q_len,
            kv_len=kv_len,
        )  # validates: ascending, in range
        if got.block_size == (1, 1):
            assert remade == expected, tier
        else:
            half = tier == "amx" and case["pooling"] == "mass"
            _same_but_for_rounding(got, expected, whole, tier, HALF_EXP if half else 1e-3)


# Masses out of FP16 exponentials are off by 1.8e-3 at most, so two keys may change places within
# twice that.
HALF_EXP = 3.6e-3


def _block_scores(
    q: Coded, k: Coded, case: dict[str, Any], query_padding: Tensor | None
) -> Tensor | None:
    blocks = case["blocks"]
    if blocks["block_size"] == (1, 1):
        return None
    q_len, kv_len = q.codes.shape[2], k.codes.shape[2]
    grid = Grid(q_len, kv_len, **blocks, device=torch.device("cpu"))
    pairs = grid.allowed_pairs(0, q_len, kv_len)
    scores = scores_of(q, k)
    return pool_scores(scores, pairs, blocks["block_size"], case["pooling"], query_padding)


def _same_but_for_rounding(
    got: SparseMask, expected: SparseMask, whole: Tensor, tier: str, tolerance: float = 1e-3
) -> None:
    """What the two masks do not share has scores that differ by a rounding error only."""
    ours, theirs = got.to_block_bool(), expected.to_block_bool()
    ranked = whole.nan_to_num(neginf=-1e30)
    if not (ranked < 0).any():  # masses: what is kept has to hold as much
        mass, best = ((ranked * kept).sum(-1) for kept in (ours, theirs))
        assert (mass >= best * (1 - 1e-3) - 1e-30).all(), tier
    for row in (ours ^ theirs).any(-1).nonzero().tolist():
        b, h, i = row
        gained = ranked[b, h, i][ours[b, h, i] & ~theirs[b, h, i]]
        lost = ranked[b, h, i][theirs[b, h, i] & ~ours[b, h, i]]
        level = max(1e-30, float(ranked[b, h, i].abs().max()) if (ranked < 0).any() else 0.0)
        room = tolerance * max(level, float(lost.abs().max()))
        assert float(lost.max() - gained.min()) <= room, (tier, row)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_thresholds_keep_the_pairs_of_the_reference(case: dict[str, Any]) -> None:
    q, k = codes_of(*case["sizes"])
    level = torch.full((case["sizes"][1],), case["threshold"])
    expected = threshold_mask(scores_of(q, k), level, **case["blocks"])
    for tier in native.available_tiers():
        with native.use_tier(tier):
            assert threshold_of_codes(q, k, level, **case["blocks"]) == expected, tier


def test_ties_go_to_the_lowest_key(tier: str) -> None:
    q = Coded(torch.ones(1, 1, 64, 16), torch.ones(1, 1, 64, 1))
    k = Coded(torch.zeros(1, 1, 3000, 16), torch.ones(1, 1, 1, 1))
    k.codes[:, :, 1000:1700, 0] = 1
    common: dict[str, Any] = {
        "minimum_keys": 1,
        "is_causal": False,
        "key_padding": None,
        "query_padding": None,
    }
    for block_size in ((1, 1), (8, 1)):
        for pooling in POOLINGS:
            some = topk_of_codes(
                q, k, sparsity=0.9, block_size=block_size, pooling=pooling, **common
            )
            rows, _ = some.padded()
            assert (rows == torch.arange(1000, 1300)).all()
            more = topk_of_codes(
                q, k, sparsity=0.7, block_size=block_size, pooling=pooling, **common
            )
            rows, _ = more.padded()
            wanted = torch.cat([torch.arange(200), torch.arange(1000, 1700)])
            assert (rows == wanted).all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("sharp", [0.3, 1.5, 30.0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [(8, 1), (32, 1)])
def test_long_selections_retain_as_much(
    tier: str, pooling: str, sharp: float, bits: int, block_size: tuple[int, int]
) -> None:
    _retains_as_much(bits, sharp, pooling, block_size)


@pytest.mark.skipif("avx2" not in native.available_tiers(), reason="no AVX2")
@pytest.mark.parametrize("sharp", [2.0, 5.0, 7.0, 12.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_masses_far_below_the_bound_of_their_row(bits: int, sharp: float) -> None:
    with native.use_tier("avx2"):
        _retains_as_much(bits, sharp, "mass", (8, 1))


def _retains_as_much(bits: int, sharp: float, pooling: str, block_size: tuple[int, int]) -> None:
    q, k = codes_of(1, 1, 32, 3001, 16, bits)
    q = Coded(q.codes, q.scale * sharp)
    common: dict[str, Any] = {
        "sparsity": 0.9,
        "minimum_keys": 1,
        "block_size": block_size,
        "is_causal": False,
        "key_padding": None,
        "query_padding": None,
        "pooling": pooling,
    }
    scores = scores_of(q, k)
    expected, got = topk_mask(scores, **common), topk_of_codes(q, k, **common)
    assert torch.equal(got.offsets, expected.offsets)
    assert (got.to_block_bool() & expected.to_block_bool()).sum() >= 0.98 * expected.nnz
    mass = scores.double().softmax(-1).unflatten(2, (-1, block_size[0])).sum(3)
    kept = [(mass * mask.to_block_bool()).sum(-1) for mask in (got, expected)]
    assert ((kept[0] - kept[1]).abs() <= 1e-3 * kept[1]).all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("block_size", [(8, 2), (5, 3), (16, 16), (24, 1), (40, 8)])
def test_pooled_scores(tier: str, pooling: str, block_size: tuple[int, int]) -> None:
    q, k = codes_of(2, 2, 50, 70, 16)
    case = {"blocks": {"block_size": block_size, "is_causal": True, "key_padding": None}}
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1, :9] = False
    case["blocks"]["key_padding"] = padding
    grid = Grid(50, 70, **case["blocks"], device=torch.device("cpu"))
    budget = grid.budget(0.5, 1)
    blocks = predict.Blocks(block_size, True, padding, grid.visible, budget, grid.diagonal)
    codes = predict.Codes(
        q.codes.to(torch.int8), q.scale, k.codes.to(torch.int8), k.scale.reshape(-1)
    )
    got = predict.pooled_scores(codes, blocks, pooling=pooling)
    expected = pool_scores(
        scores_of(q, k), grid.allowed_pairs(0, 50, 70), block_size, pooling, None
    )
    # Blocks that are kept in any case may have any score.
    rows, columns = got.shape[2:]
    free = grid.allowed_blocks(0, rows, columns) & ~grid.diagonal_blocks(0, rows, columns)
    free = free.expand_as(got)
    torch.testing.assert_close(got[free], expected[free], rtol=3e-3, atol=1e-4)


def _layer(
    *, bits: int = 4, width: int = 16, heads: int = 3, hidden_size: int = 40, rotary: bool = True
) -> LayerPredictor:
    layer = LayerPredictor(
        hidden_size=hidden_size,
        heads=heads,
        head_dim=32,
        width=width,
        bits=bits,
        rotary=rotary,
    )
    layer.train()
    with torch.enable_grad():  # its scales are learned
        layer.scores(torch.randn(2, 30, hidden_size), _rotary(30))
    return layer.eval()


def _rotary(length: int) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, 24, 2) / 24)  # a part of the head turns
    angle = torch.arange(length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("width", "hidden_size", "rotary"), [(16, 40, True), (6, 70, True), (5, 512, False)]
)
@torch.no_grad()
def test_codes_are_those_of_the_reference(
    tier: str, bits: int, width: int, hidden_size: int, rotary: bool
) -> None:
    torch.manual_seed(0)
    layer = _layer(bits=bits, width=width, hidden_size=hidden_size, rotary=rotary)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden = torch.randn(2, 37, hidden_size).to(dtype)
        hidden[0, 3] = 0
        turn = _rotary(37) if rotary else None
        got = encode_to_codes(layer, hidden, turn)
        assert got is not None
        for ours, theirs in zip(got, layer.encode(hidden, turn), strict=True):
            assert torch.equal(ours.codes.float(), theirs.codes)
            assert torch.equal(ours.scale, theirs.scale)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_left_to_the_reference(tier: str) -> None:
    layer = _layer()
    for odd in (math.nan, math.inf):
        hidden = torch.randn(1, 20, 40)
        hidden[0, 7, 39] = odd
        assert encode_to_codes(layer, hidden, _rotary(20)) is None


def _inputs(length: int, hidden_size: int, heads: int, **changes: Any) -> AttentionInputs:
    inputs = AttentionInputs(
        query=torch.zeros(1, heads, length, 8),
        key=torch.zeros(1, heads, length, 8),
        layer=0,
        is_causal=False,
        scale=1.0,
        hidden_states=torch.randn(1, length, hidden_size),
    )
    return dataclasses.replace(inputs, **changes)


def _method(hidden_size: int, heads: int, head_dim: int, **settings: Any) -> DynamicSparse:
    predictor = Predictor.for_shape(
        layers=1, hidden_size=hidden_size, heads=heads, head_dim=head_dim, projection=0.25
    )
    predictor.train()
    predictor.layers[0].scores(torch.randn(1, 256, hidden_size))
    return DynamicSparse(projection=0.25, predictor=predictor.eval(), **settings)


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_select_is_the_whole_path(selection: str) -> None:
    torch.manual_seed(0)
    method = _method(64, 2, 64, sparsity=0.8, minimum_keys=4)
    if selection == "threshold":
        method = dataclasses.replace(method, selection="threshold", thresholds=((0.5, 1.0),))
    inputs = _inputs(100, 64, 2, is_causal=True)
    assert method.select(inputs) == method.mask_from_scores(method.predicted_scores(inputs), inputs)


def test_what_is_not_supported_is_said() -> None:
    cpu = torch.device("cpu")
    assert prediction.unsupported(4, 16, cpu) is None
    assert prediction.unsupported(8, 260, cpu) is None
    assert "below 261" in str(prediction.unsupported(8, 261, cpu))
    assert "not quantised" in str(prediction.unsupported(32, 16, cpu))
    assert "meta" in str(prediction.unsupported(4, 16, torch.device("meta")))


def test_scratch_is_of_the_order_of_the_keys(tier: str) -> None:
    length, heads = 16384, 8
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (1, heads, length, 16), generator=generator, dtype=torch.int8)
    scale = torch.full((1, heads, length, 1), 0.01)
    grid = Grid(
        length, length, block_size=(8, 1), is_causal=False, key_padding=None, device=codes.device
    )
    # Only the scratch is looked at, so one block is enough: the others have no budget.
    budget = torch.zeros_like(grid.allowed)
    blocks = predict.Blocks((8, 1), False, None, grid.visible, budget, grid.diagonal)
    offsets = predict.offsets_of(budget[:, None].expand(1, heads, -1))
    few = predict.Codes(codes[:, :, :8], scale[:, :, :8], codes, torch.ones(heads))
    narrow = predict.Blocks(
        (8, 1), False, None, grid.visible[:, :1], budget[:, :1], grid.diagonal[:1]
    )
    indices, scratch = predict.top_keys(few, narrow, offsets[..., :2], pooling="mass")
    held = scratch + 2 * codes.numel() + 4 * scale.numel()
    assert not len(indices)
    assert blocks.visible.shape[-1] == length // 8
    assert held < 32 << 20
