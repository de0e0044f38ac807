"""The operators under torch's own checks, and under torch.compile without graph breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseloom.kernels import attention, decode_attention
from sparseloom.kernels.ops import attention_backward_op, attention_op
from sparseloom.kernels.planes import PlaneCache
from sparseloom.mask import SparseMask


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(make_case: Any, full: bool) -> None:
    case = make_case(dtype=torch.float32)
    q, k, v = (t.requires_grad_() for t in case.inputs)
    rows = (None, None) if full else (case.mask.indices, case.mask.offsets)
    padding, seed = (None, None) if full else (case.key_padding, torch.tensor([5]))
    settings = (*case.mask.block_size, not full, 0.5)
    dropout_p = 0.0 if full else 0.25
    # Extras without gradient, and the derivative as an operator of its own.
    arguments = (q, k, v, *rows, padding, seed, *settings, dropout_p, True, not full, "reference")
    torch.library.opcheck(attention_op, arguments)
    out, lse, columns, magnitudes = (t.detach() for t in attention_op(*arguments))
    grads = [torch.randn_like(out), lse.clamp(min=-1), None, None]
    if not full:
        grads[2:] = [torch.randn_like(columns), torch.randn_like(magnitudes)]
    inputs = [t.detach() for t in (q, k, v)]
    torch.library.opcheck(
        attention_backward_op,
        (*inputs, *rows, padding, seed, out, lse, *grads, *settings, dropout_p, "reference"),
    )


def test_fullgraph_forward_and_backward_equal_eager(make_case: Any) -> None:
    case = make_case()
    leaves = case.leaves()

    def step(q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, padding: Tensor) -> Any:
        extra = attention(
            q * 2,
            k,
            v,
            mask,
            is_causal=True,
            key_padding=padding,
            dropout_p=0.2,
            enable_gqa=True,
            return_lse=True,
            return_importance=True,
        )
        plain = attention(q, k, v, mask, enable_gqa=True)
        lse = extra.lse.masked_fill(extra.lse == -torch.inf, 0)
        return plain.exp(), extra.out, lse, extra.key_importance, extra.head_importance

    def run(function: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(11)
        results = function(*leaves, case.mask, case.key_padding)
        loss = sum(t.square().sum() for t in results)
        return [*results, *torch.autograd.grad(loss, leaves)]

    for got, wanted in zip(run(_compiled(step)), run(step), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_one_compilation_serves_masks_of_every_density(make_case: Any) -> None:
    # Sizes that happen to be equal would become one symbol, hence the large head_dim.
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, mask: SparseMask) -> Any:
        return attention(q, k, v, mask, enable_gqa=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for density, q_len, kv_len in [(0.5, 7, 9), (0.2, 7, 9), (0.9, 10, 12)]:
        case = make_case(density=density, q_len=q_len, kv_len=kv_len, head_dim=16)
        got = compiled(*case.inputs, case.mask)
        torch.testing.assert_close(got, attention(*case.inputs, case.mask, enable_gqa=True))
    assert len(graphs) == 1


def test_fullgraph_dense_and_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    padding = torch.tensor([[True] * 5, [False] * 3 + [True] * 2])
    full = SparseMask.full(3, 5)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        options: dict[str, Any] = {"is_causal": True, "key_padding": padding, "enable_gqa": True}
        return attention(q, k, v, **options), attention(q, k, v, full, **options)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = _compiled(step)(q, k, v), step(q, k, v)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got[0], got[1], rtol=2**-6, atol=2**-7)


def test_fullgraph_decode() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    keep = torch.tensor([[[0, 2, 5, -1]]])
    cache = PlaneCache.from_tensors(k, v, msb_bits=4)

    def step(q: Tensor, keep: Tensor) -> tuple[Any, Any]:
        plain = decode_attention(q, (k, v), keep=keep, value_keep=0.5, enable_gqa=True)
        planes = decode_attention(
            q, cache, keep=keep, progressive=0.5, enable_gqa=True, return_stats=True
        )
        return plain, planes

    (plain, planes), wanted = _compiled(step)(q, keep), step(q, keep)
    torch.testing.assert_close(plain, wanted[0])
    torch.testing.assert_close(planes.out, wanted[1].out)
    assert torch.equal(planes.stats.refetched, wanted[1].stats.refetched)


def test_gradient_without_log_sum_exp_is_refused(make_case: Any) -> None:
    case = make_case()
    q, k, v = case.leaves()
    rows = (case.mask.indices, case.mask.offsets)
    out, *_ = attention_op(
        q, k, v, *rows, None, None, 2, 1, False, 0.5, 0.0, False, False, "reference"
    )
    with pytest.raises(RuntimeError, match="lse=True where gradients are needed"):
        out.sum().backward()
