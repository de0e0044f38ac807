"""What one method does in the attention of a model, as a callable to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sparseloom.kernels import attention
from sparseloom.methods import Attender, AttentionInputs, Method, Pruner, Selector


def attention_contender(method: Method, calls: Sequence[AttentionInputs]) -> Callable[[], None]:
    """A callable that runs prediction, selection and attention of every recorded call."""

    def run() -> None:
        with torch.no_grad():
            for inputs in calls:
                attend(method, inputs)

    return run


def attend(method: Method, inputs: AttentionInputs, backend: str = "auto") -> torch.Tensor:
    """One attention call under `method`, outside any model; (batch, heads, q_len, head_dim)."""
    if isinstance(method, Attender) and method.replaces(inputs):
        return method.attend(inputs)
    mask = None
    if isinstance(method, Selector) and method.worthwhile(
        inputs.query.shape[2], inputs.key.shape[2]
    ):
        mask = method.select(inputs)
    if inputs.value is None:
        raise ValueError("inputs.value is missing: the call was recorded without values")
    out = attention(
        inputs.query,
        inputs.key,
        inputs.value,
        mask,
        is_causal=inputs.is_causal,
        key_padding=inputs.key_padding,
        scale=inputs.scale,
        enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
        return_importance=isinstance(method, Pruner),
        backend=backend,
    )
    return out if isinstance(out, torch.Tensor) else out.out
