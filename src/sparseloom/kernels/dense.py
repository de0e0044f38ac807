"""The dense backend: PyTorch's SDPA with this library's causality, padding and empty rows.

SDPA aligns ``is_causal`` to the top left; here the last query always sees the last key. Rows
without any allowed key give 0 and no gradient on every device.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.common import AttentionCall, causal_rows


def unavailable() -> str | None:
    """Why the backend cannot run on this machine (None: it can)."""
    return None


def unsupported(call: AttentionCall, *, lse: bool, importance: bool, grad: bool) -> str | None:  # noqa: ARG001
    """Why the backend refuses this call (None: it does not)."""
    if call.indices is not None:
        return "it computes every pair and takes no mask"
    if lse or importance:
        return "it returns neither log-sum-exp nor importance"
    return None


def profitable(call: AttentionCall) -> bool:  # noqa: ARG001
    """Whether "auto" should take it: always, where nothing is masked."""
    return True


def attention(call: AttentionCall) -> Float[Tensor, "batch heads q_len value_dim"]:
    """Dense attention; precision, dropout bits and autocast are SDPA's own.

    A (q_len, kv_len) boolean array is made only under causality with q_len != kv_len, and a
    (batch, 1, q_len, kv_len) one under causality with padding.
    """
    q_len, kv_len = call.q_len, call.kv_len
    causal = call.is_causal and q_len > 1
    square = causal and q_len == kv_len and call.key_padding is None
    allowed: Tensor | None = None
    if causal and not square:
        allowed = causal_rows(0, q_len, kv_len, kv_len - q_len, call.query.device)[None, None]
    if call.key_padding is not None:
        attend = call.key_padding[:, None, None]
        allowed = attend if allowed is None else allowed & attend
    live: Tensor | None = None
    if allowed is not None:
        # Rows without a key attend to all of them, and are zeroed afterwards: no backend of
        # SDPA then meets a softmax over nothing.
        live = allowed.any(-1, keepdim=True)
        allowed = allowed | ~live
    out = F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=allowed,
        dropout_p=call.dropout_p,
        is_causal=square,
        scale=call.scale,
        enable_gqa=call.groups > 1,
    )
    return out if live is None else out.masked_fill(~live, 0)
