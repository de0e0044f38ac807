"""ELSA's selection and its thresholds against plain numpy, one query at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.hashing import angle_bias, make_hasher
from sparseloom.methods import AttentionInputs, Elsa, SlidingWindow, parse_method

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
HASHER, BIAS = make_hasher(DIM), angle_bias(DIM)


def call(
    q_len: int = 24,
    kv_len: int = 24,
    *,
    causal: bool = False,
    padding: str = "none",
    seed: int = 0,
    layer: int = 1,
) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, KV_HEADS, kv_len, DIM, generator=generator)
    lengths = 0.3 + 2 * torch.rand(2, KV_HEADS, kv_len, 1, generator=generator)
    attend = None
    if padding != "none":
        attend = torch.ones(2, kv_len, dtype=torch.bool)
        attend[0, slice(0, 5) if padding == "left" else slice(kv_len - 5, kv_len)] = False
    return AttentionInputs(
        query=torch.randn(2, HEADS, q_len, DIM, generator=generator),
        key=keys * lengths,
        layer=layer,
        is_causal=causal,
        scale=DIM**-0.5,
        key_padding=attend,
    )


def queries_of(inputs: AttentionInputs) -> Any:
    """Every query: where it is, its vector, the keys that it may see, and which those are."""
    shift = inputs.key.shape[2] - inputs.query.shape[2]
    for b in range(inputs.query.shape[0]):
        for h in range(HEADS):
            keys = inputs.key[b, h * KV_HEADS // HEADS].numpy().astype(np.float64)
            for i in range(inputs.query.shape[2]):
                may = np.ones(len(keys), np.bool_)
                if inputs.is_causal:
                    may = np.arange(len(keys)) <= i + shift
                if inputs.key_padding is not None:
                    may = may & inputs.key_padding[b].numpy()
                query = inputs.query[b, h, i].numpy().astype(np.float64)
                yield (b, h, i), query, keys[may], np.flatnonzero(may)


def similarity(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    differ = ((HASHER.matrix @ query >= 0) != (keys @ HASHER.matrix.T >= 0)).sum(-1)
    angle = np.maximum(np.pi / HASHER.bits * differ - BIAS, 0)
    norms = np.linalg.norm(keys, axis=-1)
    return norms * np.cos(angle) / norms.max()


def reference(inputs: AttentionInputs, level: float) -> np.ndarray:
    kept = np.zeros((2, HEADS, inputs.query.shape[2], inputs.key.shape[2]), np.bool_)
    for (b, h, i), query, keys, at in queries_of(inputs):
        if not at.size:
            continue
        found = similarity(query, keys)
        kept[b, h, i, at[found > level]] = True
        kept[b, h, i, at[found.argmax()]] = True
        own = i + inputs.key.shape[2] - inputs.query.shape[2]
        if inputs.is_causal and own in at:
            kept[b, h, i, own] = True
    return kept


@settings(deadline=None, max_examples=12)
@given(
    q_len=st.integers(1, 20),
    more=st.integers(0, 6),
    causal=st.booleans(),
    padding=st.sampled_from(["none", "left", "right"]),
    level=st.floats(-0.5, 0.9),
    seed=st.integers(0, 100),
)
def test_kept_keys_are_the_reference(
    q_len: int, more: int, causal: bool, padding: str, level: float, seed: int
) -> None:
    kv_len = q_len + more + 5
    inputs = call(q_len, kv_len, causal=causal, padding=padding, seed=seed)
    mask = Elsa(thresholds=((9.0,), (level,))).select(inputs)
    np.testing.assert_array_equal(mask.to_bool().numpy(), reference(inputs, level))


def threshold_of(inputs: AttentionInputs, p: float) -> np.ndarray:
    """Mean over a layer's queries of each head: (heads, queries) samples."""
    samples: list[list[float]] = [[] for _ in range(HEADS)]
    for (b, h, i), query, keys, at in queries_of(inputs):
        own = i + inputs.key.shape[2] - inputs.query.shape[2]
        real = inputs.key_padding is None or bool(inputs.key_padding[b, own])
        if not at.size or not real:
            continue
        raw = keys @ query
        weights = np.exp((raw - raw.max()) * inputs.scale)
        weights /= weights.sum()
        some = weights > p / at.size
        chosen = np.where(some, weights, np.inf).argmin() if some.any() else weights.argmax()
        longest = np.linalg.norm(keys, axis=-1).max()
        samples[h].append(raw[chosen] / np.linalg.norm(query) / longest)
    return np.array([np.array(some) for some in samples])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("p", [0.5, 1.0, 4.0])
def test_thresholds_are_the_reference(causal: bool, padding: str, p: float) -> None:
    calls = [call(causal=causal, padding=padding, seed=s, layer=s % 2) for s in range(4)]
    found = Elsa(p=p).calibrate(iter(calls))
    by_head = Elsa(p=p, granularity="head").calibrate(calls)
    assert found.thresholds is not None
    assert by_head.thresholds is not None
    for layer in range(LAYERS):
        samples = np.concatenate(
            [threshold_of(one, p) for one in calls if one.layer == layer], axis=1
        )
        assert found.thresholds[layer] == pytest.approx([samples.mean()], rel=1e-4)
        assert by_head.thresholds[layer] == pytest.approx(samples.mean(1), rel=1e-4)


def test_larger_p_keeps_less() -> None:
    calls = [call(40, 40, seed=s, layer=s % 2) for s in range(4)]
    densities = []
    for p in (0.5, 1.0, 2.0, 4.0):
        method = Elsa(p=p).calibrate(calls)
        densities.append(np.mean([method.select(one).density() for one in calls]))
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[-1] + 0.1
    everything = Elsa(p=0.0).calibrate(calls)
    assert everything.thresholds is None
    assert everything.select(calls[0]).density() == 1.0


@pytest.mark.parametrize("causal", [False, True])
def test_retention_of_each_call_and_head(causal: bool) -> None:
    inputs = call(64, 64, causal=causal, padding="left")
    kept = Elsa(retention=0.2).select(inputs).to_bool()
    may = torch.ones(64, 64, dtype=torch.bool)
    may = may.tril() if causal else may
    assert inputs.key_padding is not None
    allowed = may & inputs.key_padding[:, None, None] & inputs.key_padding[:, None, :, None]
    share = (kept & allowed).sum((-1, -2)) / allowed.sum((-1, -2))
    # Best keys and diagonals come on top of the 20 % of every head.
    assert ((share >= 0.2) & (share < 0.25)).all()


def test_retention_from_sample_text() -> None:
    calls = [call(48, 48, seed=s, layer=s % 2) for s in range(6)]
    method = Elsa(retention=0.3, granularity="head").calibrate(calls)
    assert method.thresholds is not None
    assert [len(heads) for heads in method.thresholds] == [HEADS, HEADS]
    density = np.mean([method.select(one).density() for one in calls])
    assert density == pytest.approx(0.3, abs=0.02)
    one = Elsa(retention=0.3).calibrate(calls)
    assert one.thresholds is not None
    assert one.thresholds[0] != one.thresholds[1]
    assert Elsa(retention=1.0).select(calls[0]).density() == 1.0


def test_no_later_token_has_a_say() -> None:
    method = Elsa(thresholds=((0.1,), (0.1,)))
    inputs = call(20, 20, causal=True)
    before = method.select(inputs).to_bool()
    key = inputs.key.clone()
    key[:, :, 12:] *= 5.0  # by far the longest keys
    after = method.select(dataclasses.replace(inputs, key=key)).to_bool()
    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert not torch.equal(before[:, :, 12:], after[:, :, 12:])
    # Decoding with a cache keeps what prefill keeps.
    last = dataclasses.replace(inputs, query=inputs.query[:, :, -1:])
    assert torch.equal(method.select(last).to_bool()[:, :, 0], before[:, :, -1])


def test_scale_and_length_of_the_query_do_not_matter() -> None:
    method, inputs = Elsa(thresholds=((0.3,), (0.2,))), call()
    longer = dataclasses.replace(inputs, query=3.0 * inputs.query)
    assert method.select(longer) == method.select(inputs)
    tuned = Elsa().calibrate([dataclasses.replace(inputs, layer=0)])
    finer = dataclasses.replace(inputs, layer=0, query=inputs.query / 4, scale=4 * inputs.scale)
    again = Elsa().calibrate([finer])
    assert tuned.thresholds is not None
    assert again.thresholds is not None
    assert again.thresholds[0] == pytest.approx(tuned.thresholds[0], rel=1e-5)


def test_costs() -> None:
    shape = call(10, 16, causal=True).shape
    hashes = 2 * (HEADS * 10 + KV_HEADS * 16) * 768
    pairs = 2 * HEADS * sum(7 + i for i in range(10))
    assert Elsa().prediction_macs(shape) == hashes + 2 * KV_HEADS * 16 * DIM + pairs
    assert not Elsa(p=0.0).worthwhile(64, 64)
    assert not Elsa(retention=1.0).worthwhile(64, 64)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match=r"thresholds are missing for elsa: run sl\.calibrate"):
        Elsa().select(call())
    with pytest.raises(ValueError, match="layer must be below 1, the layers of the thresholds"):
        Elsa(thresholds=((0.1,),)).select(call())
    with pytest.raises(ValueError, match="thresholds must hold 1 or 4 heads, got 3"):
        Elsa(thresholds=((0.1,), (0.1, 0.2, 0.3))).select(call())
    with pytest.raises(ValueError, match="thresholds must hold one number per layer"):
        Elsa(thresholds=((0.1,), ()))
    with pytest.raises(ValueError, match=r"calls must hold every layer, got none of \[0\]"):
        Elsa().calibrate([call(layer=1)])
    with pytest.raises(ValueError, match="got none of them"):
        Elsa().calibrate([])


def test_a_method_knows_where_it_was_calibrated_from() -> None:
    tuned = Elsa(p=2.0, thresholds=((0.1,), (0.2,)))
    assert parse_method("elsa:p=2,thresholds=0.1/0.2") == tuned
    assert tuned.is_calibrated_from(Elsa(p=2.0))
    assert not tuned.is_calibrated_from(Elsa(p=1.0))
    assert not Elsa(p=2.0).is_calibrated_from(Elsa(p=2.0))
    assert not tuned.is_calibrated_from(SlidingWindow(width=3))
