from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from sparseloom.methods.coding import Coded
from sparseloom.methods.predictor import (
    LayerPredictor,
    Predictor,
    PredictorKeys,
    predictor_width,
)
from sparseloom.methods.rotary import rotate

HIDDEN, HEADS, HEAD_DIM, WIDTH = 32, 2, 16, 6


def layer_of(bits: int = 4, *, rotary: bool = False, seed: int = 0) -> LayerPredictor:
    return LayerPredictor(
        hidden_size=HIDDEN,
        heads=HEADS,
        head_dim=HEAD_DIM,
        width=WIDTH,
        bits=bits,
        rotary=rotary,
        seed=seed,
    )


def hidden_of(length: int = 24, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rotary_of(length: int, dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.arange(length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def calibrated(layer: LayerPredictor, hidden: Tensor, rotary: object = None) -> LayerPredictor:
    layer.train()
    layer.scores(hidden, rotary)  # pyright: ignore[reportArgumentType]
    return layer.eval()


# ------------------------------------------------------------------ equation 5


def test_projection_keeps_lengths_on_average() -> None:
    """Achlioptas: the mean over seeds of ‖xP‖²/‖x‖² is 1 ± 2 %."""
    x = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(7))
    ratios = []
    for seed in range(800):
        p = layer_of(seed=seed).projection
        ratios.append(float((x @ p).square().sum() / x.square().sum()))
    assert abs(sum(ratios) / len(ratios) - 1) < 0.02
    p = layer_of().projection
    assert set((p / math.sqrt(3 / (HEADS * WIDTH))).round().unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(float((p == 0).float().mean()) - 2 / 3) < 0.1


def test_scores_are_equation_5_unfused() -> None:
    layer, hidden = layer_of(32), hidden_of()
    q = (hidden @ layer.projection @ layer.w_q).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    k = (hidden @ layer.projection @ layer.w_k).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    unfused = q @ k.transpose(-1, -2) / math.sqrt(WIDTH)
    torch.testing.assert_close(layer.scores(hidden), unfused, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(hidden), unfused, rtol=1e-5, atol=1e-5)
    low_q, low_k = layer.project(hidden)
    torch.testing.assert_close(low_q @ low_k.transpose(-1, -2), unfused, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.scores(hidden), unfused, rtol=1e-5, atol=1e-5)


def test_a_quantised_score_by_hand() -> None:
    """P·W̃ is the identity, X has the codes 7 and 3: every step can be followed."""
    layer = LayerPredictor(hidden_size=2, heads=1, head_dim=2, width=2, bits=4)
    with torch.no_grad():
        layer.signs.copy_(torch.eye(2))
        factor = math.sqrt(3 / 2)
        layer.w_q.copy_(torch.eye(2) / factor)
        layer.w_k.copy_(torch.eye(2) / factor)
        layer.input_scale.fill_(0.5)
        layer.key_scale.fill_(0.7)
        layer.updates.fill_(1)
    layer.eval()
    hidden = torch.tensor([[[3.4, 1.6], [9.0, -0.2]]])  # codes (7, 3), (7 clipped, 0)
    q, k = layer.encode(hidden)
    torch.testing.assert_close(k.codes[0, 0], torch.tensor([[5.0, 2.0], [5.0, 0.0]]))
    torch.testing.assert_close(q.codes[0, 0], torch.tensor([[7.0, 3.0], [7.0, 0.0]]))
    torch.testing.assert_close(q.scale.flatten(), torch.tensor([0.5, 0.5]) / math.sqrt(2))
    expected = torch.tensor([[41.0, 35.0], [35.0, 35.0]]) * 0.5 / math.sqrt(2) * 0.7
    torch.testing.assert_close(layer.scores(hidden)[0, 0], expected)


# ------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_inference_is_training(bits: int) -> None:
    hidden = hidden_of()
    layer = calibrated(layer_of(bits, rotary=True), hidden, rotary_of(24))
    layer.train()
    trained = layer.scores(hidden, rotary_of(24))
    assert trained.requires_grad
    layer.eval()
    with torch.no_grad():
        q, k = layer.encode(hidden, rotary_of(24))
        rows = layer.score_rows(q, k).rows(0, 24, 24)
    if bits == 32:
        torch.testing.assert_close(rows, trained.detach(), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(rows, trained.detach())
        most = {2: 1, 4: 7, 8: 127}[bits]
        for codes in (q.codes, k.codes):
            assert torch.equal(codes, codes.round())
            assert float(codes.abs().max()) <= most
        integers = q.codes.long() @ k.codes.long().transpose(-1, -2)
        assert torch.equal((q.codes @ k.codes.transpose(-1, -2)).long(), integers)


def test_more_bits_are_closer_to_full_precision() -> None:
    hidden = hidden_of(64)
    exact = layer_of(32).scores(hidden).detach()
    errors = []
    for bits in (2, 4, 8):
        layer = calibrated(layer_of(bits), hidden)
        errors.append(float((layer.scores(hidden).detach() - exact).square().mean() / exact.var()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[1] < 0.1
    assert errors[2] < 1e-3


def test_scales_are_moving_averages_that_padding_does_not_touch() -> None:
    layer = layer_of(8).train()
    first, second = hidden_of(seed=1), 3 * hidden_of(seed=2)
    layer.scores(first)
    start = float(layer.input_scale)
    assert start == pytest.approx(float(first.abs().max()) / 127, rel=1e-5)
    keys = layer.key_scale.clone()
    layer.scores(second)
    batch = float(second.abs().max()) / 127
    assert float(layer.input_scale) == pytest.approx(0.99 * start + 0.01 * batch, rel=1e-5)
    assert (layer.key_scale > keys).all()
    assert int(layer.updates) == 2
    padded = layer_of(8).train()
    loud = first.clone()
    loud[:, :5] = 1e6
    real = torch.arange(24).expand(2, -1) >= 5
    padded.scores(loud, key_padding=real)
    assert float(padded.input_scale) <= start


def test_nothing_is_learned_outside_of_training() -> None:
    layer = layer_of().eval()
    layer.scores(hidden_of())
    assert int(layer.updates) == 0
    layer.train()
    with torch.no_grad():
        layer.scores(hidden_of())
    assert int(layer.updates) == 0


def test_silence_and_one_token() -> None:
    for bits in (2, 4, 8, 32):
        layer = layer_of(bits).eval()
        assert torch.equal(layer.scores(torch.zeros(1, 3, HIDDEN)), torch.zeros(1, HEADS, 3, 3))
        assert layer.scores(hidden_of(1)).isfinite().all()


def test_half_precision_inputs_and_autocast() -> None:
    layer, hidden = calibrated(layer_of(), hidden_of()), hidden_of()
    with torch.autocast("cpu", torch.bfloat16):
        scores = layer.scores(hidden)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, layer.scores(hidden))
    assert layer.scores(hidden.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_gradients_pass_straight_through(bits: int) -> None:
    hidden = hidden_of().requires_grad_()
    layer = layer_of(bits).train()
    target = torch.randn(2, HEADS, 24, 24, generator=torch.Generator().manual_seed(5))
    (layer.scores(hidden) * target).mean().backward()
    exact = layer_of(32)
    (exact.scores(hidden.detach()) * target).mean().backward()
    for name in ("w_q", "w_k"):
        mine, true = getattr(layer, name).grad, getattr(exact, name).grad
        cosine = torch.nn.functional.cosine_similarity(mine.flatten(), true.flatten(), dim=0)
        assert float(cosine) > {2: 0.3, 4: 0.9, 8: 0.999, 32: 0.999999}[bits]
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) > 0
    assert not layer.signs.is_floating_point()  # P is no parameter


def test_it_learns() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(HIDDEN, 4) / math.sqrt(HIDDEN)
    layer = layer_of(4).train()
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        hidden = hidden_of(16, seed=step)
        wanted = (hidden @ teacher @ teacher.T @ hidden.transpose(1, 2))[:, None]
        loss = (layer.scores(hidden) - wanted).square().mean()
        layer.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach() / wanted.var()))
    assert losses[-1] < 0.6 * losses[0]


# ------------------------------------------------------------------ the cached product


def test_cached_product_follows_the_weights() -> None:
    layer, hidden = calibrated(layer_of(), hidden_of()), hidden_of()
    with torch.no_grad():
        before = layer.scores(hidden)
        kept = layer._fused()
        assert layer._fused() is kept
        layer.w_k.mul_(-1)
        assert layer._fused() is not kept
        torch.testing.assert_close(layer.scores(hidden), -before)
        other = calibrated(layer_of(seed=9), hidden)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.scores(hidden), other.scores(hidden))
        twin = copy.deepcopy(layer)
        twin.w_q.zero_()
        assert not twin.scores(hidden).any()
        assert layer.scores(hidden).any()
        layer.to(torch.bfloat16).to(torch.float32)
        assert layer._kept is None
    with torch.inference_mode():
        inside = layer.scores(hidden)
    torch.testing.assert_close(layer.scores(hidden), inside.clone())


# ------------------------------------------------------------------ rotary positions


def test_rotation_depends_on_distance_only_and_spans_the_frequencies() -> None:
    layer = layer_of(32, rotary=True)
    same = hidden_of(1, 1).expand(1, 30, HIDDEN)
    scores = layer.scores(same, rotary_of(30)).detach()
    torch.testing.assert_close(scores[0, :, 5, 3], scores[0, :, 25, 23], rtol=1e-4, atol=1e-5)
    assert float((scores[0, :, 5, 3] - scores[0, :, 5, 0]).abs().max()) > 1e-3
    one = torch.zeros(1, 1, 3, WIDTH)
    one[..., :3] = 1  # the first halves of the three pairs
    cos, sin = rotary_of(3)
    turned = rotate(one, (cos, sin), layer.frequencies(cos))
    frequencies = 100.0 ** (-torch.tensor([0.0, 4, 7]) * 2 / HEAD_DIM)  # of 8: fast, middle, slow
    angle = torch.arange(3)[:, None] * frequencies
    torch.testing.assert_close(turned[0, 0, :, :3], angle.cos())
    torch.testing.assert_close(turned[0, 0, :, 3:], angle.sin())
    with pytest.raises(ValueError, match="rotary is missing"):
        layer.scores(same)
    with pytest.raises(ValueError, match="width must be even in a rotary predictor, got 5"):
        LayerPredictor(hidden_size=8, heads=1, head_dim=8, width=5, rotary=True)


def test_partly_rotary_models_turn_the_same_share() -> None:
    layer = layer_of(32, rotary=True)
    low = torch.randn(1, HEADS, 4, WIDTH)
    angles = rotary_of(4, HEAD_DIM // 2)
    turned = rotate(low, angles, layer.frequencies(angles[0]))  # half of 3 pairs: 2
    assert torch.equal(turned[..., 4:], low[..., 4:])
    assert not torch.equal(turned[:, :, 1:, :4], low[:, :, 1:, :4])


def test_interleaved_frequencies_are_refused() -> None:
    cos, sin = (table[..., : HEAD_DIM // 2].repeat_interleave(2, -1) for table in rotary_of(24))
    with pytest.raises(NotImplementedError, match="in two halves, as Llama's do"):
        layer_of(rotary=True).scores(hidden_of(), (cos, sin))


def test_other_predictors_ignore_rotary_positions() -> None:
    layer = layer_of(32)
    assert torch.equal(layer.scores(hidden_of(), rotary_of(24)), layer.scores(hidden_of()))


# ------------------------------------------------------------------ sizes and storage


def test_width_is_the_rounded_share_of_the_head() -> None:
    sigmas = (0.1, 0.16, 0.2, 0.25, 0.33)
    assert [predictor_width(64, s, rotary=False) for s in sigmas] == [6, 10, 13, 16, 21]
    assert [predictor_width(64, s, rotary=True) for s in sigmas] == [6, 10, 14, 16, 22]
    assert predictor_width(8, 0.01, rotary=False) == 1
    with pytest.raises(ValueError, match=r"projection must be in \(0, 1\], got 1.5"):
        predictor_width(64, 1.5, rotary=False)


def test_predictors_are_seeded_and_stored() -> None:
    sizes = {"layers": 2, "hidden_size": HIDDEN, "heads": HEADS, "head_dim": HEAD_DIM}
    predictor = Predictor.for_shape(**sizes, projection=0.3, rotary=True, seed=5)
    again = Predictor.for_shape(**sizes, projection=0.3, rotary=True, seed=5)
    assert all(map(torch.equal, predictor.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(predictor.layers[0].signs, predictor.layers[1].signs)
    calibrated(predictor.layers[1], hidden_of(), rotary_of(24))
    predictor.eval()
    text = {key: str(value) for key, value in predictor.shape().items()}
    for shape in (predictor.shape(), text):
        loaded = Predictor.from_state(shape, predictor.state_dict())
        assert (loaded.bits, loaded.width, loaded.rotary) == (4, 6, True)
        assert not loaded.training
        with torch.no_grad():
            expected = predictor.layers[1].scores(hidden_of(), rotary_of(24))
            assert torch.equal(loaded.layers[1].scores(hidden_of(), rotary_of(24)), expected)
    with pytest.raises(ValueError, match="width of the stored predictor is damaged: 'missing'"):
        Predictor.from_state({**predictor.shape(), "width": "missing"}, {})
    with pytest.raises(ValueError, match="weights of the stored predictor do not fit"):
        Predictor.from_state({**predictor.shape(), "width": 8}, predictor.state_dict())
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        Predictor.for_shape(**{**sizes, "layers": 0})
    with pytest.raises(ValueError, match="bits must be one of 2, 4, 8, 32, got 5"):
        Predictor.for_shape(**sizes, bits=5)


# ------------------------------------------------------------------ remembered keys


def keys_of(batch: int, length: int, seed: int = 0) -> Coded:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (batch, HEADS, length, WIDTH), generator=generator)
    return Coded(codes.float(), torch.full((1, HEADS, 1, 1), 0.5))


def test_keys_follow_the_cache() -> None:
    keys = PredictorKeys(4)
    assert keys.length == 0
    for operation in (
        lambda: keys.crop(3),
        lambda: keys.reorder(torch.tensor([0])),
        lambda: keys.batch_repeat_interleave(2),
        lambda: keys.batch_select_indices(torch.tensor([0])),
    ):
        operation()  # an empty state takes every operation
    assert keys.length == 0
    first, second = keys_of(2, 5), keys_of(2, 2, seed=1)
    keys.append(first)
    everything = keys.append(second)
    assert everything.codes.dtype == torch.int8
    expected = torch.cat([first.codes, second.codes], 2)
    assert torch.equal(everything.codes.float(), expected)
    assert torch.equal(everything.scale, first.scale)
    keys.reorder(torch.tensor([1, 1]))
    assert torch.equal(keys.append(keys_of(2, 0)).codes.float(), expected[[1, 1]])
    keys.batch_repeat_interleave(2)
    keys.batch_select_indices(torch.tensor([0, 3, 1]))
    assert torch.equal(keys.append(keys_of(3, 0)).codes.float(), expected[[1, 1, 1]])
    keys.crop(4)
    assert keys.length == 4
    keys.crop(-1)
    assert torch.equal(keys.append(keys_of(3, 0)).codes.float(), expected[[1, 1, 1], :, :3])
    keys.crop(-10)
    assert keys.length == 0
