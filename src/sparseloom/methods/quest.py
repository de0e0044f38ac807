"""Quest: pages of keys, chosen anew for every query by a bound on their scores.

Tang, Zhao, Zhu, Xiao, Kasikci, Han: Quest, Query-Aware Sparsity for Efficient Long-Context LLM
Inference, ICML 2024 (arXiv 2406.10774), §3, and the authors' `mit-han-lab/Quest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.cascade import largest
from sparseloom.methods.generation import Generating, Reading, Run, listed, real_tokens
from sparseloom.methods.prompt_run import check_keep, kept_of
from sparseloom.methods.settings import check_at_least, check_choice


@dataclass(frozen=True)
class Quest(Generating):
    """Each step of generation reads the pages of its cache that may score highest; none is evicted.

    Of every page the smallest and the largest number of each channel of its keys are known.  The
    bound of a query q on the page's scores is Σ max(q · smallest, q · largest) over the channels
    (§3.3).  The newest page is always read, as in the authors' kernels.  Pages are counted from the
    first token of each sequence; the last one may still be growing.

    Args:
        token_keep: tokens that a step may read: a share of the length so far up to 1, or a number
            above 1 (`token_budget`); as many whole pages as fit, the newest included.
        page_size: keys of a page.
        dense_layers: layers at the front that read everything (two in the paper).
        minimum_pages: that are read at least (three in the authors' evaluation).
        mask_heads: `"query"`: every query head has pages of its own, as in the authors' evaluation;
            with grouped heads a key/value head is then read wherever one of its queries wants it.
            `"kv"`: one choice for all heads that share keys and values, by the mean of their
            bounds.
    """

    name: ClassVar[str] = "quest"

    token_keep: float = 0.2
    page_size: int = 16
    dense_layers: int = 2
    minimum_pages: int = 3
    mask_heads: Literal["query", "kv"] = "query"

    def __post_init__(self) -> None:
        check_keep("token_keep", self.token_keep)
        check_at_least("page_size", self.page_size, 1)
        check_at_least("dense_layers", self.dense_layers, 0)
        check_at_least("minimum_pages", self.minimum_pages, 1)
        check_choice("mask_heads", self.mask_heads, ("query", "kv"))

    @property
    def capabilities(self) -> frozenset[str]:
        """Nothing leaves: every query selects."""
        return frozenset({"select"})

    def new_run(self, layers: int) -> QuestRun:
        """No pages yet."""
        return QuestRun(self, layers)


class _Pages:
    """The summaries of one layer's keys, made from each key once.

    Attributes:
        smallest, largest: (batch, kv_heads, pages, head_dim); infinite where a sequence has no
            such page.
        covered: tokens of the cache that they stand for.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.clear()

    def clear(self) -> None:
        """Forget all; the next call makes them again from the keys that are left."""
        self.smallest: Float[Tensor, "batch kv_heads pages head_dim"] | None = None
        self.largest: Float[Tensor, "batch kv_heads pages head_dim"] | None = None
        self.covered = 0

    def numbers(self, real: Bool[Tensor, "batch keys"]) -> Int64[Tensor, "batch keys"]:
        """The page of each token; of padding, the one before it, or −1."""
        return (real.cumsum(-1) - 1).div(self._size, rounding_mode="floor")

    def take_in(self, inputs: AttentionInputs) -> None:
        """Bring the summaries up to date with the keys."""
        real = real_tokens(inputs)
        numbers = self.numbers(real)
        pages = int(numbers.max()) + 1
        keys = inputs.key.detach()[:, :, self.covered :]
        # What padding would change is cut off again.
        index = numbers.masked_fill(~real, pages)[:, self.covered :]
        index = index[:, None, :, None].expand_as(keys)
        self.smallest = _reduced(self.smallest, keys, index, pages, "amin")
        self.largest = _reduced(self.largest, keys, index, pages, "amax")
        self.covered = inputs.key.shape[2]

    def bounds(
        self, query: Float[Tensor, "batch heads head_dim"]
    ) -> Float[Tensor, "batch heads pages"]:
        """No key of a page scores higher (before the scale); no sense where a page is empty."""
        assert self.smallest is not None
        assert self.largest is not None
        query = query.float().unflatten(1, (self.smallest.shape[1], -1))  # (B, KV, G, D)
        above = query.clamp(min=0) @ self.largest.float().transpose(-1, -2)
        below = query.clamp(max=0) @ self.smallest.float().transpose(-1, -2)
        return (above + below).flatten(1, 2)

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        if self.smallest is not None and self.largest is not None:
            self.smallest = self.smallest.index_select(0, indices)
            self.largest = self.largest.index_select(0, indices)


class QuestRun(Run):
    """Page summaries of every layer that is not dense."""

    needs_importance: ClassVar[bool] = False

    def __init__(self, method: Quest, layers: int) -> None:
        self._method = method
        self._pages = [_Pages(method.page_size) for _ in range(layers)]

    def prompt(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"] | None,
        head_importance: Float[Tensor, "batch heads"] | None,
    ) -> None:
        """Pages of all its keys."""
        del key_importance, head_importance
        self._take_in(inputs)

    def read(self, inputs: AttentionInputs) -> Reading:
        """The pages with the highest bounds, and the newest one."""
        method = self._method
        pages = self._take_in(inputs)
        if pages is None:
            return Reading()
        real = real_tokens(inputs)
        tokens = real.sum(-1)
        there = (tokens + method.page_size - 1) // method.page_size
        counts = kept_of(method.token_keep, tokens) // method.page_size
        counts = counts.clamp(min=method.minimum_pages)
        if bool((there <= counts).all()):
            return Reading()
        bounds = pages.bounds(inputs.query[:, :, 0])
        kv_heads, heads = inputs.key.shape[1], bounds.shape[1]
        if method.mask_heads == "kv":
            bounds = bounds.unflatten(1, (kv_heads, -1)).mean(2)
        number = torch.arange(bounds.shape[-1], device=bounds.device)
        exists = (number < there[:, None])[:, None]
        newest = (number == there[:, None] - 1)[:, None]
        bounds = bounds.masked_fill(~exists, -torch.inf).masked_fill(newest, torch.inf)
        chosen = largest(bounds, counts[:, None]) & exists
        of_token = pages.numbers(real).clamp(min=0)[:, None].expand(-1, chosen.shape[1], -1)
        kept = chosen.gather(-1, of_token) & real[:, None]
        width = 2 * inputs.key.shape[3]  # smallest and largest
        summaries = int(there.sum()) * width
        return Reading(
            listed(kept, None),
            index_bytes=summaries * kv_heads * inputs.key.element_size(),
            prediction_macs=summaries * heads,
        )

    def crop(self, length: int) -> None:
        """What stands for more than is left is made again, by the next call."""
        self.length = min(self.length, length)
        for pages in self._pages:
            if pages.covered > length:
                pages.clear()

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Pages follow their sequences."""
        for pages in self._pages:
            pages.select(indices)

    def _take_in(self, inputs: AttentionInputs) -> _Pages | None:
        """The layer's summaries with the call's keys; None where it is dense."""
        if inputs.layer == 0:
            self.length = inputs.key.shape[2]
        if inputs.layer < self._method.dense_layers:
            return None
        pages = self._pages[inputs.layer]
        pages.take_in(inputs)
        return pages


def _reduced(
    old: Tensor | None, keys: Tensor, index: Tensor, pages: int, how: Literal["amin", "amax"]
) -> Tensor:
    """The summaries with more keys, each in the page that the index names."""
    batch, kv_heads, _, width = keys.shape
    fill = torch.inf if how == "amin" else -torch.inf
    new = keys.new_full((batch, kv_heads, pages + 1, width), fill)
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new.scatter_reduce_(2, index, keys, how)[:, :, :pages]
