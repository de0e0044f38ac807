"""``attention``: what it refuses, what it chooses, and its precision rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseloom import kernels
from sparseloom.kernels import AttentionOutput, attention, cpu, flex, ops
from sparseloom.kernels.triton import backend as triton
from sparseloom.mask import SparseMask

# The package's own checks are under test here, not those of the annotations.
_attention: Callable[..., Any] = inspect.unwrap(attention)


def _inputs(heads: int = 4, kv_heads: int = 2, q_len: int = 6, kv_len: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(2, h, n, 4) for h, n in sizes]


_MASK = SparseMask.full(6, 8)
_Q, _K, _V = _inputs()


@pytest.mark.parametrize(
    ("inputs", "options", "error", "sentence"),
    [
        ((_Q[0], _K, _V), {}, ValueError, r"query must have shape \(batch, heads, length"),
        ((_Q, _K.long(), _V), {}, TypeError, "key must be fp16, bf16, fp32 or fp64, got torch.int"),
        ((_Q, _K, _V.double()), {}, TypeError, "value must have dtype torch.float32 as query"),
        ((_Q, _K[:, :, :0], _V), {}, ValueError, "key must not be empty"),
        ((_Q, _K[..., :3], _V), {}, ValueError, r"key must have shape \(2, kv_heads, kv_len, 4\)"),
        ((_Q, _K[:1], _V[:1]), {}, ValueError, r"key must have shape \(2,"),
        ((_Q, _K, _V[:, :, :7]), {}, ValueError, r"value must have shape \(2, 2, 8, 'value_dim'\)"),
        ((_Q, _K, _V), {"enable_gqa": False}, ValueError, "got 2; set enable_gqa=True"),
        ((_Q[:, :3], _K, _V), {}, ValueError, "key must have a number of heads that divides 3"),
        ((_Q, _K, _V), {"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        (
            (_Q, _K, _V),
            {"key_padding": torch.ones(2, 8)},
            TypeError,
            r"key_padding must be bool \(True = attend\), got torch.float32",
        ),
        (
            (_Q, _K, _V),
            {"key_padding": torch.ones(2, 6, dtype=torch.bool)},
            ValueError,
            r"key_padding must have shape \(batch, kv_len\) = \(2, 8\), got \(2, 6\)",
        ),
        (
            (_Q, _K, _V),
            {"mask": torch.ones(6, 8, dtype=torch.bool)},
            TypeError,
            "mask must be a SparseMask or None, got Tensor; SparseMask.from_bool",
        ),
        (
            (_Q, _K, _V),
            {"mask": SparseMask.full(6, 9)},
            ValueError,
            "mask must be for 6 queries and 8 keys, got one for 6 and 9",
        ),
        (
            (_Q, _K, _V),
            {"mask": SparseMask.full(6, 8, batch=3)},
            ValueError,
            "mask must have batch 1 or 2, got 3",
        ),
        (
            (_Q, _K, _V),
            {"mask": SparseMask.full(6, 8, heads=3)},
            ValueError,
            "mask must have a number of heads that divides 4, got 3",
        ),
        (
            (_Q.to("meta"), _K, _V),
            {},
            ValueError,
            "key must be on meta as query, got cpu",
        ),
        (
            (_Q, _K, _V),
            {"backend": "flux"},
            ValueError,
            "unknown backend 'flux'; did you mean 'flex'.*auto, dense, cpu, triton, flex, refer",
        ),
    ],
)
def test_bad_arguments_are_named(
    inputs: tuple[Tensor, ...],
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        _attention(*inputs, **{"enable_gqa": True, **options})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "dense", "mask": _MASK}, "'dense' cannot .* takes no mask"),
        ({"backend": "dense", "return_lse": True}, "'dense' cannot .* neither log-sum-exp"),
        ({"backend": "dense", "return_importance": True}, "'dense' cannot .* nor importance"),
        ({"backend": "flex"}, "'flex' cannot .* needs a mask"),
        ({"backend": "flex", "mask": _MASK}, r"'flex' cannot .* blocks of at least 16x16"),
    ],
)
def test_a_named_backend_raises_rather_than_falls_back(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(NotImplementedError, match=sentence):
        _attention(_Q, _K, _V, enable_gqa=True, **options)


def test_what_comes_back_follows_what_was_asked() -> None:
    plain = attention(_Q, _K, _V, _MASK, enable_gqa=True)
    assert isinstance(plain, Tensor)
    with_lse = attention(_Q, _K, _V, _MASK, enable_gqa=True, return_lse=True)
    assert isinstance(with_lse, AttentionOutput)
    assert with_lse.lse is not None
    assert with_lse.key_importance is None
    assert torch.equal(with_lse.out, plain)
    both = attention(_Q, _K, _V, _MASK, enable_gqa=True, return_lse=True, return_importance=True)
    assert [t.shape for t in both] == [(2, 4, 6, 4), (2, 4, 6), (2, 4, 8), (2, 4)]


def test_auto_is_dense_without_a_mask_and_reference_when_more_is_asked() -> None:
    choose = kernels.choose_backend
    assert choose(_Q, _K, _V, enable_gqa=True) == "dense"
    assert choose(_Q, _K, _V, enable_gqa=True, return_lse=True) == "reference"
    assert choose(_Q, _K, _V, enable_gqa=True, return_importance=True) == "reference"
    assert choose(_Q, _K, _V, _MASK, enable_gqa=True) == "reference"


def test_auto_takes_flex_only_where_it_can_run_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "unavailable", lambda: None)
    long = torch.empty(1, 1, 2048, 1)
    blocks = SparseMask.full(2048, 2048, block_size=(64, 64))
    choose = kernels.choose_backend
    assert choose(long, long, long, blocks) == "flex"
    padding = torch.ones(1, 2048, dtype=torch.bool)
    leaf = long.clone().requires_grad_()
    double = long.double()
    columns = SparseMask.full(2048, 2048, block_size=(64, 8))
    assert choose(long, long, long, blocks, key_padding=padding) == "reference"
    assert choose(long, long, long, blocks, dropout_p=0.1) == "reference"
    assert choose(long, long, long, blocks, return_lse=True) == "reference"
    assert choose(leaf, long, long, blocks) == "reference"
    with torch.no_grad():
        assert choose(leaf, long, long, blocks) == "flex"
    assert choose(double, double, double, blocks) == "reference"
    assert choose(long, long, long, columns) == "reference"
    short = long[:, :, :1024]
    near = SparseMask.full(1024, 2048, block_size=(64, 64))
    assert choose(short, long, long, near) == "reference"
    monkeypatch.setattr(flex, "unavailable", lambda: "no C++ compiler")
    assert choose(long, long, long, blocks) == "reference"
    with pytest.raises(NotImplementedError, match=r"'flex' cannot run this call: no C\+\+"):
        attention(long, long, long, blocks, backend="flex")


def test_available_backends_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "unavailable", lambda: "no C++ compiler")
    monkeypatch.setattr(cpu, "unavailable", lambda: "it was not built")
    monkeypatch.setattr(triton, "unavailable", lambda: "there is no CUDA device")
    missing = {"cpu": "it was not built", "triton": "there is no CUDA device"}
    expected = {"dense": None, **missing, "flex": "no C++ compiler", "reference": None}
    assert kernels.available_backends() == expected


def test_every_backend_has_the_same_interface() -> None:
    for name in ops.BACKENDS:
        module = ops.load(name)
        assert module.unavailable() is None or isinstance(module.unavailable(), str)
        assert callable(module.unsupported)
        assert callable(module.profitable)
        assert callable(module.forward)
        assert hasattr(module, "backward") == module.HAS_BACKWARD
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        ops.load("gpu")


@pytest.mark.parametrize("mask", [None, _MASK])
def test_autocast_casts_as_sdpa_does(mask: SparseMask | None) -> None:
    q, k, v = (t.clone().requires_grad_() for t in (_Q, _K, _V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, mask, enable_gqa=True)
        sdpa = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        double = attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    assert out.dtype == sdpa.dtype == torch.bfloat16
    assert isinstance(double, Tensor)
    assert double.dtype == torch.float64
    # The inputs are rounded to bf16, the sums are not: much closer than bf16 sums would be.
    rounded = [t.detach().bfloat16().double() for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*rounded, enable_gqa=True)
    if mask is not None:
        assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    assert q.grad.isfinite().all()


def test_an_explicit_scale_of_zero_is_not_the_default() -> None:
    out = attention(_Q, _K, _V, _MASK, scale=0.0, enable_gqa=True)
    assert isinstance(out, Tensor)
    mean = _V.mean(2, keepdim=True).repeat_interleave(2, 1).expand(out.shape)
    torch.testing.assert_close(out, mean)


def test_inference_mode_gives_the_same() -> None:
    wanted = attention(_Q, _K, _V, _MASK, enable_gqa=True)
    with torch.inference_mode():
        got = attention(_Q, _K, _V, _MASK, enable_gqa=True)
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    assert torch.equal(got, wanted)
