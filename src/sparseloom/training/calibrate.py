"""Read the settings of a method off sample text: the model runs dense and nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from sparseloom.integrations import sparsify
from sparseloom.methods import (
    AttentionInputs,
    Calibrated,
    Dense,
    DynamicSparse,
    Method,
    calibrate_thresholds,
)
from sparseloom.models.modes import frozen
from sparseloom.training.loop import Batch
from sparseloom.training.predictor_loss import Collector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyMethod = TypeVar("AnyMethod", bound=Method)


def calibrate(model: PreTrainedModel, method: AnyMethod, batches: Iterable[Batch]) -> AnyMethod:
    """`method` with what it needs to know of `model`: thresholds of ELSA, or of its predictions.

    Args:
        model: a supported Hugging Face model; left unchanged, and run dense.
        method: its settings.
        batches: keyword arguments of the model's forward, each one used once; labels are ignored.

    Raises:
        ValueError: the method has nothing to calibrate, or there are no batches.
    """
    if not isinstance(method, (Calibrated, DynamicSparse)):
        raise ValueError(f"method must be one that is calibrated (elsa, dynamic), got {method}")

    def calls(seen: Collector) -> Iterator[AttentionInputs]:
        for batch in batches:
            model(**{k: v for k, v in batch.items() if k != "labels"})
            yield from seen.take()

    seen = Collector()
    with torch.no_grad(), frozen(model), sparsify(model, Dense(), observer=seen):
        if isinstance(method, DynamicSparse):
            return cast("AnyMethod", calibrate_thresholds(method, calls(seen)))
        return cast("AnyMethod", method.calibrate(calls(seen)))
