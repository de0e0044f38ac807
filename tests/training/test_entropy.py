"""The entropy terms: their gradients and bounds, their schedule, and that training obeys them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Dense
from sparseloom.training import EntropyLoss, EntropySettings, finetune
from sparseloom.training.entropy import (
    RunningMean,
    divergence,
    effective_keys,
    entropy_target,
    in_tiles,
    probabilities,
    row_entropy,
    tail_bound,
    teacher_divergence,
)
from sparseloom.training.loop import LoopSettings

pytest.importorskip("accelerate", reason="training needs the train extra")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 32, (2, 48), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in drawn]


def rows_of(seed: int, rows: int, keys: int, sharpness: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, keys, generator=generator, dtype=torch.float64) * sharpness).softmax(
        -1
    )


ROWS = st.builds(
    rows_of,
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(2, 40),
    st.sampled_from([0.0, 0.5, 3.0, 20.0]),
)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_the_gradient_through_the_softmax_is_minus_p_times_log_p_plus_entropy(p: Tensor) -> None:
    scores = p.clamp(min=1e-200).log().requires_grad_()
    q = scores.softmax(-1)
    row_entropy(q).sum().backward()
    h = row_entropy(p)[:, None]
    torch.testing.assert_close(scores.grad, -p * (p.clamp(min=1e-300).log() + h), atol=1e-9, rtol=0)


def test_the_gradient_vanishes_at_uniform_and_one_hot_rows() -> None:
    for row in ([0.0, 0.0, 0.0, 0.0], [900.0, 0.0, 0.0, 0.0]):
        scores = torch.tensor(row, requires_grad=True)
        row_entropy(scores.softmax(-1)).backward()
        assert scores.grad is not None
        assert scores.grad.abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_the_tail_beyond_the_k_largest_is_bounded_by_the_entropy(p: Tensor) -> None:
    largest = p.sort(-1, descending=True).values
    for row, h in zip(largest, row_entropy(p), strict=True):
        for k in range(1, len(row) + 1):
            assert float(row[k:].sum()) <= tail_bound(float(h), k) + 1e-12


@settings(max_examples=25, deadline=None)
@given(ROWS, st.integers(0, 1000))
def test_masking_costs_minus_the_log_of_the_retained_mass(p: Tensor, seed: int) -> None:
    keep = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[:, 0] = True
    mass = (p * keep).sum(-1)
    masked = (p * keep) / mass[:, None]
    torch.testing.assert_close(divergence(masked, p), -mass.log(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close((masked - p).abs().sum(-1) / 2, 1 - mass, atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_mutual_information_is_the_jensen_gap_and_never_negative(p: Tensor) -> None:
    mean = p.mean(0)
    mutual = divergence(p, mean).mean()
    assert mutual >= -1e-12
    torch.testing.assert_close(mutual, row_entropy(mean) - row_entropy(p).mean(), atol=1e-9, rtol=0)
    assert float(divergence(p[:1], p[0]).abs().max()) < 1e-12


def test_entropy_of_known_rows() -> None:
    p = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(row_entropy(p), torch.tensor([4.0, 1.0, 2.0]).log())
    torch.testing.assert_close(effective_keys(p), torch.tensor([4.0, 1.0, 2.0]))
    assert in_tiles(p, 3).tolist() == [[0.75, 0.25], [1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="kept must be at least 1, got 0"):
        tail_bound(1.0, 0)


def test_target_is_half_the_logarithm_of_the_budget() -> None:
    target = entropy_target(0.25, torch.tensor([64.0, 2.0]))
    assert target.tolist() == pytest.approx([0.5 * math.log(16) / math.log(64), 0.0])


def test_schedule_is_off_then_rises_then_holds_and_shrinks_after_the_freeze() -> None:
    plan = EntropySettings(entropy_weight=0.2, mutual_weight=0.1)
    assert [plan.weights(step, 100) for step in (0, 9, 10)] == [(0, 0)] * 3
    assert plan.weights(30, 100) == pytest.approx((0.1, 0.05))
    assert plan.weights(50, 100) == plan.weights(99, 100) == pytest.approx((0.2, 0.1))
    assert plan.weights(0, 100, frozen=True) == pytest.approx((0.02, 0.0))
    assert EntropySettings(off=0.0, ramp=0.0).weights(0, 9) == (0.03, 0.03)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"off": 0.7, "ramp": 0.4}, "off and ramp must be shares of the steps"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"query_rows": 0}, "query_rows must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EntropySettings(**wrong)


def call(sharpness: float, *, seed: int = 0, is_causal: bool = False, length: int = 12) -> Any:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(3, 2, length, 8, generator=generator) for _ in range(2))
    return AttentionInputs(
        query=(query * sharpness).requires_grad_(), key=key, layer=0, is_causal=is_causal, scale=1.0
    )


def loss_of(*calls: Any, **wanted: Any) -> dict[str, float]:
    """The terms as a loss with weight 1 sees them, off and ramp left out."""
    plan = EntropySettings(off=0.0, ramp=0.0, query_rows=None, **wanted)
    loss = EntropyLoss(plan)
    found: dict[str, float] = {}
    for one in calls:
        total, found = loss([(one, None)], step=0, steps=1)
        found["total"] = total.item()
        if total.requires_grad:
            total.backward()
    return found


def test_the_hinge_is_silent_below_the_target_and_pulls_above_it() -> None:
    flat, sharp = call(0.0), call(30.0)
    only_entropy: dict[str, Any] = {"entropy_weight": 1.0, "mutual_weight": 0.0}
    assert loss_of(sharp, **only_entropy, density=0.9)["total"] == 0.0
    assert sharp.query.grad is None or not sharp.query.grad.any()
    found = loss_of(flat, **only_entropy)
    assert found["entropy"] == pytest.approx(1.0)
    assert found["total"] == pytest.approx(1 - 0.5 * math.log(0.4 * 12) / math.log(12), rel=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("level", ["key", "tile"])
def test_the_second_term_is_zero_for_equal_inputs_and_positive_otherwise(
    level: Any, is_causal: bool
) -> None:
    one = call(2.0, is_causal=is_causal, length=30)
    same = AttentionInputs(
        query=one.query[:1].detach().expand(3, -1, -1, -1),
        key=one.key[:1].expand(3, -1, -1, -1),
        layer=0,
        is_causal=is_causal,
        scale=1.0,
    )
    found: dict[str, Any] = {"level": level, "tile": 8}
    found |= {"entropy_weight": 0.0, "mutual_weight": 1.0}
    assert loss_of(same, **found)["mutual"] == pytest.approx(0.0, abs=1e-5)
    moving = loss_of(one, **found)
    assert moving["mutual"] > 0.05
    assert moving["total"] == pytest.approx(moving["mutual"], rel=1e-6)


def test_padding_and_dropped_keys_take_no_part() -> None:
    one = call(1.0)
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, 7:] = False
    padded = AttentionInputs(
        query=one.query, key=one.key, layer=0, is_causal=False, scale=1.0, key_padding=real
    )
    keep = torch.ones(12, 12, dtype=torch.bool)
    keep[:, 2] = False
    p, allowed, alive = probabilities(padded, torch.arange(12), SparseMask.from_bool(keep))
    assert p[0, :, :, 7:].abs().max() == 0
    assert p[..., 2].abs().max() == 0
    assert torch.equal(alive, real)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 2, 12))
    assert int(allowed.sum(-1)[0, 0, 0]) == 6


def test_the_running_mean_keeps_the_past_constant() -> None:
    mean = RunningMean(0.9)
    rows, alive = torch.arange(2), torch.ones(1, 2, dtype=torch.bool)
    first, second = (torch.full((1, 1, 2, 4), v).requires_grad_() for v in (0.2, 1.0))
    assert torch.equal(mean.update(3, rows, first, alive), first[0])
    found = mean.update(3, rows, second, alive)
    torch.testing.assert_close(found, torch.full((1, 2, 4), 0.9 * 0.2 + 0.1))
    found.sum().backward()
    assert first.grad is None
    assert second.grad is not None
    torch.testing.assert_close(second.grad, torch.full((1, 1, 2, 4), 0.1))
    # a row not seen before takes the batch whole, one that is all padding changes nothing
    longer = torch.full((1, 1, 2, 6), 0.5)
    some = torch.tensor([[True, False]])
    found = mean.update(3, torch.tensor([5, 1]).sort().values, longer, some)
    torch.testing.assert_close(found[0, 1, :4], torch.zeros(4))
    torch.testing.assert_close(found[0, 0, :4], torch.full((4,), 0.28 * 0.9 + 0.05))
    again = RunningMean(0.9)
    again.load_state_dict(mean.state_dict())
    torch.testing.assert_close(
        again.update(3, rows, second.detach(), alive), mean.update(3, rows, second, alive).detach()
    )


def test_teacher_term() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert float(teacher_divergence(logits, logits)) == 0.0
    assert float(teacher_divergence(logits, logits.flip(1))) > 0.5


def entropy_after(weight: float, mutual: float = 0.0, steps: int = 12) -> dict[str, float]:
    plan = EntropySettings(entropy_weight=weight, mutual_weight=mutual, off=0, ramp=0, density=0.1)
    log = finetune(
        tiny_llama(),
        Dense(),
        batches(2),
        steps=steps,
        lr=5e-3,
        entropy=EntropyLoss(plan),
        progress=False,
    )
    assert {"step", "loss", "entropy", "mutual"} == set(log[0])
    return log[-1]


def test_training_lowers_the_entropy_and_the_sign_of_the_weight_matters() -> None:
    with_it, without = entropy_after(1.0), entropy_after(0.0)
    assert with_it["entropy"] < without["entropy"] - 0.01
    assert entropy_after(0.0, 1.0)["mutual"] < without["mutual"] - 0.005


def test_a_stopped_run_goes_on_with_its_running_mean(tmp_path: Path) -> None:
    plan = EntropySettings(off=0, ramp=0, mutual_weight=1.0)

    def run(batches: Any, out: Path | None) -> list[dict[str, float]]:
        return finetune(
            tiny_llama(),
            Dense(),
            batches,
            steps=4,
            entropy=EntropyLoss(plan),
            settings=LoopSettings(4, save_every=2),
            out=out,
            progress=False,
        )

    whole = run(batches(4), None)
    with pytest.raises(ValueError, match="batches ended after 3"):
        run(iter(batches(4)[:3]), tmp_path)
    again = run(batches(4), tmp_path)
    for one, other in zip(again, whole, strict=True):
        assert one == pytest.approx(other)


def test_frozen_masks_keep_a_little_entropy_weight_and_see_kept_keys_only() -> None:
    one = call(0.0)
    keep = torch.zeros(12, 12, dtype=torch.bool)
    keep[:, :3] = True
    loss = EntropyLoss(EntropySettings(density=1.0, query_rows=None), frozen=True)
    total, found = loss([(one, SparseMask.from_bool(keep))], step=0, steps=1)
    assert found["entropy"] == pytest.approx(1.0)  # uniform over the three keys
    assert found["mutual"] == 0.0
    assert total.item() == pytest.approx(0.1 * 0.03 * 0.5, rel=1e-4)
