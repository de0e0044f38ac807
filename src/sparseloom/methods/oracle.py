"""The mask that exact scores give: the upper bound that a predictor is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, AttentionShape, Selector
from sparseloom.methods.pooling import POOLINGS, Pooling
from sparseloom.methods.selection import Scores, keeps_all, threshold_mask, topk_mask
from sparseloom.methods.settings import (
    check_at_least,
    check_block_size,
    check_choice,
    check_one_given,
    check_sparsity,
)


@dataclass(frozen=True)
class Oracle(Selector):
    """Selection by the true scores q·k·scale, needing no training and saving no time.

    `Oracle(sparsity=0.9)` keeps the best keys of each query block within the budget of
    `topk_mask`; at sparsity 0 that is everything.  `Oracle(threshold=0.01)` keeps the pairs whose
    attention probability reaches the threshold, as Liu et al. do to show how sparse attention is
    (IEEE TC 2022, Table 1, θ = 0.001 and 0.01); the row maximum always stays, and in causal
    models the diagonal.

    Args:
        sparsity: share of the allowed keys to drop, in [0, 1).
        threshold: probability, in (0, 1); instead of `sparsity`.
        block_size: (queries, keys) that are kept or dropped together.
        minimum_keys: keys that a query keeps at least, with `sparsity`.
        pooling: how pairs become one score per block (`pool_scores`).
    """

    name: ClassVar[str] = "oracle"

    sparsity: float | None = None
    threshold: float | None = None
    block_size: tuple[int, int] = (1, 1)
    minimum_keys: int = 16
    pooling: Pooling = "mass"

    def __post_init__(self) -> None:
        check_one_given("sparsity", self.sparsity, "threshold", self.threshold)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        check_block_size(self.block_size)
        check_at_least("minimum_keys", self.minimum_keys, 1)
        check_choice("pooling", self.pooling, POOLINGS)

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The mask of the query heads; queries and keys are all that is looked at."""
        scores = Scores.from_query_key(inputs.query, inputs.key, inputs.scale)
        if self.threshold is not None:
            return threshold_mask(
                scores,
                self.threshold,
                probability=True,
                block_size=self.block_size,
                is_causal=inputs.is_causal,
                key_padding=inputs.key_padding,
            )
        assert self.sparsity is not None
        return topk_mask(
            scores,
            sparsity=self.sparsity,
            minimum_keys=self.minimum_keys,
            block_size=self.block_size,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
            query_padding=inputs.query_padding,
            pooling=self.pooling,
        )

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether the budget of a row that sees all keys leaves one out; always by threshold."""
        del q_len
        return self.sparsity is None or not keeps_all(kv_len, self.sparsity, self.minimum_keys)

    def prediction_macs(self, shape: AttentionShape) -> int:
        """All allowed scores at full width: head_dim per pair and head."""
        pairs = shape.allowed_pairs
        return shape.batch * shape.heads * pairs * shape.head_dim
