"""SpAtten while tokens are generated: cascade pruning of tokens and heads, step by step.

Wang, Zhang, Han: SpAtten (HPCA 2021), Algorithm 2, as the authors' traces run it. The prompt is
read whole. Inside a step tokens and heads only ever leave, layer by layer; the next step begins
with all of them again, ranked by scores that go on accumulating. Keys and values of pruned tokens
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.cascade import largest
from sparseloom.methods.generation import History, Reading, Run, every_token, listed, longer


class CascadeRun(Run):
    """Scores of tokens and heads, and who is alive in the step at hand.

    A token's score is the sum of the probabilities that it got, over queries, heads, layers and
    steps; a head's the sum of the magnitudes of its outputs. Heads that are pruned read nothing
    and give zeros. With several sequences each has its own scores and survivors; in beam search
    every beam is one.

    Args:
        token_counts: from a sequence's length, newest token included, to the tokens that each
            layer keeps.
        head_counts: heads that each layer keeps, from the number of heads; None = all.
        value_keep: share of the surviving keys of a head whose values are read (§III-C).
        threshold: of the largest probability, under which the low bits of the keys are fetched
            (§III-D); None reads them at once.
        decay: what scores of tokens are multiplied by at the start of a step.
        keep_first: whether each sequence's first token always stays.
        recent: newest tokens that always stay, the newest of all first. The paper names none.
    """

    def __init__(
        self,
        *,
        token_counts: Callable[[int], Sequence[int]] | None,
        head_counts: Callable[[int], Sequence[int]] | None = None,
        value_keep: float = 1.0,
        threshold: float | None = None,
        decay: float = 1.0,
        keep_first: bool = False,
        recent: int = 1,
    ) -> None:
        self._token_counts, self._head_counts = token_counts, head_counts
        self._options = (None if value_keep >= 1 else value_keep, threshold)
        self._decay, self._forced = decay, (keep_first, recent)
        self._schedules: dict[int, Sequence[int]] = {}
        self._earlier = History()
        self.tokens: Float[Tensor, "batch keys"] | None = None
        self.heads: Float[Tensor, "batch heads"] | None = None
        self.alive: Int64[Tensor, "batch kept"] | None = None
        self._present: list[int] = []  # tokens alive in each sequence
        self.alive_heads: Bool[Tensor, "batch heads"] | None = None

    def prompt(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"] | None,
        head_importance: Float[Tensor, "batch heads"] | None,
    ) -> None:
        """Every token and head stays; scores accumulate over heads and layers."""
        assert key_importance is not None
        assert head_importance is not None
        if inputs.layer == 0:
            self._begin(inputs.key.shape[2])
        self._add(key_importance, head_importance)

    def read(self, inputs: AttentionInputs) -> Reading:
        """The survivors of this layer, from those of the layer before."""
        kv_len = inputs.key.shape[2]
        if inputs.layer == 0:
            self._begin(kv_len)
            if self._decay != 1.0 and self.tokens is not None:
                self.tokens = self.tokens * self._decay
            self.alive = self.alive_heads = None
        self._prune_tokens(inputs)
        self._prune_heads(inputs)
        keep = None if self.alive is None else self.alive[:, None]
        if self.alive_heads is not None:
            if keep is None:
                keep = every_token(inputs)[:, None]
            keep = keep.masked_fill(~self.alive_heads[..., None], -1)
        return Reading(keep, *self._options)

    def observe(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"],
        head_importance: Float[Tensor, "batch heads"],
    ) -> None:
        """Scores accumulate; probabilities of high bits that were discarded are not among them."""
        del inputs
        self._add(key_importance, head_importance)

    def crop(self, length: int) -> None:
        """Back to the scores as they were at that length, for up to 16 steps.

        Further back, the scores of the tokens that stay keep what dropped queries gave them.
        """
        if length >= self.length:
            return
        earlier = self._earlier.back_to(length)
        if earlier is not None:
            self.tokens, self.heads = earlier
        elif self.tokens is not None:
            self.tokens = self.tokens[:, :length]
        self.length = length

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Scores follow their sequences."""

        def change(scores: Tensor) -> Tensor:
            return scores.index_select(0, indices)

        if self.tokens is not None:
            self.tokens = change(self.tokens)
        if self.heads is not None:
            self.heads = change(self.heads)
        self._earlier.change(change)

    def _begin(self, kv_len: int) -> None:
        """Before the first layer takes more tokens in."""
        self._earlier.note(self.length, self.tokens, self.heads)
        self.length = kv_len

    def _add(self, key_importance: Tensor, head_importance: Tensor) -> None:
        found, heads = key_importance.detach().float().sum(1), head_importance.detach().float()
        kept = self.tokens
        if kept is not None and kept.shape[1] < found.shape[1]:
            kept = longer(kept, found.shape[1])
        self.tokens = found if kept is None else kept + found
        self.heads = heads if self.heads is None else self.heads + heads

    def _prune_tokens(self, inputs: AttentionInputs) -> None:
        if self._token_counts is None:
            return
        batch, kv_len = inputs.query.shape[0], inputs.key.shape[2]
        valid = inputs.key_padding
        lengths = [kv_len] * batch if valid is None else valid.sum(-1).tolist()
        counts = [self._counts(length)[inputs.layer] for length in lengths]
        alive = self.alive
        now = lengths if alive is None else self._present
        if all(count >= present for count, present in zip(counts, now, strict=True)):
            return
        scores = longer(self._scores(inputs), kv_len).clone()
        if self._forced[0]:
            first = 0 if valid is None else valid.int().argmax(-1)
            scores[torch.arange(batch, device=scores.device), first] = torch.inf
        if recent := min(self._forced[1], kv_len):
            if recent > 1:
                above = torch.linspace(0.5, 1.0, recent, device=scores.device)
                scores[:, -recent:] = above * torch.finfo(scores.dtype).max
            scores[:, -1] = torch.inf
        if alive is not None:
            scores = scores.gather(1, alive.clamp(min=0)).masked_fill(alive < 0, -torch.inf)
        elif valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        self._present = [min(pair) for pair in zip(counts, now, strict=True)]
        kept = largest(scores, torch.tensor(self._present, device=scores.device))[:, None]
        self.alive = listed(kept, None if alive is None else alive[:, None])[:, 0]

    def _prune_heads(self, inputs: AttentionInputs) -> None:
        batch, heads = inputs.query.shape[:2]
        if self._head_counts is None:
            return
        count = self._head_counts(heads)[inputs.layer]
        now = heads if self.alive_heads is None else int(self.alive_heads[0].sum())
        if count >= now:
            return
        scores = inputs.query.new_zeros(batch, heads) if self.heads is None else self.heads
        if self.alive_heads is not None:
            scores = scores.masked_fill(~self.alive_heads, -torch.inf)
        wanted = torch.full((batch,), count, device=scores.device)
        self.alive_heads = largest(scores.float(), wanted)

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        if self.tokens is None:
            return torch.zeros(inputs.query.shape[0], 1, device=inputs.query.device)
        return self.tokens

    def _counts(self, length: int) -> Sequence[int]:
        """Tokens per layer for a sequence of that length; asked once per length."""
        assert self._token_counts is not None
        if length not in self._schedules:
            if len(self._schedules) > 4096:
                self._schedules.clear()
            self._schedules[length] = self._token_counts(length)
        return self._schedules[length]
