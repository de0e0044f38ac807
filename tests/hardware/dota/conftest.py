"""Small encoders with random masks for the cycle fidelity of DOTA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.dota import Dota
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    PredictorShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)


@dataclass
class Maker:
    """One encoder or decoder shape; random masks by seed."""

    layers: int = 1
    heads: int = 4
    head_dim: int = 16
    length: int = 48
    batch: int = 1
    is_causal: bool = False
    stage: Any = "prefill"
    kv_len: int | None = None

    @property
    def shape(self) -> ModelShape:
        """With a hidden size of heads · head_dim and a feed-forward of twice that."""
        hidden = self.heads * self.head_dim
        return ModelShape(
            layers=self.layers,
            hidden_size=hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            intermediate_size=2 * hidden,
            is_causal=self.is_causal,
        )

    def workload(self) -> Workload:
        """The operators of the whole model."""
        operators = transformer_operators(
            self.shape, q_len=self.length, kv_len=self.kv_len, batch=self.batch, stage=self.stage
        )
        return Workload(self.shape, operators, name="small")

    def keep(self, share: float, seed: int = 0) -> np.ndarray:
        """(batch, heads, q_len, kv_len) kept at random."""
        size = (self.batch, self.heads, self.length, self.kv_len or self.length)
        return np.random.default_rng(seed).random(size) < share

    def trace(
        self, share: float = 0.2, seed: int = 0, predictor: PredictorShape | None = None
    ) -> Trace:
        """With the selection "m" that keeps a share of the pairs at random."""
        calls = tuple(
            AttentionCall(
                MaskArrays.from_bool(self.keep(share, seed + i), is_causal=self.is_causal),
                predictor=predictor,
            )
            for i in range(self.layers)
        )
        return Trace(self.workload(), {"m": Selection("m", calls)})


@pytest.fixture
def make() -> type[Maker]:
    """The maker of small traces."""
    return Maker


def machine(**settings: Any) -> Dota:
    """DOTA with settings changed; sections end where a double underscore stands."""
    found = hardware.load(
        "dota_asplos_2022", **{key.replace("__", "."): value for key, value in settings.items()}
    )
    assert isinstance(found, Dota)
    return found


@pytest.fixture
def load() -> Any:
    """`machine`."""
    return machine
