"""Thresholds of predicted scores, taken from validation text (Liu et al., IEEE TC 2022, §3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.dynamic import DynamicSparse
from sparseloom.methods.selection import Scores, budgets

CALIBRATION_ROWS = 256
"""Query rows per attention call that thresholds are taken from, evenly spaced."""


@torch.no_grad()
def calibrate_thresholds(method: DynamicSparse, calls: Iterable[AttentionInputs]) -> DynamicSparse:
    """`method` with selection by thresholds that drop its `sparsity` of the pairs in `calls`.

    A method of `selection="balanced"` keeps it; others get `"threshold"`.

    The threshold of a layer and head is the (1 - sparsity) share of its largest predicted scores
    over the allowed pairs of up to 256 evenly spaced query rows per call.

    Args:
        calls: attention calls of validation text without a cache, of every layer.

    Raises:
        ValueError: a layer is not among the calls.
    """
    found: dict[int, list[Tensor]] = {}
    for inputs in calls:
        scores = method.predicted_scores(inputs)
        found.setdefault(inputs.layer, []).append(_allowed_scores(scores, inputs))
    predictor = method.predictor
    layers = 0 if predictor is None else len(predictor.layers)
    missing = [layer for layer in range(layers) if layer not in found]
    if missing or not found:
        raise ValueError(f"calls must hold every layer, got none of {missing or 'them'}")
    levels: list[tuple[float, ...]] = []
    for layer in range(layers):
        seen = torch.cat(found[layer], -1)  # (heads, n)
        keep = int(budgets(torch.tensor(seen.shape[-1]), method.sparsity, 1))
        kth = seen.kthvalue(seen.shape[-1] - keep + 1, dim=-1).values
        levels.append(tuple(kth.tolist()))
    selection = "balanced" if method.selection == "balanced" else "threshold"
    return dataclasses.replace(
        method, selection=selection, thresholds=tuple(levels), thresholds_at=method.sparsity
    )


def _allowed_scores(scores: Scores, inputs: AttentionInputs) -> Float[Tensor, "heads n"]:
    """Scores of the allowed pairs of some rows."""
    shift = scores.kv_len - scores.q_len
    step = -(-scores.q_len // CALIBRATION_ROWS)
    some: list[Tensor] = []
    for row in range(step - 1, scores.q_len, step):
        keys = row + 1 + shift if inputs.is_causal else scores.kv_len
        chunk = scores.rows(row, row + 1, keys)[:, :, 0]  # (B, H, keys)
        if inputs.key_padding is None:
            some.append(chunk.transpose(0, 1).flatten(1))
        else:
            some.append(chunk.transpose(0, 1)[:, inputs.key_padding[:, :keys]])
    return torch.cat(some, -1)
