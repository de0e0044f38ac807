"""``attention``: check the arguments, choose a backend, run it. Nothing is computed here."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.errors import unknown_name
from sparseloom.kernels import dense
from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.ops import BACKENDS, attention_op, load
from sparseloom.mask import SparseMask

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionOutput(NamedTuple):
    """What ``attention`` returns when more than the output is asked for.

    ``lse``, ``key_importance`` and ``head_importance`` are fp32 (fp64 for fp64 inputs), and None
    where they were not asked for.
    """

    out: Float[Tensor, "batch heads q_len value_dim"]
    lse: Float[Tensor, "batch heads q_len"] | None = None
    key_importance: Float[Tensor, "batch heads kv_len"] | None = None
    head_importance: Float[Tensor, "batch heads"] | None = None


def attention(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    mask: SparseMask | None = None,
    *,
    is_causal: bool = False,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_importance: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len value_dim"] | AttentionOutput:
    """Softmax attention over the pairs that the mask keeps.

    Arguments follow ``torch.nn.functional.scaled_dot_product_attention``, with two differences:
    causality is aligned to the bottom right (the last query sees the last key), and a query that
    may attend to nothing gives 0.

    Under autocast all floating-point inputs except fp64 are cast to the autocast dtype, as SDPA
    does, so the output has that dtype. Half-precision inputs are accumulated in fp32.

    Works under ``torch.compile(fullgraph=True)``, forward and backward, with the same result as
    eager. First derivatives only: for higher ones use autograd on ``kernels.reference.forward``.

    Args:
        query: (batch, heads, q_len, head_dim), fp16, bf16, fp32 or fp64.
        key: (batch, kv_heads, kv_len, head_dim).
        value: (batch, kv_heads, kv_len, value_dim).
        mask: the kept pairs; None keeps all. Its batch and heads are those of the query, or 1
            (shared), and its heads may divide ``heads``: head h uses mask head
            h · mask.heads // heads.
        is_causal: query i sees key j if j <= i + kv_len − q_len.
        key_padding: bool (batch, kv_len), True = attend.
        scale: factor of the scores, by default 1/√head_dim.
        dropout_p: share of probabilities dropped, in [0, 1], whatever the mode of the model.
        enable_gqa: allow ``kv_heads`` to divide ``heads``; head h uses key head
            h · kv_heads // heads.
        return_lse: also return log Σ exp(score) per row, −inf for rows without a key.
        return_importance: also return the column sums of the probabilities (before dropout) per
            query head and Σ|out| per head: what cascade pruning ranks tokens and heads by
            (SpAtten, HPCA 2021, Algorithm 2).
        backend: "auto" takes what ``choose_backend`` names; "dense", "cpu", "triton", "flex" and
            "reference" are taken as given and raise where they cannot run the call.

    Returns:
        (batch, heads, q_len, value_dim) in the dtype of the inputs, or an ``AttentionOutput`` if
        ``return_lse`` or ``return_importance`` is set.

    Raises:
        TypeError: a dtype is wrong, or the inputs differ in dtype.
        ValueError: a shape, device, the mask or another argument does not fit.
        NotImplementedError: the named backend cannot run this call, here or anywhere.
    """
    call = _checked_call(
        query, key, value, mask, is_causal, key_padding, scale, dropout_p, enable_gqa
    )
    chosen = _select(backend, call, lse=return_lse, importance=return_importance)
    if chosen == "dense":
        return dense.attention(call)
    # The backward pass rebuilds the probabilities from the log-sum-exp.
    keep_lse = return_lse or _needs_grad(call)
    out, lse, key_importance, head_importance = attention_op(
        call.query,
        call.key,
        call.value,
        call.indices,
        call.offsets,
        call.key_padding,
        _seed(dropout_p),
        call.block_size[0],
        call.block_size[1],
        is_causal,
        call.scale,
        dropout_p,
        keep_lse,
        return_importance,
        chosen,
    )
    if not (return_lse or return_importance):
        return out
    return AttentionOutput(
        out,
        lse if return_lse else None,
        key_importance if return_importance else None,
        head_importance if return_importance else None,
    )


def choose_backend(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    mask: SparseMask | None = None,
    *,
    is_causal: bool = False,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_importance: bool = False,
) -> str:
    """The backend that ``attention(…, backend="auto")`` takes for these arguments.

    The rule, in order:

    1. no mask, and neither log-sum-exp nor importance asked for: "dense";
    2. the C++ backend is there (``available_backends``) and runs this call (tensors on the CPU,
       not fp64, head_dim and value_dim multiples of 8 up to 256, no dropout without a mask): "cpu";
    3. a mask, and Triton and a GPU are there and run this call (tensors on the GPU, not fp64,
       head_dim and value_dim up to 256, no dropout): "triton";
    4. a mask, and FlexAttention can run here (compiler found) and runs this call (blocks of at
       least 16 x 16, no gradient, no dropout, no extra outputs, at least two queries, not fp64),
       nothing is padded, and q_len · kv_len is at least 2048²: "flex";
    5. otherwise "reference".
    """
    call = _checked_call(
        query, key, value, mask, is_causal, key_padding, scale, dropout_p, enable_gqa
    )
    return _select("auto", call, lse=return_lse, importance=return_importance)


def available_backends() -> dict[str, str | None]:
    """Every backend, and why it cannot run on this machine (None: it can)."""
    return {name: _unavailable(name) for name in ("dense", *BACKENDS)}


def _select(backend: str, call: AttentionCall, *, lse: bool, importance: bool) -> str:
    grad = _needs_grad(call)
    if backend != "auto":
        reason = _refusal(backend, call, lse=lse, importance=importance, grad=grad)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} cannot run this call: {reason}")
        return backend
    for name in ("dense", *BACKENDS):
        refusal = _refusal(name, call, lse=lse, importance=importance, grad=grad)
        if refusal is None and _module(name).profitable(call):
            return name
    raise AssertionError("the reference backend takes every call")


def _refusal(
    backend: str, call: AttentionCall, *, lse: bool, importance: bool, grad: bool
) -> str | None:
    if backend != "dense" and backend not in BACKENDS:
        raise unknown_name("backend", backend, ("auto", "dense", *BACKENDS))
    unsupported = _module(backend).unsupported(call, lse=lse, importance=importance, grad=grad)
    return unsupported or _unavailable(backend)


def _module(backend: str) -> ModuleType:
    return dense if backend == "dense" else load(backend)


@torch.compiler.assume_constant_result
def _unavailable(backend: str) -> str | None:
    return _module(backend).unavailable()


def _needs_grad(call: AttentionCall) -> bool:
    return torch.is_grad_enabled() and (
        call.query.requires_grad or call.key.requires_grad or call.value.requires_grad
    )


def _seed(dropout_p: float) -> Tensor | None:
    """One number from torch's global generator, from which all dropout bits follow."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64) if dropout_p else None


def _checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    is_causal: bool,
    key_padding: Tensor | None,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
) -> AttentionCall:
    query, key, value = check_inputs(query, key, value, enable_gqa=enable_gqa)
    kept = _checked_mask(mask, query, key)
    if key_padding is not None:
        check_key_padding(key_padding, key)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        indices=None if kept is None else kept.indices,
        offsets=None if kept is None else kept.offsets,
        block_size=(1, 1) if kept is None else kept.block_size,
        key_padding=key_padding,
        is_causal=is_causal,
        scale=1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale),
        dropout_p=dropout_p,
    )


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Refuse inputs that do not fit together; cast them under autocast."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, head_dim), "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as query, got {tensor.device}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = {n: t if t.dtype == torch.float64 else t.to(dtype) for n, t in tensors.items()}
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
    for name, tensor in tensors.items():
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have dtype {query.dtype} as query, got {tensor.dtype}")
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key must have shape ({query.shape[0]}, kv_heads, kv_len, {query.shape[3]}) as "
            f"query has, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape {(*key.shape[:3], 'value_dim')} as key has, "
            f"got {tuple(value.shape)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(
            f"key must have {heads} heads as query, got {kv_heads}; "
            "set enable_gqa=True to share key heads"
        )
    if heads % kv_heads:
        raise ValueError(f"key must have a number of heads that divides {heads}, got {kv_heads}")
    return query, key, value


def check_key_padding(key_padding: Tensor, key: Tensor) -> None:
    """Refuse padding that does not fit the keys."""
    if key_padding.dtype != torch.bool:
        raise TypeError(f"key_padding must be bool (True = attend), got {key_padding.dtype}")
    wanted = (key.shape[0], key.shape[2])
    if key_padding.shape != wanted:
        raise ValueError(
            f"key_padding must have shape (batch, kv_len) = {wanted}, "
            f"got {tuple(key_padding.shape)}"
        )
    if key_padding.device != key.device:
        raise ValueError(f"key_padding must be on {key.device} as key, got {key_padding.device}")


def _checked_mask(mask: object, query: Tensor, key: Tensor) -> SparseMask | None:
    if mask is None:
        return None
    if not isinstance(mask, SparseMask):
        raise TypeError(
            f"mask must be a SparseMask or None, got {type(mask).__name__}; "
            "SparseMask.from_bool takes a boolean tensor"
        )
    if (mask.q_len, mask.kv_len) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"mask must be for {query.shape[2]} queries and {key.shape[2]} keys, "
            f"got one for {mask.q_len} and {mask.kv_len}"
        )
    if mask.batch not in (1, query.shape[0]):
        raise ValueError(f"mask must have batch 1 or {query.shape[0]}, got {mask.batch}")
    if query.shape[1] % mask.heads:
        raise ValueError(
            f"mask must have a number of heads that divides {query.shape[1]}, got {mask.heads}"
        )
    if mask.device != query.device:
        raise ValueError(f"mask must be on {query.device} as query, got {mask.device}")
    return mask
