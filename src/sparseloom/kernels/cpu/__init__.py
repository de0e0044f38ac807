"""The C++ backend: attention over the kept pairs on the CPU, by the widest vectors there are."""

from __future__ import annotations

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.kernels.cpu import dense, native
from sparseloom.kernels.cpu import forward as sparse
from sparseloom.kernels.cpu.backward import backward
from sparseloom.kernels.cpu.tensors import TYPES

__all__ = ["HAS_BACKWARD", "backward", "forward", "profitable", "unavailable", "unsupported"]

HAS_BACKWARD = True
WIDEST = 256  # dims per head
STEP = 8  # dims come in multiples of it


def unavailable() -> str | None:
    """Why the backend cannot run on this machine (None: it can)."""
    return native.missing_reason()


def unsupported(call: AttentionCall, *, lse: bool, importance: bool, grad: bool) -> str | None:  # noqa: ARG001
    """Why the backend refuses this call (None: it does not)."""
    if call.query.device.type != "cpu":
        return f"it computes on the CPU, got tensors on {call.query.device}"
    if call.query.dtype not in TYPES:
        return f"it computes in float32, bfloat16 or float16, got {call.query.dtype}"
    for name, dim in (("head_dim", call.query.shape[3]), ("value_dim", call.value.shape[3])):
        if dim % STEP or dim > WIDEST:
            return f"it needs a {name} that is a multiple of {STEP} up to {WIDEST}, got {dim}"
    if call.indices is None and call.dropout_p:
        return f"it has no dropout without a mask, got dropout_p {call.dropout_p}"
    return None


def profitable(call: AttentionCall) -> bool:  # noqa: ARG001
    """Whether "auto" should take it: yes. Its time follows the kept pairs."""
    return True


def forward(call: AttentionCall, *, lse: bool, importance: bool) -> ForwardResult:
    """Attention over the kept pairs, or over all pairs without a mask."""
    if call.indices is None or dense.suits(call, importance=importance):
        return dense.forward(call, lse, importance)
    return sparse.forward(call, lse=lse, importance=importance)
