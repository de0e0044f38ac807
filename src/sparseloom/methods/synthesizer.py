"""Synthesizer: attention scores that are learned, or made from each token alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sparseloom.methods.attender import NEVER, LayerWeights, WeightedAttender, grouped_value
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.learned import allowed_rows
from sparseloom.methods.settings import check_at_least, check_choice

Variant = Literal["random", "factorized_random", "dense", "factorized_dense"]
_VARIANTS = ("random", "factorized_random", "dense", "factorized_dense")


class SynthesizerLayer(nn.Module):
    """Weights of one layer, by name; which ones depends on the variant."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> None:
        super().__init__()
        self.matrices = nn.ParameterDict(
            {name: nn.Parameter(_xavier(shape, generator)) for name, shape in shapes.items()}
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.matrices[name]


@dataclass(frozen=True)
class Synthesizer(WeightedAttender):
    """Synthesizer (Tay et al., ICML 2021): softmax(S)V where S uses no products of tokens.

    The model's queries and keys are not used.  S has one row per position and is cut to the input.
    - `"random"` (section 3.2): S is a learned matrix of each head;
    - `"factorized_random"` (3.4): S = R₁R₂ᵀ with `rank` columns each;
    - `"dense"` (3.1): row i is W₂·relu(W₁·x_i), x_i the input of the attention module, W₁ to
      head_dim;
    - `"factorized_dense"` (3.3): W₂ gives a factor A_i of a entries and one B_i of b entries, and
      S_ij = A_i[j mod a]·B_i[⌊j / a⌋], a·b ≥ max_length and both near its root.
    The defaults are those of the Long Range Arena for text.  Drawn Xavier-uniform, without biases.

    Args:
        variant: one of the four.
        rank: columns of R₁ and R₂; the paper's own experiments use 8.
        weights: of every layer.
    """

    name: ClassVar[str] = "synthesizer"
    depends_on: ClassVar[tuple[str, ...]] = ("max_length", "heads", "head_dim", "hidden_size")

    variant: Variant = "factorized_random"
    rank: int = 32
    weights: LayerWeights | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, _VARIANTS)
        check_at_least("rank", self.rank, 1)

    def make_layer(self, sizes: Mapping[str, int], generator: torch.Generator) -> SynthesizerLayer:
        """Weights for inputs of up to `max_length` tokens."""
        n, heads, d, hidden = (
            sizes[name] for name in ("max_length", "heads", "head_dim", "hidden_size")
        )
        shapes: dict[str, tuple[int, ...]]
        if self.variant == "random":
            shapes = {"scores": (heads, n, n)}
        elif self.variant == "factorized_random":
            shapes = {"rows": (heads, n, self.rank), "columns": (heads, n, self.rank)}
        elif self.variant == "dense":
            shapes = {"first": (heads, hidden, d), "second": (heads, d, n)}
        else:
            a, b = factors(n)
            shapes = {"first": (heads, hidden, d), "a": (heads, d, a), "b": (heads, d, b)}
        return SynthesizerLayer(shapes, generator)

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """softmax(S)V with padding and, in causal calls, the future left out."""
        layer = self.layer_module(inputs)
        assert isinstance(layer, SynthesizerLayer)
        value = grouped_value(inputs)
        q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        most = self.sizes()["max_length"]
        if kv_len > most:
            raise ValueError(
                f"inputs must have at most {most} tokens, the length that synthesizer's weights "
                f"were made for, got {kv_len}"
            )
        scores = self._scores(layer, inputs).float()
        rows = torch.arange(q_len, device=value.device)
        scores = scores.masked_fill(~allowed_rows(inputs, rows), NEVER)
        weights = functional.dropout(scores.softmax(-1), dropout_p, training=dropout_p > 0)
        return weights.to(value.dtype) @ value

    def macs(self, shape: AttentionShape) -> int:
        """n²·d per head for the weighted sum; and n²·k for R₁R₂ᵀ, or n·D·d + n²·d, or
        n·D·d + n·d·(a + b), D the hidden size, a and b for inputs of this length."""
        n, m, d = shape.q_len, shape.kv_len, shape.head_dim
        made = {
            "random": 0,
            "factorized_random": n * m * self.rank,
            "dense": n * shape.hidden_size * d + n * d * m,
            "factorized_dense": n * shape.hidden_size * d + n * d * sum(factors(m)),
        }[self.variant]
        return shape.batch * shape.heads * (n * m * d + made)

    def _scores(self, layer: SynthesizerLayer, inputs: AttentionInputs) -> Tensor:
        """S of the call's queries, (batch or 1, heads, q_len, kv_len)."""
        q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        rows = slice(kv_len - q_len, kv_len)
        if self.variant == "random":
            return layer["scores"][None, :, rows, :kv_len]
        if self.variant == "factorized_random":
            columns = layer["columns"][:, :kv_len].transpose(-1, -2)
            return (layer["rows"][:, rows] @ columns)[None]
        if inputs.hidden_states is None:
            raise ValueError(
                f"hidden_states are missing: synthesizer:variant={self.variant} makes its scores "
                "from them"
            )
        inner = torch.relu(inputs.hidden_states[:, None] @ layer["first"].to(inputs.query.dtype))
        if self.variant == "dense":
            return inner @ layer["second"][..., :kv_len].to(inner.dtype)
        a, b = (inner @ layer[name].to(inner.dtype) for name in ("a", "b"))  # (B, H, L, a), (…, b)
        return (b[..., :, None] * a[..., None, :]).flatten(-2)[..., :kv_len]


def factors(length: int) -> tuple[int, int]:
    """(a, b) with a·b ≥ length, both near its root: a·b = length where it has such divisors."""
    root = math.isqrt(length - 1) + 1 if length > 1 else 1
    for a in range(root, root // 2, -1):
        if length % a == 0:
            return a, length // a
    return root, -(-length // root)


def _xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Xavier-uniform by the last two sizes."""
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
