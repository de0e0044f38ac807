"""Sums over the attention calls of one layer, from which its row of statistics is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sparseloom.integrations.pruned_layer import PrunedLayer
from sparseloom.integrations.stats import LayerStats
from sparseloom.integrations.step_counts import CacheReads, Step, StepShape, sum_steps, union_of
from sparseloom.kernels import DecodeStats
from sparseloom.mask import SparseMask, allowed_pairs
from sparseloom.methods.base import AttentionInputs

_WAITING = 256  # steps whose counts are summed up together


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
    _shape: StepShape | None = None
    _steps: list[Step] = field(default_factory=list)  # of that shape, not summed up yet

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
        self.replaced = self.replaced or replaced_macs is not None
        self.dense_calls += mask is None and replaced_macs is None
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
        if len(self._steps) >= _WAITING or self._shape != shape:
            self._add_steps()
        self._shape = shape
        self._steps.append((stats, union_of(lists, shape.heads, kv_len)))
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
        """Sum up what the steps read that wait to be."""
        if not self._steps:
            return
        assert self._shape is not None
        assert self.read is not None
        sums = sum_steps(self._shape, self._steps)
        self._steps.clear()
        self.read.add(sums)
        self.kept += sums.kept
        self.attention_macs += sums.attention_macs
        self.bytes += sums.cache_bytes


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
