"""H2O: the tokens that have gathered most attention, and the newest ones.

Zhang et al.: H2O, Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models,
NeurIPS 2023 (arXiv 2306.14048), Algorithm 1, and the authors' `FMInference/H2O`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.cascade import largest
from sparseloom.methods.generation import Generating, History, Reading, every_token, listed, longer
from sparseloom.methods.prompt_run import PromptRun, check_keep, kept_of, newest


@dataclass(frozen=True)
class H2O(Generating):
    """Evicts tokens that have gathered little attention and are not among the newest.

    Every layer and key/value head decides for itself, by the probabilities that each cached token
    has got from all queries so far, the prompt's included; with grouped heads they are summed over
    the query heads that share the key.  The prompt runs whole; before each step the cache is cut to
    heavy hitters and newest tokens, and the step reads its own token besides.  What is evicted
    stays so.  (A later call with several tokens, such as another prompt, runs dense over the whole
    cache, which still holds it.)  Tokens keep the positions of the text.

    Args:
        heavy_keep: heavy hitters: a share of the prompt up to 1, or a number of tokens above 1.
        recent_keep: newest tokens, in the same way; the rest of the budget.
    """

    name: ClassVar[str] = "h2o"

    heavy_keep: float = 0.1
    recent_keep: float = 0.1

    def __post_init__(self) -> None:
        check_keep("heavy_keep", self.heavy_keep)
        check_keep("recent_keep", self.recent_keep)

    def new_run(self, layers: int) -> H2ORun:
        """Fresh scores, per layer."""
        return H2ORun(self, layers)


class _Layer:
    """What one layer holds.

    Attributes:
        places: (batch, kv_heads, held), positions of the tokens in its cache, −1 = empty; None
            while nothing has been evicted.
        scores: (batch, kv_heads, held), the probabilities that they have gathered; of all keys
            where `places` is None.
    """

    def __init__(self) -> None:
        self.places: Int64[Tensor, "batch kv_heads held"] | None = None
        self.scores: Float[Tensor, "batch kv_heads held"] | None = None
        self.history = History()

    def note(self, inputs: AttentionInputs) -> None:
        """Before a call."""
        before = inputs.key.shape[2] - inputs.query.shape[2]
        self.history.note(before, self.places, self.scores)

    def take_in(self, inputs: AttentionInputs) -> None:
        """The call's tokens, with nothing gathered yet."""
        if self.places is None or self.scores is None:
            return
        new = every_token(inputs)[:, None, -inputs.query.shape[2] :]
        new = new.expand(-1, self.places.shape[1], -1)
        self.places = torch.cat([self.places, new], -1)
        self.scores = longer(self.scores, self.places.shape[-1])

    def gather(self, inputs: AttentionInputs, key_importance: Tensor) -> None:
        """The probabilities that a call gave, (batch, heads, keys)."""
        kv_heads = inputs.key.shape[1]
        found = key_importance.detach().float().unflatten(1, (kv_heads, -1)).sum(2)
        if self.places is not None:
            found = found.gather(-1, self.places.clamp(min=0)).masked_fill(self.places < 0, 0)
        held = self.scores
        self.scores = found if held is None else longer(held, found.shape[-1]) + found

    def evict(
        self,
        inputs: AttentionInputs,
        heavy: Int64[Tensor, " batch"],
        recent: Int64[Tensor, " batch"],
    ) -> None:
        """All but the best and the newest of the tokens before this step's."""
        assert self.scores is not None
        places = self.places
        if places is None:
            places = every_token(inputs)[:, None, :-1].expand_as(self.scores)
        held = places >= 0
        if bool((held.sum(-1) <= (heavy + recent)[:, None]).all()):
            return
        new = newest(held, recent[:, None])
        old = held & ~new
        best = largest(self.scores.masked_fill(~old, -torch.inf), heavy[:, None]) & old
        columns = listed(new | best, None)
        empty, columns = columns < 0, columns.clamp(min=0)
        self.places = places.gather(-1, columns).masked_fill(empty, -1)
        self.scores = self.scores.gather(-1, columns).masked_fill(empty, 0)

    def crop(self, length: int) -> None:
        """Up to 16 calls are taken back; further back what was evicted stays so."""
        earlier = self.history.back_to(length)
        if earlier is not None:
            self.places, self.scores = earlier
        elif self.places is not None and self.scores is not None:
            gone = self.places >= length
            self.places = self.places.masked_fill(gone, -1)
            self.scores = self.scores.masked_fill(gone, 0)
        elif self.scores is not None:
            self.scores = self.scores[..., :length]

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        def change(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, indices)

        self.places = None if self.places is None else change(self.places)
        self.scores = None if self.scores is None else change(self.scores)
        self.history.change(change)


class H2ORun(PromptRun):
    """Scores and survivors of every layer; each sequence and each beam has its own."""

    needs_importance: ClassVar[bool] = True

    def __init__(self, method: H2O, layers: int) -> None:
        self._method = method
        self._layers = [_Layer() for _ in range(layers)]

    def prompt(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"] | None,
        head_importance: Float[Tensor, "batch heads"] | None,
    ) -> None:
        """Every token stays, for now."""
        assert key_importance is not None
        super().prompt(inputs, key_importance, head_importance)
        layer = self._layers[inputs.layer]
        layer.note(inputs)
        layer.take_in(inputs)
        layer.gather(inputs, key_importance)

    def read(self, inputs: AttentionInputs) -> Reading:
        """What is left in this layer, and the new token."""
        prompt, method = self.begin(inputs), self._method
        layer = self._layers[inputs.layer]
        layer.note(inputs)
        heavy, recent = kept_of(method.heavy_keep, prompt), kept_of(method.recent_keep, prompt)
        layer.evict(inputs, heavy, recent)
        layer.take_in(inputs)
        return Reading(layer.places)

    def observe(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"],
        head_importance: Float[Tensor, "batch heads"],
    ) -> None:
        """Survivors gather what the step gave them."""
        del head_importance
        self._layers[inputs.layer].gather(inputs, key_importance)

    def crop(self, length: int) -> None:
        """Back to that length, exactly for up to 16 calls."""
        super().crop(length)
        for layer in self._layers:
            layer.crop(length)

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Each sequence takes its scores along."""
        super().select(indices)
        for layer in self._layers:
            layer.select(indices)
