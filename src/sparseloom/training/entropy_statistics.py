"""How spread out the attention of each head is, and how much it moves with the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseloom.integrations import sparsify
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Dense
from sparseloom.models.modes import frozen
from sparseloom.training.entropy import probabilities, row_entropy


@dataclass(frozen=True, slots=True)
class HeadEntropy:
    """One head, means over query rows and inputs.

    Attributes:
        layer, head: from 0.
        entropy: H / ln n of a row over its n allowed keys; 1 is uniform, 0 one key.
        mean_entropy: the same of p̄, the row's mean over inputs: what a static mask has to cover.
        effective_keys: exp(H).
        mutual: (H(p̄) - mean H) / ln n, mutual information between input and attended key: 0 where
            attention does not depend on the input.
        inputs: sequences seen.
    """

    layer: int
    head: int
    entropy: float
    mean_entropy: float
    effective_keys: float
    mutual: float
    inputs: int


class EntropyGauge:
    """Observer that sums up probabilities of every `every`-th query row.

    A row is a position: p̄ is the mean over the inputs in which that position is no padding.
    """

    def __init__(self, every: int = 4) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._every = every
        self._sums: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        """Take in a call."""
        del output
        rows = torch.arange(0, inputs.query.shape[2], self._every, device=inputs.query.device)
        p, allowed, alive = probabilities(inputs, rows, mask)
        weight = alive[:, None].to(p.dtype)  # (B, 1, R)
        keys = (allowed.sum(-1) * weight).sum(0)  # (1 or H, R)
        h = row_entropy(p)
        new = [
            (p * weight[..., None]).sum(0),  # (H, R, K)
            (h * weight).sum(0),  # (H, R)
            (h.exp() * weight).sum(0),
            keys.expand(len(p[0]), -1),
            weight.sum(0).expand(len(p[0]), -1),
        ]
        old = self._sums.get(inputs.layer)
        self._sums[inputs.layer] = new if old is None else [
            _grown(a, b) + _grown(b, a) for a, b in zip(old, new, strict=True)
        ]  # fmt: skip

    def result(self, inputs: int) -> list[HeadEntropy]:
        """What was seen in `inputs` sequences, layer by layer."""
        found: list[HeadEntropy] = []
        for layer, (p, h, effective, keys, count) in sorted(self._sums.items()):
            seen = count.clamp(min=1)
            log_n = (keys / seen).clamp(min=2).log()  # of the mean number of keys
            weight = count * (keys > count)  # rows with one key have nothing to choose

            def mean(values: Tensor, weight: Tensor = weight) -> list[float]:
                return ((values * weight).sum(-1) / weight.sum(-1).clamp(min=1)).tolist()

            own = h / seen / log_n
            both = row_entropy(p / seen[..., None]) / log_n
            columns = zip(
                mean(own), mean(both), mean(effective / seen), mean(both - own), strict=True
            )
            found += [HeadEntropy(layer, n, *values, inputs) for n, values in enumerate(columns)]
        return found


def entropy_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, every: int = 4
) -> list[HeadEntropy]:
    """Entropy of every head of a dense model over `batches`.

    Args:
        model: a supported Hugging Face model; unchanged.
        batches: keyword arguments of its forward; labels are ignored.
        every: every which query row is looked at.

    Raises:
        ValueError: no batches, or fewer than two sequences (p̄ would be the one row).
    """
    gauge, inputs = EntropyGauge(every), 0
    with torch.no_grad(), frozen(model), sparsify(model, Dense(), observer=gauge):
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
            inputs += len(batch["input_ids"])
    if inputs < 2:
        raise ValueError(f"batches must hold at least two sequences, got {inputs}")
    return gauge.result(inputs)


def _grown(x: Tensor, like: Tensor) -> Tensor:
    """Zeros behind `x` wherever `like` is longer."""
    pads: list[int] = []
    for size, other in zip(reversed(x.shape), reversed(like.shape), strict=True):
        pads += [0, max(0, other - size)]
    return functional.pad(x, pads)
