"""SpAtten: cascade token and head pruning, local value pruning, progressive quantisation.

Wang, Zhang, Han: SpAtten, HPCA 2021 (arXiv 2012.09852), §III, §V-A, Algorithms 1 and 2.  Here: the
settings and the counts that follow from them; `cascade` keeps the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs, Pruner, Survivors
from sparseloom.methods.cascade import Cascade
from sparseloom.methods.cascade_steps import CascadeRun
from sparseloom.methods.generation import Generating
from sparseloom.methods.settings import check_at_least, check_choice
from sparseloom.schedules import (
    HEAD_FRONT,
    LARGEST_END,
    TOKEN_FRONT,
    check_fractions,
    front_layers,
    kept_counts,
    kept_fractions,
)

Keep = float | tuple[float, ...] | None

LARGEST_RATIO = 0.9
"""Largest average pruning ratio that adapting to the length may reach."""


@dataclass(frozen=True)
class SpAtten(Pruner, Generating):
    """Prunes tokens and heads for all later layers by the importance they have gathered so far.

    A token's importance is the sum of the attention probabilities that it received, over queries,
    heads and layers; a head's is the sum of the magnitudes of its outputs (§III-A, §III-B).  What
    is pruned after a layer's attention is absent from then on: from that layer's output
    projection and feed-forward as well as from all later layers.

    Args:
        token_keep: tokens that take part in attention: mean share over all layers, spread by the
            rule of §V-A, or one share of the original length per layer; None keeps all.
        head_keep: the same for heads.
        value_keep: share of the values that each query reads, by local value pruning (§III-C);
            in generation only.
        key_bits: bits of the high and the low plane of quantised keys; None leaves them as they
            are.  Where an encoder is concerned see `sparsify`.
        value_bits: bits of quantised values; None leaves them as they are.
        threshold: in generation the low plane is read where the largest probability is below.
        decay: factor of the gathered importance, once per generation step.
        granularity: `"layer"` ranks tokens once per layer, as the published traces do; `"head"`
            after every head, the count falling evenly from one layer's to the next one's: where
            the sequence is shortened; not in generation, whose heads run at once.
        front: share of the layers at the front that lose no tokens, where the rule spreads.
        head_front: the same for heads.
        start_ratio: pruned share in the first layer that prunes; None takes half the average,
            or more where the last ratio would pass 0.95.
        head_start_ratio: the same for heads.
        reference_length: length of a typical input, to which `token_keep` applies; longer
            inputs lose more, in proportion, up to 0.9 on average, `start_ratio` likewise.
            None: all lose the same share.
        keep_first: never prune the first token ([CLS]); None: in encoders.
        keep_last: never prune the newest token; None: in decoders.
        recent: tokens that `keep_last` means.  The paper names one at most; language models need
            their nearest context, whose importance is still low.
        prompt: what a decoder does with the text it is given.  `"whole"`, as in the published
            traces: nothing is pruned in it, and steps of generation choose what they read of its
            cache.  `"shorten"`, as in the text (§III): its tokens leave layer by layer as in an
            encoder; a pass without a cache.
    """

    name: ClassVar[str] = "spatten"

    token_keep: Keep = 0.65
    head_keep: Keep = 0.9
    value_keep: float = 1.0
    key_bits: tuple[int, int] | None = None
    value_bits: int | None = None
    threshold: float = 0.1
    decay: float = 1.0
    granularity: Literal["layer", "head"] = "layer"
    front: float = TOKEN_FRONT
    head_front: float = HEAD_FRONT
    start_ratio: float | None = None
    head_start_ratio: float | None = None
    reference_length: int | None = None
    keep_first: bool | None = None
    keep_last: bool | None = None
    recent: int = 1
    prompt: Literal["whole", "shorten"] = "whole"

    def __post_init__(self) -> None:
        for name in ("token_keep", "head_keep"):
            check_fractions(name, getattr(self, name))
        for name in ("value_keep", "decay"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        for name in ("front", "head_front"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {share}")
        for name in ("start_ratio", "head_start_ratio"):
            if (ratio := getattr(self, name)) is not None and not 0 <= ratio < 1:
                raise ValueError(f"{name} must be in [0, 1) or none, got {ratio}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        check_choice("granularity", self.granularity, ("layer", "head"))
        check_choice("prompt", self.prompt, ("whole", "shorten"))
        check_at_least("recent", self.recent, 1)
        if self.reference_length is not None:
            check_at_least("reference_length", self.reference_length, 1)
        if self.value_bits is not None and not 2 <= self.value_bits <= 16:
            raise ValueError(f"value_bits must be in [2, 16] or none, got {self.value_bits}")
        if self.key_bits is not None and not (self.key_bits[0] >= 2 and self.key_bits[1] >= 0):
            raise ValueError(
                f"key_bits must be at least 2 high and 0 low bits, got {self.key_bits}"
            )

    def kept_tokens(self, layers: int, length: int) -> list[int]:
        """Tokens of a sequence of `length` that take part in each layer's attention."""
        return _counts(self._token_shares(layers, length), length)

    def kept_heads(self, layers: int, heads: int) -> list[int]:
        """Heads that each layer computes."""
        shares = kept_fractions(
            "head_keep", self.head_keep, layers, self.head_front, start_ratio=self.head_start_ratio
        )
        return _counts(shares, heads)

    def start(
        self, layers: int, heads: int, valid: Bool[Tensor, "batch length"], *, is_causal: bool
    ) -> Cascade:
        """Fresh scores for one pass over a batch.

        Args:
            layers, heads: of the model.
            valid: the tokens that are not padding.
            is_causal: whether the model is a decoder, which decides what is never pruned.
        """
        lengths = valid.sum(1).tolist()
        tokens = {length: self.kept_tokens(layers, length) for length in set(lengths)}
        return Cascade(
            token_counts=[tokens[length] for length in lengths],
            head_counts=self.kept_heads(layers, heads),
            valid=valid,
            keep_first=not is_causal if self.keep_first is None else self.keep_first,
            keep_last=self.recent
            if (is_causal if self.keep_last is None else self.keep_last)
            else 0,
        )

    def prune(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"],
        head_importance: Float[Tensor, "batch heads"],
        state: Any = None,
    ) -> Survivors:
        """The tokens and heads of the next layer; `state` is what `start` made."""
        if not isinstance(state, Cascade):
            raise TypeError(f"state must be a Cascade from start, got {type(state).__name__}")
        state.gather(key_importance, head_importance)
        return state.rank(inputs.layer + 1)

    def new_run(self, layers: int) -> CascadeRun:
        """Fresh scores for the sequences of a cache, while tokens are generated.

        Raises:
            NotImplementedError: ranking after every head.
        """
        if self.granularity != "layer":
            raise NotImplementedError(
                f"granularity {self.granularity!r} is not supported in generation, use 'layer'"
            )
        progressive = self.key_bits is not None and self.key_bits[1] > 0
        prunes_heads = self.head_keep is not None and self.head_keep != 1
        return CascadeRun(
            token_counts=None if self.token_keep is None else partial(self.kept_tokens, layers),
            head_counts=partial(self.kept_heads, layers) if prunes_heads else None,
            value_keep=self.value_keep,
            threshold=self.threshold if progressive else None,
            decay=self.decay,
            keep_first=bool(self.keep_first),
            recent=0 if self.keep_last is False else self.recent,
        )

    @property
    def stored_key_bits(self) -> tuple[int, int] | None:
        """The planes of the keys in the cache."""
        return self.key_bits

    @property
    def stored_value_bits(self) -> int | None:
        """Width of the values in the cache."""
        return self.value_bits

    def _token_shares(self, layers: int, length: int) -> Float64[np.ndarray, "layers"]:
        """Share of the tokens that each layer sees, for one length."""
        keep, start = self.token_keep, self.start_ratio
        if keep is not None and self.reference_length is not None:
            grown = length / self.reference_length
            if isinstance(keep, tuple):
                keep = tuple(1 - min((1 - share) * grown, LARGEST_RATIO) for share in keep)
            else:
                pruned = 1 - front_layers(layers, self.front) / layers
                grown = min(grown, LARGEST_RATIO * pruned / (1 - keep)) if keep < 1 else 1.0
                keep = 1 - (1 - keep) * grown
                if start is not None:
                    start = max(start * grown, 2 * (1 - keep) / pruned - LARGEST_END)
        return kept_fractions("token_keep", keep, layers, self.front, start_ratio=start)


def _counts(shares: Float64[np.ndarray, "layers"], total: int) -> list[int]:
    """Whole numbers, at least one and never more than there are."""
    return np.minimum(kept_counts(shares, total), total).tolist()
