"""What ran in each layer: pairs, multiply-accumulates, bytes, and how good the choice was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class LayerStats(TypedDict):
    """One row of `Sparsified.stats()`; sums over the calls of one layer unless said otherwise.

    Attributes:
        layer: its number.
        method: short form of the method.
        ran: "sparse", "dense", "replaced" (by a method that computes attention in another way) or
            "pruned" (on what is left of the sequence): what the calls did ("replaced", else
            "sparse", if any was).
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


def density_of(layers: Sequence[LayerStats]) -> float:
    """Kept over allowed pairs of all layers together; 1 where there were none to keep."""
    allowed = sum(row["allowed_pairs"] for row in layers)
    return sum(row["kept_pairs"] for row in layers) / allowed if allowed else 1.0


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
