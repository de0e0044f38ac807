"""The rows of `stats()`, counted a second time pair by pair."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.integrations import sparsify
from sparseloom.integrations.counts import LayerCounts, kept_pairs
from sparseloom.kernels import available_backends
from sparseloom.mask import SparseMask
from sparseloom.methods import (
    H2O,
    AttentionInputs,
    Dense,
    Oracle,
    SlidingWindow,
    overlap,
    retained_mass,
)


class Counter:
    """Sums over the calls of layer 0, from boolean masks."""

    def __init__(self) -> None:
        self.kept = self.allowed = 0

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        if inputs.layer:
            return
        batch, heads, q_len, _ = inputs.query.shape
        kv_len = inputs.key.shape[2]
        allowed = torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool)
        if inputs.is_causal:
            allowed = allowed.tril(kv_len - q_len)
        if inputs.key_padding is not None:
            allowed = allowed & inputs.key_padding[:, None, None]
        kept = allowed if mask is None else allowed & mask.expand(batch, heads).to_bool()
        self.allowed += int(allowed.sum())
        self.kept += int(kept.sum())


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pairs_and_macs(zoo: SimpleNamespace, family: str, padding: str) -> None:
    model, inputs, counter = zoo.build(family), zoo.inputs(padding), Counter()
    method = Oracle(sparsity=0.7, minimum_keys=2)
    with sparsify(model, method, observer=counter) as sparse:
        model(**inputs)
        model(**{name: tensor[:, 3:] for name, tensor in inputs.items()})
    row = sparse.stats()[0]
    assert (row["kept_pairs"], row["allowed_pairs"]) == (counter.kept, counter.allowed)
    assert row["density"] == counter.kept / counter.allowed
    assert row["attention_macs"] == counter.kept * 16  # head_dim 8, twice
    assert row["dense_macs"] == counter.allowed * 16
    assert (row["calls"], row["dense_calls"], row["ran"]) == (2, 0, "sparse")
    assert row["method"] == "oracle:sparsity=0.7,minimum_keys=2"
    there = available_backends()["cpu"] is None
    assert row["backend"] == ("cpu" if there else "reference")
    assert row["prediction_macs"] > 0


@torch.no_grad()
def test_bytes_of_one_decode_step(zoo: SimpleNamespace) -> None:
    """Two query heads share a key head: at most both their keys are read, in fp32."""
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=20, batch=1)
    cache = model(**inputs, use_cache=True).past_key_values
    with sparsify(model, SlidingWindow(width=3)) as sparse:
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    row = sparse.stats()[0]
    index_lists = 3 * 4 + 2 * 8  # one shared row of three int32, two int64 offsets
    assert row["kept_pairs"] == 4 * 3
    assert row["bytes"] == 4 * (4 + 2 * 6) * 16 + index_lists
    with sparsify(model, Dense()) as dense:
        model(**inputs, use_cache=False)
    row = dense.stats()[0]
    assert row["bytes"] == 4 * (4 * 20 + 2 * 20) * 16
    assert (row["ran"], row["backend"], row["prediction_macs"]) == ("dense", "dense", 0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_diagnosis(zoo: SimpleNamespace, family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs("left")
    with sparsify(model, Oracle(sparsity=0.7, minimum_keys=2), diagnose=True) as exact:
        model(**inputs)
    for row in exact.stats():
        assert row["prediction_overlap"] == pytest.approx(1.0)
        assert row["retained_mass"] == pytest.approx(row["oracle_mass"])
        assert 0.3 < row["oracle_mass"] < 1.0
    calls: list[tuple[AttentionInputs, SparseMask]] = []

    class Keep:
        def on_attention(
            self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
        ) -> None:
            assert mask is not None
            calls.append((inputs, mask))

    window = SlidingWindow(width=5)
    with sparsify(model, window, diagnose=True, observer=Keep()) as sparse:
        model(**inputs)
    for row, (seen, mask) in zip(sparse.stats(), calls, strict=True):
        assert row["retained_mass"] < row["oracle_mass"]
        assert row["prediction_overlap"] < 0.9
        who = {"is_causal": seen.is_causal, "key_padding": seen.key_padding}
        mass = retained_mass(
            seen.query,
            seen.key,
            mask,
            scale=seen.scale,
            query_padding=seen.query_padding,
            **who,
        )
        assert row["retained_mass"] == pytest.approx(float(mass.mean()))
        budget = 1 - mask.density(**who)
        best = Oracle(sparsity=budget, minimum_keys=1).select(seen)
        assert row["prediction_overlap"] == pytest.approx(float(overlap(mask, best, **who).mean()))
    with sparsify(model, Dense(), diagnose=True) as dense:
        model(**inputs)
    assert "retained_mass" not in dense.stats()[0]
    with pytest.raises(ValueError, match=r"diagnose=True .* 'h2o' selects none"):
        sparsify(model, H2O(), diagnose=True)


def test_a_layer_that_was_replaced_once_stays_so() -> None:
    states = torch.randn(1, 2, 4, 8)
    call = AttentionInputs(
        query=states, key=states, value=states, layer=0, is_causal=False, scale=1.0
    )
    counts = LayerCounts()
    counts.add(call, None, backend="linformer", replaced_macs=5)
    counts.add(call, None, backend="dense")
    row = counts.row(0, "linformer")
    assert (row["ran"], row["calls"], row["dense_calls"]) == ("replaced", 2, 1)
    assert row["attention_macs"] == 5 + 2 * 16 * 16


@given(
    rows=st.integers(1, 6),
    keys=st.integers(1, 6),
    seed=st.integers(0, 999),
    is_causal=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_short_count_is_the_long_one(
    rows: int, keys: int, seed: int, is_causal: bool, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 3, rows, keys, generator=generator) < 0.4
    if seed % 2 and is_causal:
        keep = keep.tril(keys - rows)
    padding = torch.rand(2, keys, generator=generator) < 0.7 if padded else None
    if padding is not None and seed % 3:  # on the right; kept or not
        padding = padding.sort(1, descending=True).values
        keep &= padding[:, None, None] if seed % 3 == 1 else True
    mask = SparseMask.from_bool(keep)
    found = kept_pairs(mask, is_causal=is_causal, key_padding=padding)
    assert torch.equal(found, mask.kept_pairs(is_causal=is_causal, key_padding=padding))
