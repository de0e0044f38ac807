"""What ran in each layer: pairs, multiply-accumulates, bytes, and how good the choice was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from sparseloom.integrations.pruned_layer import PrunedLayer
from sparseloom.kernels import DecodeStats
from sparseloom.mask import SparseMask, allowed_pairs
from sparseloom.methods.base import AttentionInputs

_WAITING = 256  # steps whose counts are summed up together


class LayerStats(TypedDict):
    """One row of `Sparsified.stats()`; sums over the calls of one layer unless said otherwise.

    Attributes:
        layer: its number.
        method: short form of the method.
        ran: "sparse", "dense", "replaced" (by a method that computes attention in another way) or
            "pruned" (on what is left of the sequence): what the calls did ("sparse" if any did).
        backend: the kernel that ran last.
        calls, dense_calls: attention calls, and those of them that the method ran dense.
        density: kept over allowed pairs (`SparseMask.density`).  Where attention is replaced no
            mask leaves a pair out: density is 1, and the saving shows in `attention_macs`.  Of
            static regions the pairs in their tiles count, also those computed as means.
        kept_pairs, allowed_pairs: (query, key) pairs over batch and query heads.
        attention_macs, dense_macs: multiply-accumulates of Q·Kᵀ and P·V over the kept, and over
            the allowed pairs; of a method that replaces attention, its own count (`macs`), which
            includes padding.
        prediction_macs: multiply-accumulates spent on choosing.
        bytes: least memory traffic of the calls: queries and outputs once, of each key/value head
            as many keys and values as can have been kept, and the mask's index lists.
        prediction_overlap, retained_mass, oracle_mass: with `diagnose=True`, means over sparse
            calls of: pairs shared with the exact top-k of the same size, probability kept, and
            probability that exact top-k keeps; means over heads, too.
        …_by_head: the same three, head by head.
        tokens, tokens_alive, tokens_after: of a method that prunes, tokens that are not padding,
            those of them in this layer's attention, and those that went on from it (its output
            projection and feed-forward), over all sequences.  Density and `dense_macs` are
            relative to the whole sequences.
        heads, heads_alive, heads_after: the same for heads, one count per sequence.
        linear_macs, dense_linear_macs: multiply-accumulates of projections and feed-forward.
        steps: steps of generation that read a part of their cache; what follows sums over them.
        key_high_bytes, key_low_bytes, value_bytes: what they read of keys and values, at stored
            widths: a key/value head's key once for all its queries; its value at most once.  Keys
            that are not split count as high.
        index_bytes: summaries of the cache that were read in order to choose.
        dense_cache_bytes: all keys and values that are not padding, in the model's type.
        rows, low_rows: (head, query) pairs that read anything, and those that fetched low bits.
    """

    layer: int
    method: str
    ran: str
    backend: str
    calls: int
    dense_calls: int
    density: float
    kept_pairs: int
    allowed_pairs: int
    attention_macs: int
    prediction_macs: int
    dense_macs: int
    bytes: int
    prediction_overlap: NotRequired[float]
    retained_mass: NotRequired[float]
    oracle_mass: NotRequired[float]
    prediction_overlap_by_head: NotRequired[list[float]]
    retained_mass_by_head: NotRequired[list[float]]
    oracle_mass_by_head: NotRequired[list[float]]
    tokens: NotRequired[int]
    tokens_alive: NotRequired[int]
    tokens_after: NotRequired[int]
    heads: NotRequired[int]
    heads_alive: NotRequired[int]
    heads_after: NotRequired[int]
    linear_macs: NotRequired[int]
    dense_linear_macs: NotRequired[int]
    steps: NotRequired[int]
    key_high_bytes: NotRequired[float]
    key_low_bytes: NotRequired[float]
    value_bytes: NotRequired[float]
    index_bytes: NotRequired[int]
    dense_cache_bytes: NotRequired[int]
    rows: NotRequired[int]
    low_rows: NotRequired[int]


def left_of(layers: Sequence[LayerStats]) -> dict[str, float]:
    """Shares that a pruning method left of a run, over all its layers and sequences.

    `tokens_alive` and `heads_alive` of the tokens and heads in attention, and `macs_left` of the
    multiply-accumulates of attention, projections and feed-forward.

    Raises:
        ValueError: the method did not prune an encoder.
    """
    if not layers or any("linear_macs" not in row for row in layers):
        raise ValueError("layers must be the statistics of an encoder that was pruned")
    sums = {
        key: sum(int(row.get(key, 0)) for row in layers)
        for key in (
            *("tokens_alive", "tokens", "heads_alive", "heads"),
            *("linear_macs", "attention_macs", "dense_linear_macs", "dense_macs"),
        )
    }
    whole = sums["dense_linear_macs"] + sums["dense_macs"]
    return {
        "tokens_alive": sums["tokens_alive"] / sums["tokens"],
        "heads_alive": sums["heads_alive"] / sums["heads"],
        "macs_left": (sums["linear_macs"] + sums["attention_macs"]) / whole,
    }


class StepShape(NamedTuple):
    """What the steps of a layer have in common, as long as batch and cache keep their form."""

    heads: tuple[int, int, int]  # batch, key/value heads, query heads of each
    head_dim: int
    value_dim: int
    element_size: int
    key_bits: tuple[int, int]
    value_bits: int
    progressive: bool

    @property
    def dense_bytes(self) -> int:
        """Of a token's keys and values in the model's type."""
        return self.heads[1] * (self.head_dim + self.value_dim) * self.element_size


@dataclass
class CacheReads:
    """What steps of generation read of the cache of one layer; see `LayerStats`."""

    steps: int = 0
    key_high_bytes: float = 0.0
    key_low_bytes: float = 0.0
    value_bytes: float = 0.0
    index_bytes: int = 0
    dense_cache_bytes: int = 0
    rows: int = 0
    low_rows: int = 0


@dataclass
class LayerCounts:
    """Sums over the calls of one layer."""

    calls: int = 0
    dense_calls: int = 0
    replaced: bool = False
    kept: int = 0
    allowed: int = 0
    attention_macs: int = 0
    dense_macs: int = 0
    prediction_macs: int = 0
    bytes: int = 0
    backend: str = ""
    quality: dict[str, list[Sequence[float]]] = field(default_factory=dict)
    pruned: Counter[str] = field(default_factory=Counter)
    read: CacheReads | None = None
    _steps: list[tuple[StepShape, DecodeStats, Tensor | None]] = field(default_factory=list)

    def row(self, layer: int, method: str) -> LayerStats:
        """The counts as a row of statistics."""
        self._add_steps()
        row = LayerStats(
            layer=layer,
            method=method,
            ran=self._ran(),
            backend=self.backend,
            calls=self.calls,
            dense_calls=self.dense_calls,
            density=self.kept / self.allowed if self.allowed else 0.0,
            kept_pairs=self.kept,
            allowed_pairs=self.allowed,
            attention_macs=self.attention_macs,
            prediction_macs=self.prediction_macs,
            dense_macs=self.dense_macs,
            bytes=self.bytes,
        )
        for name, calls in self.quality.items():
            heads = [sum(values) / len(values) for values in zip(*calls, strict=True)]
            means: Any = {name: sum(heads) / len(heads), f"{name}_by_head": heads}
            row.update(means)
        pruned: Any = dict(self.pruned)
        row.update(pruned)
        if self.read is not None:
            reads: Any = asdict(self.read)
            row.update(reads)
        return row

    def _ran(self) -> str:
        if self.replaced:
            return "replaced"
        if self.pruned:
            return "pruned"
        return "sparse" if self.calls > self.dense_calls else "dense"

    def add(
        self,
        inputs: AttentionInputs,
        mask: SparseMask | None,
        *,
        backend: str,
        prediction_macs: int = 0,
        replaced_macs: int | None = None,
        quality: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Count one call; `mask` is None where it ran dense, or where attention was replaced."""
        batch, heads, q_len, head_dim = inputs.query.shape
        kv_heads, kv_len = inputs.key.shape[1:3]
        value_dim = head_dim if inputs.value is None else inputs.value.shape[-1]
        width = head_dim + value_dim
        who: Any = {"is_causal": inputs.is_causal, "key_padding": inputs.key_padding}
        allowed = allowed_pairs(q_len, kv_len, **who)[:, None].expand(batch, heads)  # (B, H)
        kept = allowed
        if mask is not None:
            kept = kept_pairs(mask, **who)
            kept = kept.expand(batch, -1).repeat_interleave(heads // kept.shape[1], dim=1)
        self.backend = backend
        self.prediction_macs += prediction_macs
        for name, measured in (quality or {}).items():
            self.quality.setdefault(name, []).append(measured)
        self.calls += 1
        self.replaced = replaced_macs is not None
        self.dense_calls += mask is None and not self.replaced
        self.kept += (all_kept := int(kept.sum()))
        self.allowed += (all_allowed := int(allowed.sum()))
        self.attention_macs += all_kept * width if replaced_macs is None else replaced_macs
        self.dense_macs += all_allowed * width
        # A key that no query keeps is never read; each pair can bring in one at most.
        keys = int(kept.unflatten(1, (kv_heads, -1)).sum(-1).clamp(max=kv_len).sum())
        rows = batch * heads * q_len
        self.bytes += inputs.query.element_size() * (rows + keys) * width
        if mask is not None:
            self.bytes += sum(t.numel() * t.element_size() for t in (mask.indices, mask.offsets))

    def add_pruned(self, call: PrunedLayer, *, backend: str) -> None:
        """Count one call of a layer of which tokens and heads are gone."""
        kept, allowed = call.pairs
        linear, dense_linear = call.linear_macs()
        self.backend = backend
        self.calls += 1
        self.kept += kept
        self.allowed += allowed
        self.attention_macs += 2 * kept * call.head_dim
        self.dense_macs += 2 * allowed * call.head_dim
        rows = sum(n * h for n, h in zip(call.tokens, call.heads_alive, strict=True))
        self.bytes += 4 * rows * call.head_dim * call.element_size  # Q, K, V and output once
        sequences = len(call.lengths)
        self.pruned.update(
            tokens=sum(call.lengths),
            tokens_alive=sum(call.tokens),
            tokens_after=sum(call.tokens_after),
            heads=sequences * call.heads,
            heads_alive=sum(call.heads_alive),
            heads_after=sum(call.heads_after),
            linear_macs=linear,
            dense_linear_macs=dense_linear,
        )

    def add_step(
        self,
        inputs: AttentionInputs,
        stats: DecodeStats,
        *,
        key_bits: tuple[int, int],
        value_bits: int,
        progressive: bool,
        lists: Tensor | None,
        backend: str,
        index_bytes: int = 0,
        prediction_macs: int = 0,
    ) -> None:
        """Count one step of generation.

        Args:
            inputs: the call; one query per sequence.
            stats: what its rows read.
            key_bits: stored widths of the keys' high and low planes.
            value_bits: stored width of the values.
            progressive: whether low planes were read on demand only.
            lists: the positions that were read, if not all.
            backend: what computed it.
            index_bytes: summaries that were read in order to choose.
            prediction_macs: spent on choosing.
        """
        batch, heads, _, head_dim = inputs.query.shape
        kv_heads, kv_len = inputs.key.shape[1:3]
        assert inputs.value is not None
        valid = inputs.key_padding
        tokens = batch * kv_len if valid is None else int(valid.sum())
        shape = StepShape(
            (batch, kv_heads, heads // kv_heads), head_dim, inputs.value.shape[-1],
            inputs.query.element_size(), key_bits, value_bits, progressive,
        )  # fmt: skip
        if self._steps and (len(self._steps) >= _WAITING or self._steps[0][0] != shape):
            self._add_steps()
        self._steps.append((shape, stats, _union(lists, shape.heads, kv_len)))
        self.read = self.read or CacheReads()
        self.read.steps += 1
        self.read.index_bytes += index_bytes
        self.read.dense_cache_bytes += tokens * shape.dense_bytes
        self.backend = backend
        self.calls += 1
        self.allowed += tokens * heads
        self.dense_macs += tokens * heads * (head_dim + shape.value_dim)
        self.prediction_macs += prediction_macs
        self.bytes += shape.element_size * batch * heads * (head_dim + shape.value_dim)
        self.bytes += index_bytes
        if lists is not None:
            self.bytes += lists.numel() * lists.element_size()

    def _add_steps(self) -> None:
        """Sum up what the steps read that wait to be: all at once, because each is so little."""
        if not self._steps:
            return
        shape, reads = self._steps[0][0], self.read
        assert reads is not None
        keys, values, low = (
            torch.stack(each)[..., 0].unflatten(2, shape.heads[1:])  # (steps, B, KV, G)
            for each in zip(*(stats for _, stats, _ in self._steps), strict=True)
        )
        high = keys.amax(-1)  # queries that share a key/value head read the same keys, or none
        unions = [union for _, _, union in self._steps]
        if any(union is not None for union in unions):  # or each its own
            pairs = zip(high, unions, strict=True)
            high = torch.stack([same if union is None else union for same, union in pairs])
        self._steps.clear()
        fetched = high * low.any(-1) if shape.progressive else high
        high_bytes = int(high.sum()) * shape.head_dim * shape.key_bits[0] / 8
        low_bytes = int(fetched.sum()) * shape.head_dim * shape.key_bits[1] / 8
        read = int(values.sum(-1).minimum(high).sum())
        value_bytes = read * shape.value_dim * shape.value_bits / 8
        reads.key_high_bytes += high_bytes
        reads.key_low_bytes += low_bytes
        reads.value_bytes += value_bytes
        rows = int((keys > 0).sum())
        reads.rows += rows
        reads.low_rows += int(low.sum()) if shape.progressive else rows * (low_bytes > 0)
        self.kept += (kept := int(keys.sum()))
        again = int((keys * low).sum()) if shape.progressive else 0
        self.attention_macs += (kept + again) * shape.head_dim
        self.attention_macs += int(values.sum()) * shape.value_dim
        self.bytes += int(high_bytes + low_bytes + value_bytes)


def _union(
    lists: Int64[Tensor, "batch list_heads kept"] | None, heads: tuple[int, int, int], kv_len: int
) -> Int64[Tensor, "batch kv_heads"] | None:
    """Keys that each key/value head reads for any of its queries; None where they have one list."""
    batch, kv_heads, group = heads
    if lists is None or group == 1 or lists.shape[1] <= kv_heads:
        return None
    read = lists.new_zeros((batch, kv_heads, kv_len + 1), dtype=torch.bool)
    read.scatter_(2, lists.where(lists >= 0, kv_len).view(batch, kv_heads, -1), True)
    return read[..., :kv_len].sum(-1)


def kept_pairs(
    mask: SparseMask, *, is_causal: bool, key_padding: Tensor | None
) -> Int64[Tensor, "batch heads"]:
    """`mask.kept_pairs`, from the row ends alone where no kept pair is forbidden.

    Methods choose allowed keys only, and where keys are forbidden from some place on (under
    causality, by padding on the right) the last index of each row of a fine-grained mask proves
    it: counting then costs as much as there are rows, not pairs.
    """
    if mask.block_size == (1, 1) and _ends_are_visible(mask, is_causal, key_padding):
        return mask.offsets[..., -1] - mask.offsets[..., 0]
    return mask.kept_pairs(is_causal=is_causal, key_padding=key_padding)


def _ends_are_visible(mask: SparseMask, is_causal: bool, key_padding: Tensor | None) -> bool:
    limit = torch.full((mask.q_len,), mask.kv_len, device=mask.device)  # last index: below it
    if is_causal:
        limit = torch.arange(mask.kv_len - mask.q_len, mask.kv_len, device=mask.device) + 1
    if key_padding is not None:
        if key_padding.shape[0] not in (1, mask.batch):
            return False
        if bool((key_padding[:, 1:] > key_padding[:, :-1]).any()):  # not on the right
            return False
        limit = limit.minimum(key_padding.sum(1)[:, None, None])
    elif not is_causal:
        return True
    if mask.nnz == 0:
        return True
    starts, ends = mask.offsets[..., :-1], mask.offsets[..., 1:]
    last = mask.indices[(ends - 1).clamp(min=0)]  # (B, H, L); of an empty row: any
    return bool(((last < limit) | (starts == ends)).all())
