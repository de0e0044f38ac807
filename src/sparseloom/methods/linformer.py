"""Linformer: keys and values are projected along the sequence to a fixed number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sparseloom.methods.attender import (
    LayerWeights,
    WeightedAttender,
    grouped_key,
    grouped_value,
    no_padding,
    refuse_cache,
    refuse_causal,
)
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.settings import check_at_least


class LinformerLayer(nn.Module):
    """E and F of one layer, (max_length, rank) each; one matrix for both where they are shared."""

    def __init__(
        self, max_length: int, rank: int, *, shared: bool, generator: torch.Generator
    ) -> None:
        super().__init__()

        def drawn() -> nn.Parameter:
            matrix = torch.empty(max_length, rank)
            return nn.Parameter(nn.init.xavier_uniform_(matrix, generator=generator))

        self.key_projection = drawn()
        self.value_projection = None if shared else drawn()


@dataclass(frozen=True)
class Linformer(WeightedAttender):
    """Linformer (Wang et al., 2020, equation 7): softmax(Q (EᵀK)ᵀ · scale) FᵀV.

    E and F belong to a layer and are shared by its heads.  Shorter inputs use their first rows;
    padded keys and values count as zero rows.  Drawn Xavier-uniform, as in the authors' fairseq
    code and in the Long Range Arena.  Every query sees a mixture of all tokens, so there is no
    causal form.

    Args:
        rank: k, rows that keys and values are projected to; 256 is the paper's for 512 to 4,096
            tokens.
        share_kv: use E for F too ("key-value sharing" of the paper, and of the Long Range Arena).
        weights: E and F of every layer.
    """

    name: ClassVar[str] = "linformer"
    depends_on: ClassVar[tuple[str, ...]] = ("max_length",)

    rank: int = 256
    share_kv: bool = False
    weights: LayerWeights | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)

    def make_layer(self, sizes: Mapping[str, int], generator: torch.Generator) -> LinformerLayer:
        """E and F for inputs of up to `max_length` tokens."""
        return LinformerLayer(
            sizes["max_length"], self.rank, shared=self.share_kv, generator=generator
        )

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """Attention over the projected keys and values; dropout on its probabilities."""
        why = "its projections mix all tokens"
        refuse_causal(self.name, inputs, why)
        refuse_cache(self.name, inputs, why)
        layer = self.layer_module(inputs)
        assert isinstance(layer, LinformerLayer)
        length, most = inputs.key.shape[2], len(layer.key_projection)
        if length > most:
            raise ValueError(
                f"inputs must have at most {most} tokens, the length that linformer's projections "
                f"were made for, got {length}"
            )
        e = layer.key_projection
        f = e if layer.value_projection is None else layer.value_projection
        key = no_padding(inputs, grouped_key(inputs))
        value = no_padding(inputs, grouped_value(inputs))
        short_key = e[:length].to(key.dtype).T @ key  # (B, H, rank, D)
        short_value = f[:length].to(value.dtype).T @ value
        return functional.scaled_dot_product_attention(
            inputs.query, short_key, short_value, dropout_p=dropout_p, scale=inputs.scale
        )

    def macs(self, shape: AttentionShape) -> int:
        """4·n·k·d per head: both projections, the scores and the weighted sum."""
        rows = 2 * shape.kv_len + 2 * shape.q_len
        return shape.batch * shape.heads * rows * self.rank * shape.head_dim
