"""Performer: softmax attention estimated by positive orthogonal random features (FAVOR+)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparseloom.methods.attender import (
    NEVER,
    DrawCounter,
    LayerWeights,
    WeightedAttender,
    grouped_key,
    grouped_value,
    no_padding,
)
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.prefix import drop_keys, feature_attention
from sparseloom.methods.settings import check_at_least, check_choice

Kernel = Literal["softmax", "relu"]
_EPSILON = {"softmax": 1e-4, "relu": 1e-3}


class PerformerLayer(DrawCounter):
    """The random matrix W (m, head_dim) of one layer: a buffer, redrawn in training."""

    seed: Tensor
    features: Tensor

    def __init__(self, features: int, head_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(1 << 40, (), generator=generator))
        self.register_buffer("features", orthogonal_features(features, head_dim, generator))

    def current(self, redraw_every: int) -> Tensor:
        """W of this call; every `redraw_every`-th training call draws it anew first."""
        before = int(self.step)
        step = self.advance()
        if redraw_every and step != before and step % redraw_every == 0:
            generator = torch.Generator().manual_seed(int(self.seed) + step)
            rows, head_dim = self.features.shape
            fresh = orthogonal_features(rows, head_dim, generator)
            # A new tensor, not a new content: the graph of an earlier call may hold the old one.
            self.features = fresh.to(self.features)
        return self.features


@dataclass(frozen=True)
class Performer(WeightedAttender):
    """Performer (Choromanski et al., ICLR 2021), FAVOR+: o = φ(q)·[Σ φ(k) vᵀ] / φ(q)·Σ φ(k).

    With the softmax kernel (lemma 1) φ(x) = exp(Wx̂ - |x̂|²/2 - c) + ε, x̂ = x·√scale, so that
    E[φ(q)·φ(k)] = exp(q·k·scale).  The stabiliser c is the row's largest Wx̂ for queries and the
    largest of all keys for keys, as in the authors' code; in causal calls it is the largest of the
    keys seen so far, so that nothing comes from the future.  With the ReLU kernel
    φ(x) = max(Wx, 0) + ε ("generalised attention").  Rows of W are orthogonal in blocks of head_dim
    and as long as Gaussian vectors are.  Computed in fp32.  There is no attention matrix to drop
    entries of: attention dropout drops keys for all queries of a head at once.

    Args:
        features: m, rows of W; none is ⌊head_dim · ln head_dim⌋, the number the theory asks for;
            0 uses x itself in the ReLU kernel, the form that ran in the Long Range Arena.
        kernel: `"softmax"` or `"relu"`.
        epsilon: ε; none is 1e-4 for softmax and 1e-3 for ReLU.
        redraw_every: training calls of a layer after which W is drawn anew; 0 never.  In evaluation
            W stays.
        weights: W of every layer.
    """

    name: ClassVar[str] = "performer"
    depends_on: ClassVar[tuple[str, ...]] = ("head_dim",)

    features: int | None = None
    kernel: Kernel = "softmax"
    epsilon: float | None = None
    redraw_every: int = 1000
    weights: LayerWeights | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, _EPSILON)
        check_at_least("redraw_every", self.redraw_every, 0)
        if self.features is not None:
            check_at_least("features", self.features, 1 if self.kernel == "softmax" else 0)
        if self.epsilon is not None and self.epsilon < 0:
            raise ValueError(f"epsilon must be 0 or more, got {self.epsilon}")

    def width(self, head_dim: int) -> int:
        """Entries of φ."""
        if self.features is None:
            return max(1, int(head_dim * math.log(head_dim)))
        return self.features or head_dim

    def make_layer(self, sizes: Mapping[str, int], generator: torch.Generator) -> PerformerLayer:
        """W of one layer."""
        return PerformerLayer(self.width(sizes["head_dim"]), sizes["head_dim"], generator)

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """Attention through the features; causal by sums over the earlier tokens."""
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        query, key = inputs.query.to(wide), grouped_key(inputs).to(wide)
        value = drop_keys(grouped_value(inputs).to(wide), dropout_p)
        layer = self.layer_module(inputs)
        assert isinstance(layer, PerformerLayer)
        w = layer.current(self.redraw_every).to(wide)
        if self.kernel == "relu":
            q, k = (self._relu(x, w) for x in (query, key))
        else:
            root = math.sqrt(inputs.scale)
            q, k = self._softmax(query * root, key * root, w, inputs)
        out = feature_attention(q, no_padding(inputs, k), value, is_causal=inputs.is_causal)
        return out.to(inputs.query.dtype)

    def macs(self, shape: AttentionShape) -> int:
        """4·n·m·d per head: both features, the sums of φ(k) vᵀ, and reading them.

        The normaliser (n·m) is left out, as the softmax's sums are for dense attention.  Without a
        random matrix (`features=0`) the two first parts fall away.
        """
        m = self.width(shape.head_dim)
        parts = 1 if self.features == 0 else 2
        rows = parts * (shape.kv_len + shape.q_len)
        return shape.batch * shape.heads * rows * m * shape.head_dim

    @property
    def _epsilon(self) -> float:
        return _EPSILON[self.kernel] if self.epsilon is None else self.epsilon

    def _relu(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x if self.features == 0 else x @ w.T) + self._epsilon

    def _softmax(
        self, query: Tensor, key: Tensor, w: Tensor, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """φ of queries and keys, the factor m^-½ left out: it cancels."""
        q, k = query @ w.T, key @ w.T
        half_q, half_k = (x.square().sum(-1, keepdim=True) / 2 for x in (query, key))
        phi_q = (q - half_q - q.amax(-1, keepdim=True).detach()).exp() + self._epsilon
        real = k.detach()
        if inputs.key_padding is not None:
            real = real.masked_fill(~inputs.key_padding[:, None, :, None], NEVER)
        largest = real.amax((-1, -2), keepdim=True)
        phi_k = (k - half_k - largest).exp()
        if not inputs.is_causal:
            return phi_q, phi_k + self._epsilon
        # What the definition gives on each prefix: with M_i the largest of keys 0..i and M of all,
        # exp(· - M_i) + ε is proportional to exp(· - M) + ε·exp(M_i - M).  The last term does not
        # depend on the feature, so that one further feature carries it.
        seen = real.amax(-1).cummax(-1).values[:, :, -query.shape[2] :, None]  # M_i
        rest = phi_q.sum(-1, keepdim=True) * self._epsilon * (seen - largest).exp()
        return torch.cat([phi_q, rest], -1), functional.pad(phi_k, (0, 1), value=1.0)


def orthogonal_features(rows: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """W (rows, head_dim): each row Gaussian, the rows of a block of head_dim orthogonal.

    Choromanski et al., section 3.2: blocks from QR decompositions of Gaussian matrices, row lengths
    redrawn from the χ distribution.
    """
    blocks: list[Tensor] = []
    for _ in range(-(-rows // head_dim)):
        square = torch.randn(head_dim, head_dim, generator=generator)
        q, r = torch.linalg.qr(square)
        blocks.append((q * r.diagonal().sign()).T)  # without the sign Q is not uniform
    lengths = torch.randn(rows, head_dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:rows] * lengths
