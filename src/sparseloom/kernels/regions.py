"""Attention over the regions of a static mask: planned once, run many times.

After Dai et al. 2023 (DAC); region design ours. `sparseloom.regions` says which pairs are computed
and how, `regions_reference` what comes out. A plan turns the regions of all heads into a few
``SparseMask``s, one for each way of computing: whole tiles of 16 × 32, what is left of tiles with
holes, low precision, and pooled keys for each size of segments. Each is one call of ``attention``;
their results are joined by log-sum-exp, which is exact. The C++ library computes whole tiles and
pooled keys in one pass instead (``kernels.cpu.runs``), where no gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.kernels import cpu
from sparseloom.kernels.api import AttentionOutput, attention, check_inputs, check_key_padding
from sparseloom.kernels.common import AttentionCall, accumulation_dtype
from sparseloom.kernels.cpu import runs as cpu_runs
from sparseloom.kernels.cpu.runs import KeyRuns, key_runs
from sparseloom.kernels.regions_reference import checked_heads, reference_attention
from sparseloom.kernels.segments import low_precision, segment_means, segment_sizes
from sparseloom.mask import SparseMask
from sparseloom.regions import (
    TILE_KEYS,
    TILE_QUERIES,
    HeadRegions,
    Mode,
    exact_pairs,
    owners,
)

_EXTRA = 8
"""Dims added to queries and pooled keys where segments differ in size: kernels want multiples."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one call of ``attention`` computes.

    mask: over keys, or over segments of `segment` keys.
    segment: 1, or keys per segment.
    low_precision_shift: 0, or that of the regions.
    is_causal: let the kernel leave out later keys; else the mask does.
    in_runs: the runs of the plan, if it has any, hold it too.
    """

    mask: SparseMask
    segment: int = 1
    low_precision_shift: int = 0
    is_causal: bool = False
    in_runs: bool = False


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """The regions of a layer's heads, ready to run for one pair of lengths (`plan_regions`).

    heads: regions by head; a number that divides the query heads, 1 = shared.
    tiles: all tiles that some region owns, blocks of 16 × 32: what is computed exactly or as means.
    parts: the calls.
    runs: where keys are pooled, whole tiles and pooled ones together, for the CPU, which computes
        them in one pass and not part by part.
    """

    heads: tuple[HeadRegions, ...]
    is_causal: bool
    tiles: SparseMask
    parts: tuple[Part, ...]
    runs: KeyRuns | None = None

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.tiles.q_len

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.tiles.kv_len

    def to(self, device: torch.device | str) -> RegionPlan:
        """The plan with its masks on `device`."""
        parts = tuple(replace(part, mask=part.mask.to(device)) for part in self.parts)
        return replace(self, tiles=self.tiles.to(device), parts=parts)


def plan_regions(
    heads: Sequence[HeadRegions], q_len: int, kv_len: int, *, is_causal: bool = False
) -> RegionPlan:
    """Compile regions for `q_len` queries and `kv_len` keys.

    Args:
        heads: regions of each head; one list may serve several (see `RegionPlan`).
        q_len: queries.
        kv_len: keys; causality is aligned to the bottom right.
        is_causal: make every region causal.

    Raises:
        ValueError: no heads, or a length below 1.
    """
    listed = checked_heads(tuple(heads), len(heads), is_causal=is_causal)
    owner = np.stack([owners(regions, q_len, kv_len) for regions in listed])

    def tiles_of(which: Any) -> Bool[np.ndarray, "heads query_tiles key_tiles"]:
        chosen = [np.array([*map(which, regions), False]) for regions in listed]
        return np.stack([mine[owned] for mine, owned in zip(chosen, owner, strict=True)])

    every = [region for regions in listed for region in regions]
    # One argument of the kernel serves all heads, so it can only be used if all regions agree.
    all_causal = bool(every) and all(region.causal for region in every)
    cut = tiles_of(lambda r: r.causal) & _on_the_edge(q_len, kv_len)
    parts: list[Part] = []
    log2s = np.full(owner.shape, -1, np.int16)
    for shift in sorted({region.low_precision_shift for region in every}):
        mine = tiles_of(
            lambda r, shift=shift: r.mode is not Mode.COARSE and r.low_precision_shift == shift
        )
        whole = mine & ~tiles_of(lambda r: r.mode is Mode.STRIDED)
        if not all_causal:
            whole &= ~cut
        if whole.any():
            mask = tile_mask(whole, q_len, kv_len)
            parts.append(Part(mask, 1, shift, all_causal, in_runs=shift == 0))
            if shift == 0:
                log2s[whole] = 0
        rest = mine & ~whole
        if rest.any():
            parts.append(Part(_pair_mask(listed, rest, q_len, kv_len), 1, shift))
    for size in sorted({r.segment for r in every if r.mode is Mode.COARSE}):
        mine = tiles_of(lambda r, size=size: r.mode is Mode.COARSE and r.segment == size)
        if mine.any():
            segments = -(-kv_len // size)
            mask = tile_mask(mine, q_len, segments, block_keys=TILE_KEYS // size)
            parts.append(Part(mask, size, in_runs=True))
            log2s[mine] = size.bit_length() - 1
    tiles = tile_mask(owner >= 0, q_len, kv_len)
    runs = key_runs(log2s) if (log2s > 0).any() else None
    return RegionPlan(tuple(heads), is_causal, tiles, tuple(parts or [Part(tiles)]), runs)


def tile_mask(
    keep: Bool[np.ndarray, "heads query_tiles key_tiles"],
    q_len: int,
    kv_len: int,
    *,
    block_keys: int = TILE_KEYS,
) -> SparseMask:
    """Tiles of the regions' grid as a ``SparseMask`` of one batch entry."""
    return SparseMask.from_block_bool(
        torch.from_numpy(np.ascontiguousarray(keep))[None],
        block_size=(TILE_QUERIES, block_keys),
        q_len=q_len,
        kv_len=kv_len,
    )


def region_attention(
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    plan: RegionPlan,
    *,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len value_dim"] | AttentionOutput:
    """Softmax attention over the regions of a plan, one softmax per row over all of them.

    Args:
        query, key, value, scale, enable_gqa, return_lse: as in ``sparseloom.attention``.
        plan: from `plan_regions`, for these lengths, on this device.
        key_padding: bool (batch, kv_len), True = attend. `valid_keys` makes one from lengths.
        backend: of each part, as in ``sparseloom.attention``; "reference" runs
            ``regions_reference`` instead.

    Returns:
        (batch, heads, q_len, value_dim), or an ``AttentionOutput`` with the log-sum-exp too.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``sparseloom.attention``; also if the plan
            does not fit, or `scale` is 0 where segments are cut by the end or by padding.
    """
    if (query.shape[2], key.shape[2]) != (plan.q_len, plan.kv_len):
        raise ValueError(
            f"plan must be for {query.shape[2]} queries and {key.shape[2]} keys, "
            f"got one for {plan.q_len} and {plan.kv_len}"
        )
    common: dict[str, Any] = {
        "key_padding": key_padding, "scale": scale, "enable_gqa": enable_gqa,
    }  # fmt: skip
    if backend == "reference":
        heads, causal = plan.heads, plan.is_causal
        return reference_attention(
            query, key, value, heads, is_causal=causal, return_lse=return_lse, **common
        )
    if query.shape[1] % len(plan.heads):
        raise ValueError(
            f"plan must be for a number of heads that divides {query.shape[1]}, "
            f"got {len(plan.heads)}"
        )
    runs = plan.runs if backend in ("auto", "cpu") else None
    if runs is not None and not _takes_runs(query, key, value):
        runs = None
    parts = [part for part in plan.parts if runs is None or not part.in_runs]
    lse = return_lse or len(parts) + (runs is not None) > 1
    found = [_run(part, query, key, value, common | {"return_lse": lse, "backend": backend})
             for part in parts]  # fmt: skip
    if runs is not None:
        is_causal = any(part.is_causal for part in plan.parts if part.in_runs)
        found.append(_run_runs(runs, query, key, value, common, is_causal=is_causal, lse=lse))
    if len(found) == 1:
        return found[0]
    joined = _join([part for part in found if isinstance(part, AttentionOutput)])
    return joined if return_lse else joined.out


def valid_keys(
    n_valid: Sequence[int], kv_len: int, *, device: torch.device | str | None = None
) -> Bool[Tensor, "batch kv_len"]:
    """Key padding of sequences with so many keys before their padding.

    Raises:
        ValueError: a number outside [0, kv_len].
    """
    for n in n_valid:
        if not 0 <= n <= kv_len:
            raise ValueError(f"n_valid must be in [0, {kv_len}], got {n}")
    return torch.arange(kv_len, device=device) < torch.tensor(n_valid, device=device)[:, None]


def _takes_runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the C++ library computes runs of these inputs: there is no derivative."""
    call = AttentionCall(query, key, value, None, None, (1, 1), None, False, 1.0)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return (
        not grad
        and cpu.unsupported(call, lse=True, importance=False, grad=False) is None
        and cpu_runs.available()
    )


def _run_runs(
    runs: KeyRuns,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    common: dict[str, Any],
    *,
    is_causal: bool,
    lse: bool,
) -> Tensor | AttentionOutput:
    """All runs of a plan in one pass."""
    query, key, value = check_inputs(query, key, value, enable_gqa=common["enable_gqa"])
    padding, scale = common["key_padding"], common["scale"]
    if padding is not None:
        check_key_padding(padding, key)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    out, sums = cpu_runs.attention_runs_op(
        query, key, value, runs.table, runs.offsets, padding, is_causal, scale, lse
    )
    return AttentionOutput(out, sums) if lse else out


def _run(
    part: Part, query: Tensor, key: Tensor, value: Tensor, common: dict[str, Any]
) -> Tensor | AttentionOutput:
    """One part; its rows without keys give 0 and −∞."""
    padding, shift = common["key_padding"], part.low_precision_shift
    if shift:
        query = low_precision(query, shift)
        key, value = (low_precision(t, shift, padding) for t in (key, value))
    if part.segment == 1:
        return attention(query, key, value, part.mask, is_causal=part.is_causal, **common)
    counts = segment_sizes(key.shape[2], part.segment, padding).to(query.device)
    key, value = (segment_means(t, part.segment, padding) for t in (key, value))
    common = dict(common)
    scale = 1.0 / math.sqrt(query.shape[3]) if common["scale"] is None else common["scale"]
    weight = math.log(part.segment)
    if bool((counts != part.segment).any()):
        query, key, weight = *_with_sizes(query, key, counts, scale), 0.0
        common |= {"key_padding": (counts > 0).expand(len(query), -1), "scale": scale}
    found = attention(query, key, value, part.mask, **common)
    if isinstance(found, AttentionOutput):
        assert found.lse is not None
        return found._replace(lse=found.lse + weight)
    return found


def _with_sizes(query: Tensor, key: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and pooled keys whose scores hold the logarithm of the segments' sizes.

    It stands in two more dims, the second one with what the type of the inputs rounds off the
    first.
    """
    if scale == 0:
        raise ValueError("scale must not be 0 where segments differ in size")
    weight = counts.clamp(min=1).to(accumulation_dtype(key.dtype)).log() / scale
    high = weight.to(key.dtype)
    low = (weight - high.to(weight.dtype)).to(key.dtype)
    pair = torch.stack([high, low], -1)[:, None].expand(*key.shape[:2], -1, -1)
    ones = query.new_ones(*query.shape[:3], 2)
    return (
        F.pad(torch.cat([query, ones], -1), (0, _EXTRA - 2)),
        F.pad(torch.cat([key, pair.expand(*key.shape[:3], 2)], -1), (0, _EXTRA - 2)),
    )


def _join(parts: list[AttentionOutput]) -> AttentionOutput:
    """One softmax from several over disjoint keys."""
    out, sums = parts[0].out, parts[0].lse
    assert sums is not None
    for part in parts[1:]:
        assert part.lse is not None
        # Where neither has a key, both outputs are 0, and 0 for −∞ keeps the weight finite.
        dead = (sums == -torch.inf) & (part.lse == -torch.inf)
        left, right = sums.masked_fill(dead, 0), part.lse.masked_fill(dead, 0)
        weight = torch.sigmoid(right - left).to(out.dtype)
        out = torch.lerp(out, part.out, weight[..., None])
        sums = torch.logaddexp(left, right).masked_fill(dead, -torch.inf)
    return AttentionOutput(out, sums)


def _on_the_edge(q_len: int, kv_len: int) -> Bool[np.ndarray, "query_tiles key_tiles"]:
    """Tiles with some key later than one of their queries."""
    first = np.arange(0, q_len, TILE_QUERIES) + kv_len - q_len
    last_key = np.minimum(np.arange(TILE_KEYS, kv_len + TILE_KEYS, TILE_KEYS), kv_len) - 1
    return last_key > first[:, None]


def _pair_mask(
    heads: tuple[HeadRegions, ...],
    tiles: Bool[np.ndarray, "heads query_tiles key_tiles"],
    q_len: int,
    kv_len: int,
) -> SparseMask:
    """The exact pairs within some tiles, in columns of 16 queries where none is cut."""
    wide = tiles.repeat(TILE_QUERIES, 1).repeat(TILE_KEYS, 2)[:, :q_len, :kv_len]
    keep = wide & np.stack([exact_pairs(regions, q_len, kv_len) for regions in heads])
    padded = np.pad(keep, ((0, 0), (0, -q_len % TILE_QUERIES), (0, 0)), mode="edge")
    columns = padded.reshape(len(keep), -1, TILE_QUERIES, kv_len)
    whole = bool((columns.any(2) == columns.all(2)).all())
    return SparseMask.from_bool(
        torch.from_numpy(keep)[None], block_size=(TILE_QUERIES if whole else 1, 1)
    )
