"""What a layer computes once tokens and heads are gone: pairs and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PrunedLayer:
    """One call of a layer of which tokens and heads are gone.

    Attributes:
        width, inner, heads, kv_heads, head_dim, is_causal: of the layer.
        matrices: of its feed-forward.
        element_size: bytes of a number.
        lengths: tokens of each sequence without padding.
        tokens, heads_alive: what is left in its attention, per sequence.
        tokens_after, heads_after: what is left after it.
        head_tokens: where tokens leave between the heads, those of each head, per sequence.
    """

    width: int
    inner: int
    matrices: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    element_size: int
    lengths: Sequence[int]
    tokens: Sequence[int]
    tokens_after: Sequence[int]
    heads_alive: Sequence[int]
    heads_after: Sequence[int]
    head_tokens: Sequence[Sequence[int]] | None = None

    @property
    def pairs(self) -> tuple[int, int]:
        """(query, key) pairs computed, and those of the whole sequences."""
        if self.head_tokens is None:
            each = zip(self.tokens, self.heads_alive, strict=True)
            kept = sum(self._seen(tokens) * heads for tokens, heads in each)
        else:
            kept = sum(self._seen(tokens) for heads in self.head_tokens for tokens in heads)
        return kept, self.heads * sum(map(self._seen, self.lengths))

    def linear_macs(self) -> tuple[int, int]:
        """Of query, key, value and output projection and the feed-forward: run, and whole."""
        one, rest = self.width * self.head_dim, self.matrices * self.width * self.inner
        shared = self.kv_heads < self.heads  # then keys and values are those of all heads
        each = zip(self.tokens, self.tokens_after, self.heads_alive, strict=True)
        run = sum(
            n * (h + 2 * (self.kv_heads if shared else h)) * one + m * (h * one + rest)
            for n, m, h in each
        )
        return run, sum(self.lengths) * (2 * (self.heads + self.kv_heads) * one + rest)

    def _seen(self, tokens: int) -> int:
        """Pairs of one head."""
        return tokens * (tokens + 1) // 2 if self.is_causal else tokens * tokens
