"""The state of cascade pruning in one pass: scores of tokens and heads, and who is left.

Wang, Zhang, Han: SpAtten, HPCA 2021, Algorithm 2 and §IV-B: survivors keep their order, and among
equal scores the first in input order stay.  A sequence that keeps fewer tokens than the longest of
its batch is padded; padding has no score and takes no place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.methods.base import Survivors


class Cascade:
    """Scores and survivors of one batch, brought up to date layer by layer.

    Attributes:
        valid: (batch, tokens), the slots that hold a surviving token.
        positions: (batch, tokens), the input position that each slot holds.
        tokens: (batch, tokens), importance gathered so far, fp32.
        heads: (batch, heads), the same of the heads.
        heads_alive: (batch, heads).
    """

    def __init__(
        self,
        token_counts: Sequence[Sequence[int]],
        head_counts: Sequence[int],
        valid: Bool[Tensor, "batch length"],
        *,
        keep_first: bool = True,
        keep_last: int = 0,
    ) -> None:
        """Everything that is valid is alive.

        Args:
            token_counts: per sequence, the tokens that each layer sees.
            head_counts: heads that each layer sees.
            valid: the tokens that are not padding.
            keep_first: never prune the first token of a sequence.
            keep_last: how many of its last tokens are never pruned, the very last before others.
        """
        batch, length = valid.shape
        device, heads = valid.device, max(head_counts)
        self._token_counts = torch.tensor(token_counts, device=device).T  # (layers, batch)
        self._head_counts = list(head_counts)
        self._forced = (keep_first, keep_last)
        self.valid = valid
        self.positions = torch.arange(length, device=device).expand(batch, -1)
        self.tokens = torch.zeros(batch, length, device=device)
        self.heads = torch.zeros(batch, heads, device=device)
        self.heads_alive = torch.ones(batch, heads, dtype=torch.bool, device=device)

    def prunes_after(self, layer: int) -> bool:
        """Whether anything may leave after the attention of this or a later layer."""
        heads, tokens = self._head_counts, self._token_counts
        return heads[-1] < heads[layer] or bool((tokens[-1] < tokens[layer]).any())

    def gather(
        self,
        key_importance: Float[Tensor, "batch heads tokens"],
        head_importance: Float[Tensor, "batch heads"],
    ) -> None:
        """Add what one layer's attention gave (Algorithm 2); dead heads give nothing."""
        alive = self.heads_alive.to(key_importance.dtype)
        self.tokens = self.tokens + torch.einsum("bhn,bh->bn", key_importance, alive).float()
        self.heads = self.heads + (head_importance * alive).float()

    def gather_head(
        self,
        head: int,
        key_importance: Float[Tensor, "batch tokens"],
        head_importance: Float[Tensor, " batch"],
    ) -> None:
        """The same for one head alone."""
        alive = self.heads_alive[:, head].to(key_importance.dtype)
        self.tokens = self.tokens + (key_importance * alive[:, None]).float()
        self.heads = self.heads.clone()
        self.heads[:, head] += (head_importance * alive).float()

    def narrow(
        self, stays: Bool[Tensor, "batch tokens"], layer: int, done: Int64[Tensor, " batch"]
    ) -> Bool[Tensor, "batch tokens"]:
        """Who of `stays` is left once a sequence has run `done` of its heads of `layer`.

        The count falls evenly, rounded up, from this layer's to the next one's.
        """
        now, after = self._token_counts[layer], self._token_counts[layer + 1]
        counts = now - (now - after) * done // self.heads_alive.sum(1)
        return stays if bool((counts >= stays.sum(1)).all()) else self._best(counts, stays)

    def rank(self, layer: int) -> Survivors:
        """Who takes part in `layer`: the highest scores of those alive."""
        if layer >= len(self._head_counts):
            return Survivors(None, None)
        counts = self._token_counts[layer]
        tokens = None
        if bool((counts < self.valid.sum(1)).any()):
            tokens = self._best(counts, self.valid)
        heads = None
        if (count := self._head_counts[layer]) < int(self.heads_alive.sum(1).max()):
            scores = self.heads.masked_fill(~self.heads_alive, -torch.inf)
            heads = largest(scores, torch.full_like(counts, count)) & self.heads_alive
        return Survivors(tokens, heads)

    def apply(self, survivors: Survivors) -> Int64[Tensor, "batch kept"] | None:
        """Let the others go; returns the slots that stay, or None where no slot went."""
        if survivors.heads is not None:
            self.heads_alive = survivors.heads
        if survivors.tokens is None:
            return None
        slots, self.valid = slots_of(survivors.tokens)
        self.positions = self.positions.gather(1, slots)
        self.tokens = self.tokens.gather(1, slots)
        return slots

    def _best(
        self, counts: Int64[Tensor, " batch"], among: Bool[Tensor, "batch tokens"]
    ) -> Bool[Tensor, "batch tokens"]:
        scores = self.tokens.masked_fill(~among, -torch.inf)
        first, last = self._forced
        order = self.valid.int().cumsum(1)  # 1 at the first token of a sequence
        if last:
            behind = order[:, -1:] - order  # 0 at the last one
            above = torch.finfo(scores.dtype).max * (1 - 0.5 * behind / last)
            scores = torch.where(among & (behind < last), above, scores)
            scores = scores.masked_fill(among & (behind == 0), torch.inf)
        if first:
            scores = scores.masked_fill(among & (order == 1), torch.inf)
        return largest(scores, counts) & among


def largest(
    scores: Float[Tensor, "batch *heads keys"], counts: Int64[Tensor, "batch *#heads"]
) -> Bool[Tensor, "batch *heads keys"]:
    """The `counts` largest scores of each row; of equal ones the first (HPCA 2021, Fig. 9)."""
    most = min(int(counts.max()), scores.shape[-1])
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    counts = counts[..., None].clamp(max=scores.shape[-1])
    same = bool((counts == most).all())
    best = scores.topk(most, dim=-1, sorted=not same).values
    if same:
        kth = best.amin(-1, keepdim=True)
    else:
        kth = best.gather(-1, (counts - 1).clamp(min=0).expand(*scores.shape[:-1], 1))
    found = scores >= kth
    if bool((found.sum(-1, keepdim=True) == counts).all()):  # no tie to break, no empty row
        return found
    above = scores > kth
    ties = scores == kth
    room = counts - above.sum(-1, keepdim=True)
    return (above | (ties & (ties.cumsum(-1) <= room))) & (counts > 0)


def slots_of(
    stays: Bool[Tensor, "batch items"],
) -> tuple[Int64[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Where each row's chosen items stand, in order, and which entries count.

    Rows are as long as the fullest one (at least 1); what is left over points at other items.
    """
    counts = stays.sum(1)
    longest = max(int(counts.max()), 1)
    slots = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return slots, torch.arange(longest, device=stays.device) < counts[:, None]
