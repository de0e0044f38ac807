"""Sparsity that rises while a model is fine-tuned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparseloom.methods import Method


@dataclass(frozen=True, slots=True)
class SparsityRamp:
    """From `start` linearly to the method's own sparsity over the first `share` of the steps.

    Liu et al. do not say how sparsity is reached; this keeps the model near dense attention while
    predictor and model get used to each other.
    """

    start: float = 0.5
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < 1.0:
            raise ValueError(f"start of the ramp must be in [0, 1), got {self.start}")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share of the ramp must be in (0, 1], got {self.share}")

    def at(self, method: Method, step: int, steps: int) -> Method:
        """The method as it runs in step `step` of `steps`, with the same weights.

        Raises:
            ValueError: the method has no sparsity.
        """
        target = getattr(method, "sparsity", None)
        if target is None:
            raise ValueError(f"ramp must be none for {method.name}, which has no sparsity")
        done = step / (self.share * steps)
        if done >= 1.0 or self.start >= target:
            return method
        changes: dict[str, Any] = {"sparsity": self.start + (target - self.start) * done}
        return dataclasses.replace(method, **changes)  # pyright: ignore[reportArgumentType]
