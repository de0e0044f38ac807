"""The predictor's loss on the attention calls of one forward pass, on sampled query rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Predicting
from sparseloom.training.losses import LOSSES

LossName = Literal["kl", "mse"]


class Collector:
    """Observer that keeps the inputs and the mask of each attention call of one forward pass."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[AttentionInputs, SparseMask | None]] = {}

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        """Keep both; by layer, because recomputation must not count twice."""
        del output
        self._calls[inputs.layer] = inputs, mask

    def take(self) -> list[AttentionInputs]:
        """The inputs since the last time, by layer.

        Raises:
            ValueError: there were none.
        """
        return [inputs for inputs, _ in self.take_masked()]

    def take_masked(self) -> list[tuple[AttentionInputs, SparseMask | None]]:
        """Inputs and masks since the last time, by layer; None where a call ran dense.

        Raises:
            ValueError: there were none.
        """
        calls, self._calls = [self._calls[layer] for layer in sorted(self._calls)], {}
        if not calls:
            raise ValueError("batches: the model ran no attention layer on the last batch")
        return calls


class RowSampler:
    """Draws the query rows that the predictor loss looks at; `count` None takes all."""

    def __init__(self, count: int | None, seed: int) -> None:
        self._count = count
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, q_len: int) -> Tensor:
        """Rows below `q_len`, ascending."""
        if self._count is None or self._count >= q_len:
            return torch.arange(q_len)
        return torch.randperm(q_len, generator=self.generator)[: self._count].sort().values


def predictor_loss(
    method: Predicting,
    calls: list[AttentionInputs],
    rows: RowSampler,
    loss: LossName,
    *,
    detach: bool,
) -> Tensor:
    """Mean over layers of the predictor loss on sampled query rows, in fp32.

    Raises:
        ValueError: the loss does not suit the method.
    """
    if loss not in method.losses:
        raise ValueError(
            f"loss must be one of {', '.join(map(repr, method.losses))} for {method.name}, "
            f"got {loss!r}"
        )
    total = torch.zeros((), device=calls[0].query.device)
    with torch.autocast(calls[0].query.device.type, enabled=False):
        for call in calls:
            chosen = rows.draw(call.query.shape[2]).to(call.query.device)
            total = total + LOSSES[loss](*method.compare(call, chosen, detach=detach))
    return total / len(calls)
