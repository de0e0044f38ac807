"""What the predictor is trained on: the raw scores (MSE) or the attention distribution (KL)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def score_mse(
    scores: Float[Tensor, "batch heads q_len kv_len"],
    predicted: Float[Tensor, "batch heads q_len kv_len"],
    allowed: Bool[Tensor, "#batch 1 #q_len kv_len"],
) -> Float[Tensor, ""]:
    """Mean squared error of predicted scores over the allowed pairs.

    Liu et al. (IEEE TC 2022), equation 6, as a mean over entries instead of a sum over rows,
    columns and heads, so that the loss weight does not depend on length.  Both arguments are in
    units of the scaled score q·k·scale.  Gradients flow into whichever argument carries them.
    """
    squared = (scores - predicted).square().masked_fill(~allowed, 0.0)
    heads = scores.shape[1] * scores.shape[0] // allowed.shape[0]
    rows = scores.shape[2] // allowed.shape[2]
    return squared.sum() / (allowed.sum() * heads * rows).clamp(min=1)


def attention_kl(
    scores: Float[Tensor, "batch heads q_len kv_len"],
    predicted: Float[Tensor, "batch heads q_len kv_len"],
    allowed: Bool[Tensor, "#batch 1 #q_len kv_len"],
) -> Float[Tensor, ""]:
    """Mean over rows of KL(softmax(scores) ‖ softmax(predicted)) in nats, on the allowed pairs.

    The two log-softmaxes are subtracted where the pair is allowed and weighted by the true
    probability; forbidden pairs take no part, so no 0·log 0 arises.  A row that may attend to
    nothing contributes zero.
    """
    lowest = torch.finfo(scores.dtype).min
    log_p = torch.log_softmax(scores.masked_fill(~allowed, lowest), dim=-1)
    log_q = torch.log_softmax(predicted.masked_fill(~allowed, lowest), dim=-1)
    gap = (log_p - log_q).masked_fill(~allowed, 0.0)
    rows = (log_p.exp() * gap).sum(-1)  # (batch, heads, q_len)
    alive = allowed.any(-1)  # (batch, 1, q_len)
    return (rows * alive).sum() / (torch.ones_like(rows) * alive).sum().clamp(min=1)


LOSSES = {"kl": attention_kl, "mse": score_mse}
"""The predictor losses by the name that `adapt(loss=…)` takes."""
