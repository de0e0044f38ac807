"""Linear attention: scores are products of feature maps, so that sums over keys are shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparseloom.methods.attender import grouped_key, grouped_value, no_padding
from sparseloom.methods.base import Attender, AttentionInputs, AttentionShape
from sparseloom.methods.prefix import drop_keys, feature_attention


@dataclass(frozen=True)
class LinearAttention(Attender):
    """Linear Transformer (Katharopoulos et al., ICML 2020): φ(x) = elu(x) + 1.

    o_i = φ(q_i)·[Σ_j φ(k_j) v_jᵀ] / (φ(q_i)·Σ_j φ(k_j) + epsilon); in causal calls the sums run
    over earlier tokens.  Queries and keys are not scaled, as in the authors' code and in the Long
    Range Arena's.  Computed in fp32.  Attention dropout drops keys for all queries of a head at
    once.

    Args:
        epsilon: added to the normaliser; 1e-6 in both codes.
    """

    name: ClassVar[str] = "linear"

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be 0 or more, got {self.epsilon}")

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """Attention through the feature map."""
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        query, key = (functional.elu(x.to(wide)) + 1 for x in (inputs.query, grouped_key(inputs)))
        out = feature_attention(
            query,
            no_padding(inputs, key),
            drop_keys(grouped_value(inputs).to(wide), dropout_p),
            is_causal=inputs.is_causal,
            epsilon=self.epsilon,
        )
        return out.to(inputs.query.dtype)

    def macs(self, shape: AttentionShape) -> int:
        """2·n·d² per head: the sums of φ(k) vᵀ, and reading them."""
        rows = shape.kv_len + shape.q_len
        return shape.batch * shape.heads * rows * shape.head_dim**2
