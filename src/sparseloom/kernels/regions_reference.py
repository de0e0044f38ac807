"""The reference executor of regions: plain PyTorch that defines what the fast path must return.

After Dai et al. 2023 (DAC); region design ours. With M_i the keys that row i meets one by one and
C_i the segments J that it meets as means k̄_J and v̄_J over their s_J keys,

    o_i = [ Σ_{j∈M_i} e^{s_ij} v_j + Σ_{J∈C_i} s_J e^{s̄_iJ} v̄_J ] / [ Σ_{j∈M_i} e^{s_ij} + Σ_{J∈C_i} s_J e^{s̄_iJ} ],

one softmax per row over the union of all its regions. s_J counts the keys of a segment that are
there and not padding, and the means run over these. By Jensen a mean never claims more mass than
its keys have; by Hoeffding it claims at most a factor e^{(b − a)² / 8} less, where a and b bound
the keys' scores around that of the mean. Rows that meet no key give 0 and log-sum-exp −∞.
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.kernels.api import AttentionOutput, check_inputs, check_key_padding
from sparseloom.kernels.common import accumulation_dtype
from sparseloom.kernels.segments import low_precision, segment_means, segment_sizes
from sparseloom.regions import (
    TILE_KEYS,
    TILE_QUERIES,
    HeadRegions,
    Mode,
    coarse_segments,
    exact_pairs,
    owners,
)


class RegionMasks(NamedTuple):
    """Boolean arrays of what rows meet, padding aside.

    exact: (heads, q_len, kv_len) pairs with a score of their own.
    low: of these, the pairs of LOW_PRECISION regions, by their shift.
    coarse: (heads, q_len, segments) for each size of segments in use.
    """

    exact: Bool[Tensor, "heads q_len kv_len"]
    low: dict[int, Bool[Tensor, "heads q_len kv_len"]]
    coarse: dict[int, Tensor]


@lru_cache(maxsize=4)
def region_masks(heads: tuple[HeadRegions, ...], q_len: int, kv_len: int) -> RegionMasks:
    """The masks of several heads; errors as in `sparseloom.regions.owners`."""
    exact = np.stack([exact_pairs(regions, q_len, kv_len) for regions in heads])
    low: dict[int, Tensor] = {}
    shifts = {r.low_precision_shift for regions in heads for r in regions} - {0}
    for shift in sorted(shifts):
        tiles = np.stack([_owned(regions, shift, q_len, kv_len) for regions in heads])
        pairs = tiles.repeat(TILE_QUERIES, 1).repeat(TILE_KEYS, 2)[:, :q_len, :kv_len]
        low[shift] = torch.from_numpy(exact & pairs)
    segments = [coarse_segments(regions, q_len, kv_len) for regions in heads]
    coarse: dict[int, Tensor] = {}
    for size in sorted({size for found in segments for size in found}):
        nothing = np.zeros((-(-q_len // TILE_QUERIES), -(-kv_len // size)), np.bool_)
        tiles = np.stack([found.get(size, nothing) for found in segments])
        coarse[size] = torch.from_numpy(tiles.repeat(TILE_QUERIES, 1)[:, :q_len])
    return RegionMasks(torch.from_numpy(exact), low, coarse)


def reference_attention(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    heads: tuple[HeadRegions, ...],
    *,
    is_causal: bool = False,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Float[Tensor, "batch heads q_len value_dim"] | AttentionOutput:
    """Attention over regions by dense, masked scores; every step is ordinary autograd.

    Half-precision inputs are computed in fp32 and rounded once. Arguments, results and errors as in
    `sparseloom.kernels.regions.region_attention`.
    """
    query, key, value = check_inputs(query, key, value, enable_gqa=enable_gqa)
    if key_padding is not None:
        check_key_padding(key_padding, key)
    heads = checked_heads(heads, query.shape[1], is_causal=is_causal)
    kv_len, dtype = key.shape[2], accumulation_dtype(query.dtype)
    factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    q = query.to(dtype)
    k, v = (t.to(dtype).repeat_interleave(groups, 1) for t in (key, value))
    masks = region_masks(heads, query.shape[2], kv_len)

    scores = (q @ k.mT) * factor
    for shift, pairs in masks.low.items():
        few_bits = low_precision(q, shift) @ low_precision(k, shift, key_padding).mT * factor
        scores = torch.where(pairs.to(q.device), few_bits, scores)
    allowed = masks.exact.to(q.device)[None]
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None]
    columns, met = [scores], [allowed.expand_as(scores)]
    for size, segments in masks.coarse.items():
        counts = segment_sizes(kv_len, size, key_padding).to(q.device)[:, None, None]
        bias = counts.clamp(min=1).to(dtype).log()
        columns.append((q @ segment_means(k, size, key_padding).mT) * factor + bias)
        met.append((segments.to(q.device) & (counts > 0)).expand_as(columns[-1]))
    whole = torch.cat(met, -1)
    live = whole.any(-1, keepdim=True)
    # Rows that meet nothing keep their raw scores, so that softmax stays finite.
    whole_scores = torch.cat(columns, -1).masked_fill(~(whole | ~live), -torch.inf)
    sizes = [part.shape[-1] for part in columns]
    probs, *coarse = whole_scores.softmax(-1).split(sizes, -1)
    out = torch.zeros((), dtype=dtype, device=q.device)
    for shift, pairs in masks.low.items():
        share = probs * pairs.to(q.device)
        out = out + share @ low_precision(v, shift, key_padding)
        probs = probs - share
    out = out + probs @ v
    for size, share in zip(masks.coarse, coarse, strict=True):
        out = out + share @ segment_means(v, size, key_padding)
    out = out.masked_fill(~live, 0).to(query.dtype)
    if not return_lse:
        return out
    return AttentionOutput(out, whole_scores.logsumexp(-1).masked_fill(~live[..., 0], -torch.inf))


def checked_heads(
    heads: tuple[HeadRegions, ...], query_heads: int, *, is_causal: bool
) -> tuple[HeadRegions, ...]:
    """Regions for every query head; under `is_causal` all of them causal.

    Raises:
        ValueError: the number of region lists does not divide `query_heads`.
    """
    if not heads or query_heads % len(heads):
        raise ValueError(
            f"heads must hold a number of region lists that divides {query_heads}, got {len(heads)}"
        )
    if is_causal:
        heads = tuple(tuple(replace(r, causal=True) for r in regions) for regions in heads)
    repeats = query_heads // len(heads)
    return tuple(regions for regions in heads for _ in range(repeats))


def _owned(
    regions: HeadRegions, shift: int, q_len: int, kv_len: int
) -> Bool[np.ndarray, "query_tiles key_tiles"]:
    """Tiles of LOW_PRECISION regions with this shift."""
    mine = [r.mode is Mode.LOW_PRECISION and r.low_precision_shift == shift for r in regions]
    return np.array([*mine, False])[owners(regions, q_len, kv_len)]
