from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sparseloom.methods import (
    AttentionInputs,
    DynamicSparse,
    MethodShape,
    Predictor,
    PredictorKeys,
    budgets,
    calibrate_thresholds,
    topk_mask,
)

HIDDEN, HEADS, HEAD_DIM, LENGTH = 24, 2, 16, 40


def method_of(*, bits: int = 4, rotary: bool = True, trained: bool = True) -> DynamicSparse:
    predictor = Predictor.for_shape(
        layers=2,
        hidden_size=HIDDEN,
        heads=HEADS,
        head_dim=HEAD_DIM,
        projection=0.5,
        bits=bits,
        rotary=rotary,
    )
    if trained:
        predictor.train()
        for layer in predictor.layers:
            layer.scores(hidden_of(3, seed=99), rotary_of(LENGTH))
    return DynamicSparse(
        sparsity=0.8, projection=0.5, bits=bits, minimum_keys=4, predictor=predictor.eval()
    )


def hidden_of(batch: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rotary_of(length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(start, start + length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def inputs_of(hidden: Tensor, start: int = 0, **changes: object) -> AttentionInputs:
    batch, length = hidden.shape[:2]
    inputs = AttentionInputs(
        query=torch.zeros(batch, HEADS, length, HEAD_DIM),
        key=torch.zeros(batch, 1, start + length, HEAD_DIM),
        layer=1,
        is_causal=True,
        scale=HEAD_DIM**-0.5,
        hidden_states=hidden,
        rotary=rotary_of(length, start),
    )
    return dataclasses.replace(inputs, **changes)


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
@pytest.mark.parametrize("block_size", [(1, 1), (8, 1), (1, 8), (4, 4)])
def test_the_mask_is_the_top_of_the_training_scores(bits: int, block_size: tuple) -> None:
    method = dataclasses.replace(method_of(bits=bits), block_size=block_size)
    assert method.predictor is not None
    inputs = inputs_of(hidden_of(2))
    scores = method.predictor.layers[1].scores(hidden_of(2), rotary_of(LENGTH))
    mask = method.select(inputs)
    assert mask == method.mask_from_scores(scores, inputs)
    assert mask == topk_mask(
        scores, sparsity=0.8, minimum_keys=4, block_size=block_size, is_causal=True
    )
    last = torch.arange(1, LENGTH + 1)[block_size[0] - 1 :: block_size[0]]
    if block_size[1] == 1:
        expected = budgets(last, 0.8, 4).clamp(min=block_size[0] if block_size[0] > 1 else 0)
        assert torch.equal(mask.counts, expected.expand(2, HEADS, -1))


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": 8},
        {"tile": 16, "block_size": (4, 4)},
        {"mask_heads": "kv"},
        {"mask_heads": "one", "block_size": (1, 8), "pooling": "max"},
        {"mask_heads": "one", "tile": 12},
        {"selection": "balanced", "thresholds": ((0.1, 0.2), (0.3, 0.4))},
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_rules_that_are_not_compiled_choose_from_the_same_scores(
    changes: dict, is_causal: bool
) -> None:
    method = dataclasses.replace(method_of(), **changes)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :11] = False
    inputs = inputs_of(hidden_of(2), key_padding=padding, is_causal=is_causal)
    assert method.predictor is not None
    scores = method.predictor.layers[1].scores(hidden_of(2), rotary_of(LENGTH))
    mask = method.select(inputs)
    assert mask == method.mask_from_scores(scores, inputs)
    assert mask.heads == (1 if "mask_heads" in changes else HEADS)  # keys have one head here
    plain = dataclasses.replace(method, mask_heads="query", tile=None, selection="topk")
    assert mask != plain.select(inputs)
    work = method.work(inputs.shape)
    assert work is not None
    assert not work.compiled


def test_two_s_complement_has_one_code_more() -> None:
    method = dataclasses.replace(method_of(bits=2), predictor=None, twos_complement=True)
    shape = MethodShape(2, HIDDEN, HEADS, 1, HEAD_DIM, LENGTH, rotary=True, is_causal=True)
    method = method.initialise(shape)
    assert method.predictor is not None
    method.predictor.train()
    for layer in method.predictor.layers:
        layer.scores(hidden_of(3, seed=99), rotary_of(LENGTH))
    method.predictor.eval()
    inputs = inputs_of(hidden_of(2))
    q, k = method.predictor.layers[1].encode(hidden_of(2), rotary_of(LENGTH))
    for codes in (q.codes, k.codes):
        assert codes.unique().tolist() == [-2, -1, 0, 1]
    scores = method.predictor.layers[1].scores(hidden_of(2), rotary_of(LENGTH))
    assert method.select(inputs) == method.mask_from_scores(scores, inputs)
    text = {name: str(size) for name, size in method.sizes().items()}
    bare = dataclasses.replace(method, predictor=None)
    again = bare.restore(text, method.predictor.state_dict())
    assert again.select(inputs) == method.select(inputs)
    with pytest.raises(ValueError, match="twos_complement must be True, what the predictor was"):
        dataclasses.replace(method, twos_complement=False)


def test_sizes_of_older_files_are_read() -> None:
    method = method_of()
    assert method.predictor is not None
    sizes = method.sizes()
    del sizes["twos_complement"]
    again = method.restore(sizes, method.predictor.state_dict())
    inputs = inputs_of(hidden_of(2))
    assert again.select(inputs) == method.select(inputs)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"mask_heads": "one", "tile": 8}])
def test_decoding_is_prefill(bits: int, changes: dict) -> None:
    method, hidden = dataclasses.replace(method_of(bits=bits), **changes), hidden_of(2)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :6] = False
    whole = method.select(inputs_of(hidden, key_padding=padding)).to_bool()
    past = method.new_state(1)
    prompt = 25
    first = inputs_of(hidden[:, :prompt], past=past, key_padding=padding[:, :prompt])
    assert torch.equal(method.select(first).to_bool(), whole[:, :, :prompt, :prompt])
    for at in range(prompt, LENGTH):
        step = inputs_of(hidden[:, at : at + 1], at, past=past, key_padding=padding[:, : at + 1])
        row = method.select(step).to_bool()
        assert torch.equal(row[:, :, 0], whole[:, :, at, : at + 1])
    assert past.length == LENGTH


def test_full_precision_decoding_is_prefill_up_to_rounding() -> None:
    method, hidden = method_of(bits=32), hidden_of(1)
    whole = method.predicted_scores(inputs_of(hidden)).rows(0, LENGTH, LENGTH)
    past = method.new_state(1)
    method.remember(inputs_of(hidden[:, :30], past=past))
    rest = method.predicted_scores(inputs_of(hidden[:, 30:], 30, past=past))
    torch.testing.assert_close(rest.rows(0, 10, LENGTH), whole[:, :, 30:], rtol=1e-4, atol=1e-5)


def test_beams_and_rollback() -> None:
    method, hidden = method_of(), hidden_of(2)
    past = method.new_state(1)
    method.remember(inputs_of(hidden[:, :30], past=past))
    past.reorder(torch.tensor([1, 1]))
    past.crop(20)
    swapped = hidden[[1, 1]]
    got = method.select(inputs_of(swapped[:, 20:], 20, past=past)).to_bool()
    assert torch.equal(got, method.select(inputs_of(swapped)).to_bool()[:, :, 20:])


def test_an_untrained_predictor_keeps_the_scale_of_the_first_keys() -> None:
    method, hidden = method_of(trained=False), hidden_of(1)
    past = PredictorKeys(4)
    method.remember(inputs_of(hidden[:, :30], past=past))
    scale = past.scale
    method.select(inputs_of(100 * hidden[:, 30:], 30, past=past))
    assert past.scale is scale


def test_padding_changes_nothing_for_the_others() -> None:
    method = dataclasses.replace(method_of(rotary=False), block_size=(8, 1))
    hidden = hidden_of(2)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, 29:] = False  # right padding, in the middle of a block
    batch = inputs_of(hidden, key_padding=padding, is_causal=False)
    alone = inputs_of(hidden[:1, :29], is_causal=False)
    together = method.select(batch).to_bool()[:1, :, :29, :29]
    assert torch.equal(together, method.select(alone).to_bool())


def test_one_predictor_runs_at_any_sparsity() -> None:
    method = method_of()
    inputs = inputs_of(hidden_of(1))
    kept = [
        dataclasses.replace(method, sparsity=s).select(inputs).kept_pairs(is_causal=True).sum()
        for s in (0.0, 0.5, 0.8, 0.95)
    ]
    assert kept[0] == HEADS * LENGTH * (LENGTH + 1) // 2
    assert kept == sorted(kept, reverse=True)
    assert not dataclasses.replace(method, sparsity=0.0).worthwhile(LENGTH, LENGTH)
    assert not method.worthwhile(4, 4)
    assert method.worthwhile(1, 10)


def test_thresholds_keep_the_wanted_share() -> None:
    method = method_of()
    calls = [
        inputs_of(hidden_of(2, seed=seed), layer=layer, is_causal=False)
        for seed in range(4)
        for layer in (0, 1)
    ]
    tuned = calibrate_thresholds(method, calls)
    assert tuned.selection == "threshold"
    assert tuned.thresholds is not None
    densities = [tuned.select(call).density() for call in calls]
    assert 0.2 <= sum(densities) / len(densities) < 0.21  # a few row maxima come on top
    for call in calls[:2]:
        scores = method.predicted_scores(call).rows(0, LENGTH, LENGTH)
        level = torch.tensor(tuned.thresholds[call.layer])[:, None, None]
        best = torch.nn.functional.one_hot(scores.argmax(-1), LENGTH).bool()
        assert torch.equal(tuned.select(call).to_bool(), (scores >= level) | best)
    elsewhere = dataclasses.replace(tuned, sparsity=0.5)
    with pytest.raises(ValueError, match=r"sparsity must be 0\.8, at which the thresholds were"):
        elsewhere.select(calls[0])
    anew = calibrate_thresholds(elsewhere, calls)
    assert sum(anew.select(call).density() for call in calls) / len(calls) >= 0.5
    balanced = dataclasses.replace(method, selection="balanced")
    balanced = calibrate_thresholds(balanced, calls)
    assert (balanced.selection, balanced.thresholds) == ("balanced", tuned.thresholds)
    for call in calls:
        assert torch.equal(balanced.select(call).counts, method.select(call).counts)
    causal = calibrate_thresholds(method, [dataclasses.replace(c, is_causal=True) for c in calls])
    assert causal.thresholds != tuned.thresholds
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, 20:] = False
    padded = [dataclasses.replace(call, key_padding=padding) for call in calls]
    assert calibrate_thresholds(method, padded).thresholds != tuned.thresholds
    with pytest.raises(ValueError, match=r"calls must hold every layer, got none of \[0\]"):
        calibrate_thresholds(method, calls[1::2])


def test_the_mask_is_a_constant_and_scores_train_the_predictor() -> None:
    method = method_of()
    assert method.predictor is not None
    hidden = hidden_of(1).requires_grad_()
    mask = method.select(inputs_of(hidden))
    assert not mask.indices.requires_grad
    method.predictor.train()
    low_q, low_k = method.predictor.layers[1].project(hidden, rotary_of(LENGTH))
    (low_q @ low_k.transpose(-1, -2)).square().mean().backward()
    gradients = {name: p.grad is not None for name, p in method.predictor.named_parameters()}
    assert gradients == {
        "layers.0.w_q": False,
        "layers.0.w_k": False,
        "layers.1.w_q": True,
        "layers.1.w_k": True,
    }


def test_costs() -> None:
    method = method_of()
    shape = inputs_of(hidden_of(2)).shape
    k = HEADS * 8
    pairs = LENGTH * (LENGTH + 1) // 2
    assert method.prediction_macs(shape) == 2 * (LENGTH * HIDDEN * 2 * k + pairs * k)
    assert DynamicSparse(projection=0.5).prediction_macs(shape) == method.prediction_macs(shape)
    step = dataclasses.replace(shape, q_len=1)
    assert method.prediction_macs(step) == 2 * (HIDDEN * 2 * k + LENGTH * k)


def test_what_is_missing_is_named() -> None:
    method, inputs = method_of(), inputs_of(hidden_of(1))
    with pytest.raises(ValueError, match=r"DynamicSparse has no trained predictor: run sl\.adapt"):
        DynamicSparse().select(inputs)
    with pytest.raises(ValueError, match="hidden_states are missing"):
        method.select(dataclasses.replace(inputs, hidden_states=None))
    with pytest.raises(ValueError, match="rotary is missing"):
        method.select(dataclasses.replace(inputs, rotary=None))
    with pytest.raises(ValueError, match="layer must be below 2, the layers of the predictor"):
        method.select(dataclasses.replace(inputs, layer=2))
    with pytest.raises(ValueError, match="thresholds are missing"):
        dataclasses.replace(method, selection="threshold").select(inputs)
    with pytest.raises(ValueError, match="attention has 50 keys in layer 1, the predictor 40"):
        method.select(inputs_of(hidden_of(1), 10))
    with pytest.raises(ValueError, match="bits must be 4, what the predictor was made with, got 8"):
        dataclasses.replace(method, bits=8)
    with pytest.raises(ValueError, match=r"width of 8 for head_dim 16, got 0\.25"):
        dataclasses.replace(method, projection=0.25)
    with pytest.raises(ValueError, match="thresholds must hold 2 layers of 2 heads"):
        dataclasses.replace(method, thresholds=((1.0, 2.0),))
