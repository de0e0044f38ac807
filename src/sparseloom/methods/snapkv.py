"""SnapKV: the part of the prompt that its last queries attend to.

Li et al.: SnapKV, LLM Knows What You are Looking for Before Generation, NeurIPS 2024 (arXiv
2404.14469), §4 and Listing 1, and the authors' `FasterDecoding/SnapKV`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.cascade import largest
from sparseloom.methods.generation import Generating, Reading, every_token, listed, real_tokens
from sparseloom.methods.prompt_run import PromptRun, check_keep, kept_of, newest
from sparseloom.methods.settings import check_at_least, check_choice


@dataclass(frozen=True)
class SnapKV(Generating):
    """Cuts the prompt's cache once, before the first step; generated tokens all stay.

    The probabilities that the prompt's last `window` queries give to the keys before them are
    summed, smoothed along the text, and ranked, per layer and key/value head.  With grouped heads
    the smoothed scores are averaged over the query heads that share the key (the authors' code
    repeats keys instead and so keeps other tokens for each query head; the mean is what NVIDIA's
    kvpress takes).

    A prompt may come in several calls.  Tokens of calls after the first step stay, as generated
    ones do.  After a crop into the prompt, the queries that are gone have no vote.

    Args:
        token_keep: tokens of the prompt that stay, the window's included: a share of the prompt up
            to 1, or a number above 1 (`max_capacity_prompt`).  The window always stays.
        window: last queries of the prompt, which choose.
        kernel: width of the smoothing, odd; 1 for none.  7 in the paper's LongBench runs.
        pooling: `"mean"` or `"max"` of the kernel's places; the mean takes what lies beyond the
            ends as 0.
    """

    name: ClassVar[str] = "snapkv"

    token_keep: float = 0.2
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_keep("token_keep", self.token_keep)
        check_at_least("window", self.window, 1)
        check_at_least("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        check_choice("pooling", self.pooling, ("mean", "max"))
        if 1 < self.token_keep < self.window:
            raise ValueError(
                f"token_keep must be at least the window of {self.window} tokens, "
                f"got {self.token_keep}"
            )

    def new_run(self, layers: int) -> SnapKVRun:
        """No queries yet."""
        return SnapKVRun(self, layers)


class _Layer:
    """What one layer remembers.

    Attributes:
        queries: (batch, heads, window, head_dim), the last ones of the prompt.
        places: (batch, window), their positions, −1 = none.
        chosen: (batch, kv_heads, kept), positions in the prompt, −1 = empty; None before the first
            step, and where all stay.
    """

    queries: Float[Tensor, "batch heads window head_dim"] | None = None
    places: Int64[Tensor, "batch window"] | None = None
    chosen: Int64[Tensor, "batch kv_heads kept"] | None = None

    def take_in(self, inputs: AttentionInputs, window: int) -> None:
        """Remember the last queries that are not padding."""
        queries = inputs.query.detach()
        places = every_token(inputs)[:, -queries.shape[2] :]
        if self.queries is not None and self.places is not None:
            queries = torch.cat([self.queries, queries], 2)
            places = torch.cat([self.places, places], 1)
        last = (places >= 0).to(torch.uint8).argsort(dim=1, stable=True)[:, -window:]
        index = last[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        self.queries, self.places = queries.gather(2, index), places.gather(1, last)

    def scores(
        self,
        method: SnapKV,
        inputs: AttentionInputs,
        real: Bool[Tensor, "batch keys"],
        before: Bool[Tensor, "batch keys"],
    ) -> Float[Tensor, "batch kv_heads keys"]:
        """What the window's queries give to each of the prompt's keys `before` it, smoothed."""
        assert self.queries is not None
        assert self.places is not None
        end, kv_heads = real.shape[1], inputs.key.shape[1]
        keys = inputs.key[:, :, :end].float()
        queries = self.queries.float().unflatten(1, (kv_heads, -1))  # (B, KV, G, W, D)
        found = (queries @ keys[:, :, None].transpose(-1, -2)) * inputs.scale
        seen = torch.arange(end, device=real.device) <= self.places[..., None]  # (B, W, S)
        allowed = (seen & real[:, None])[:, None, None]
        floor = torch.finfo(found.dtype).min
        found = found.masked_fill(~allowed, floor).softmax(-1).masked_fill(~allowed, 0)
        given = found.sum(-2).masked_fill(~before[:, None, None], 0)  # (B, KV, G, S)
        # Along the text: padding between two parts of a prompt is no neighbour.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, None, None]
        order = order.expand_as(given)
        smooth = _smooth(method, given.gather(-1, order).flatten(0, 1)).view_as(given)
        return torch.zeros_like(given).scatter(-1, order, smooth).mean(2)


def _smooth(
    method: SnapKV, rows: Float[Tensor, "rows group keys"]
) -> Float[Tensor, "rows group keys"]:
    pool = F.avg_pool1d if method.pooling == "mean" else F.max_pool1d
    return pool(rows, method.kernel, stride=1, padding=method.kernel // 2)


class SnapKVRun(PromptRun):
    """The last queries of a prompt until its first step, and then what they chose."""

    def __init__(self, method: SnapKV, layers: int) -> None:
        self._method = method
        self._layers = [_Layer() for _ in range(layers)]

    def prompt(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"] | None,
        head_importance: Float[Tensor, "batch heads"] | None,
    ) -> None:
        """Before the first step queries are remembered."""
        super().prompt(inputs, key_importance, head_importance)
        if self.prompt_tokens is None:
            self._layers[inputs.layer].take_in(inputs, self._method.window)

    def read(self, inputs: AttentionInputs) -> Reading:
        """What was chosen of the prompt, and all that came after it."""
        layer, macs = self._layers[inputs.layer], 0
        tokens = self.begin(inputs)
        if layer.queries is not None:
            macs = self._choose(layer, inputs, tokens)
            layer.queries = layer.places = None
        if layer.chosen is None:
            return Reading(prediction_macs=macs)
        after = every_token(inputs)[:, None, self.prompt_end :]
        after = after.expand(-1, layer.chosen.shape[1], -1)
        return Reading(torch.cat([layer.chosen, after], -1), prediction_macs=macs)

    def _choose(
        self, layer: _Layer, inputs: AttentionInputs, tokens: Int64[Tensor, " batch"]
    ) -> int:
        """Cut the prompt; returns the multiply-accumulates that it took."""
        assert layer.queries is not None
        assert layer.places is not None
        real = real_tokens(inputs)[:, : self.prompt_end]
        window = (layer.places >= 0).sum(-1)
        keep = kept_of(self._method.token_keep, tokens).maximum(window)
        if bool(((tokens <= keep) | (window == 0)).all()):
            return 0
        near = newest(real, window)
        before = real & ~near
        scores = layer.scores(self._method, inputs, real, before)
        scores = scores.masked_fill(~before[:, None], -torch.inf)
        # A crop may have left a sequence without any query that could choose.
        keep = torch.where(window == 0, tokens, keep)
        best = largest(scores, (keep - window)[:, None]) & before[:, None]
        layer.chosen = listed(best | near[:, None], None)
        batch, heads, queries, width = layer.queries.shape
        return batch * heads * queries * width * self.prompt_end

    def crop(self, length: int) -> None:
        """A cut into the prompt undoes the choice."""
        super().crop(length)
        for layer in self._layers:
            if self.prompt_tokens is None:
                layer.chosen = None
            if layer.places is not None:
                layer.places = layer.places.masked_fill(layer.places >= length, -1)

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Each sequence takes along what was chosen for it."""
        super().select(indices)
        for layer in self._layers:
            for name in ("queries", "places", "chosen"):
                if (held := getattr(layer, name)) is not None:
                    setattr(layer, name, held.index_select(0, indices))
