"""The Triton backend: attention over the kept pairs on NVIDIA GPUs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.triton import interpreted, unavailable

__all__ = ["HAS_BACKWARD", "backward", "forward", "profitable", "unavailable", "unsupported"]

HAS_BACKWARD = True
WIDEST = 256  # dims per head
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(call: AttentionCall, *, lse: bool, importance: bool, grad: bool) -> str | None:  # noqa: ARG001
    """Why the backend refuses this call (None: it does not)."""
    device = call.query.device
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it computes on a CUDA device, got tensors on {device}"
    if call.query.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, got {call.query.dtype}"
    if interpreted() and call.query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 as integers"
    if call.indices is None:
        return "it needs a mask (backend 'dense' does without)"
    if call.dropout_p:
        return f"it has no dropout, got dropout_p {call.dropout_p}"
    if not call.scale > 0:
        return f"it needs a scale above 0, got {call.scale}"
    for name, dim in (("head_dim", call.query.shape[3]), ("value_dim", call.value.shape[3])):
        if dim > WIDEST:
            return f"it needs a {name} of at most {WIDEST}, got {dim}"
    return None


def profitable(call: AttentionCall) -> bool:
    """Whether "auto" should take it: on a GPU, and never where it is interpreted."""
    return call.query.is_cuda and not interpreted()


def forward(call: AttentionCall, *, lse: bool, importance: bool) -> ForwardResult:
    """Attention over the kept pairs."""
    from sparseloom.kernels.triton import forward as kernels

    with torch.cuda.device_of(call.query):
        return kernels.forward(call, lse=lse, importance=importance)


def backward(
    call: AttentionCall,
    out: Float[Tensor, "batch heads q_len value_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    grad_out: Float[Tensor, "batch heads q_len value_dim"],
    grad_lse: Float[Tensor, "batch heads q_len"] | None,
    grad_key_importance: Float[Tensor, "batch heads kv_len"] | None,
    grad_head_importance: Float[Tensor, "batch heads"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from sparseloom.kernels.triton import backward as kernels

    with torch.cuda.device_of(call.query):
        return kernels.backward(
            call, out, lse, grad_out, grad_lse, grad_key_importance, grad_head_importance
        )
