"""Regions in 8-bit integers with Softermax: what the accelerator computes, on tensors.

After Dai et al. 2023 (DAC); region design ours. The numbers are those of
``sparseloom.region_model.integer_attention``, head by head in numpy: exact, and slow. Their
gradient is that of the floating-point reference, so a model can be tuned through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.kernels.api import check_inputs
from sparseloom.kernels.regions import valid_keys
from sparseloom.kernels.regions_reference import checked_heads, reference_attention
from sparseloom.quantize import quantize
from sparseloom.region_model import integer_attention
from sparseloom.regions import HeadRegions
from sparseloom.softermax import SoftermaxFormat


def integer_region_attention(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    heads: tuple[HeadRegions, ...],
    *,
    n_valid: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    form: SoftermaxFormat | None = None,
) -> Float[Tensor, "batch heads q_len value_dim"]:
    """Attention over regions from 8-bit codes, one scale per head, by the integer model.

    Args:
        query, key, value, is_causal, scale, enable_gqa: as in ``sparseloom.attention``; values of
            padding are not looked at.
        heads: regions of each head; a number that divides the query heads.
        n_valid: keys before the padding of each sequence, all by default.
        form: widths of the softmax.

    Raises:
        TypeError, ValueError: as ``sparseloom.attention``, and as ``region_model`` where a number
            does not fit its format.
    """
    query, key, value = check_inputs(query, key, value, enable_gqa=enable_gqa)
    listed = checked_heads(heads, query.shape[1], is_causal=is_causal)
    form = SoftermaxFormat() if form is None else form
    kv_len, groups = key.shape[2], query.shape[1] // key.shape[1]
    lengths = [kv_len] * len(query) if n_valid is None else list(n_valid)
    if len(lengths) != len(query):
        raise ValueError(f"n_valid must have {len(query)} entries, got {len(lengths)}")
    padding = valid_keys(lengths, kv_len, device=query.device)
    there = padding[:, None, :, None]
    codes = [
        quantize(x.detach(), 8, granularity="matrix")
        for x in (query, key.masked_fill(~there, 0), value.masked_fill(~there, 0))
    ]
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    q, k, v = (x.codes.cpu().numpy().astype(np.int64) for x in codes)
    steps = [x.scale.double().cpu().numpy()[:, :, 0, 0] for x in codes]
    sums = np.zeros((*q.shape[:3], v.shape[3]), np.float64)
    for b, n in enumerate(lengths):
        for h, regions in enumerate(listed):
            g = h // groups
            factor = float(steps[0][b, h] * steps[1][b, g]) * scale
            found = integer_attention(
                q[b, h], k[b, g], v[b, g], regions, factor, n_valid=n, form=form
            )
            sums[b, h] = found * (steps[2][b, g] / 2**form.output_fraction)
    out = torch.from_numpy(sums).to(query.device, query.dtype)
    if not any(x.requires_grad for x in (query, key, value)):
        return out
    exact = reference_attention(
        query, key, value, listed, key_padding=padding, scale=scale, enable_gqa=enable_gqa
    )
    assert isinstance(exact, Tensor)
    return out + (exact - exact.detach())
