"""The low-rank, low-precision path that predicts attention scores (Liu et al., IEEE TC 2022).

Equation 5: Q̃ = X·P·W̃_Q and K̃ = X·P·W̃_K, with P a fixed sparse random projection (d × k, shared
by both) and W̃ trained (k × k).  Q̃ and K̃ are cut into heads of `width` columns, k = heads · width;
the predicted score is S̃ = q̃·k̃ / √width, in units of the true q·k·scale.  Where the model has
rotary positions, q̃ and k̃ are rotated at the same positions before scoring.

There are three quantisers: X with one scale, P·W̃ with one per column (multiplied out and
quantised once, then kept until the weights change), and q̃ with one per row, k̃ with one per head.
A per-row scale of q̃ cancels in the ranking of a row; a per-key one of k̃ would not.  The scales of
X and k̃ are constants learned beside the weights (moving averages over the training batches), so
tokens that arrive one by one get the codes that they would get all at once.

Scores of integer codes are exact in fp32 while qmax² · width < 2²⁴ (INT8: width ≤ 1040), so they
do not depend on the order of summation, and equal scores are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparseloom.methods.coding import BITS, Coded, column_scale, fixed_scale, row_scale, to_codes
from sparseloom.methods.learned import load_weights, read_sizes
from sparseloom.methods.predictor_keys import PredictorKeys
from sparseloom.methods.rotary import rotate, spread_frequencies
from sparseloom.methods.scores import Scores
from sparseloom.methods.settings import check_at_least, check_choice

__all__ = ["BITS", "Coded", "LayerPredictor", "Predictor", "PredictorKeys", "predictor_width"]

_MEMORY = 0.99  # of the moving averages of the scales


class LayerPredictor(nn.Module):
    """The predictor of one layer; it sees the input of the attention module.

    Args:
        hidden_size, heads, head_dim: of the model; `heads` are its query heads.
        width: columns per head; even in a rotary predictor.
        bits: 2, 4, 8 or 32.
        rotary: rotate q̃ and k̃ at the positions of their tokens.
        twos_complement: codes from -2^(bits-1), at 2 bits {-2, -1, 0, 1}; else symmetric ones.
        seed: draws P and the first W̃.
    """

    signs: Tensor  # int8 (hidden_size, k): P without its factor
    input_scale: Tensor  # () of X
    key_scale: Tensor  # (heads,) of k̃
    updates: Tensor  # int64 (): training batches that the two scales have seen

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        head_dim: int,
        width: int,
        bits: int = 4,
        rotary: bool = False,
        twos_complement: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "heads": heads, "head_dim": head_dim, "width": width}
        for name, size in sizes.items():
            check_at_least(name, size, 1)
        check_choice("bits", bits, BITS)
        if rotary and width % 2:
            raise ValueError(f"width must be even in a rotary predictor, got {width}")
        self.hidden_size, self.heads, self.head_dim, self.width = sizes.values()
        self.bits, self.rotary, self.twos_complement = bits, rotary, twos_complement
        k = heads * width
        generator = torch.Generator().manual_seed(seed)
        # Achlioptas: +1, 0, -1 with probabilities 1/6, 2/3, 1/6 and factor √(3/k) keep lengths.
        draw = torch.randint(0, 6, (hidden_size, k), generator=generator)
        self.register_buffer("signs", (draw == 0).to(torch.int8) - (draw == 1).to(torch.int8))
        self.w_q = nn.Parameter(torch.randn(k, k, generator=generator) / math.sqrt(k))
        self.w_k = nn.Parameter(torch.randn(k, k, generator=generator) / math.sqrt(k))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("key_scale", torch.ones(heads))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._kept: tuple[tuple[object, ...], Coded] | None = None
        self.packed: tuple[Coded, Any] | None = None  # what `compiled.py` made of `_fused`

    # ------------------------------------------------------------------ use

    @property
    def projection(self) -> Float[Tensor, "hidden_size k"]:
        """P of equation 5: √(3/k)·{-1, 0, +1}."""
        return self.signs.float() * math.sqrt(3 / (self.heads * self.width))

    def project(
        self,
        hidden: Float[Tensor, "batch q_len hidden_size"],
        rotary: tuple[Tensor, Tensor] | None = None,
        key_padding: Bool[Tensor, "batch q_len"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads q_len width"], Float[Tensor, "batch heads q_len width"]]:
        """q̃ and k̃ after quantisation, such that q̃·k̃ᵀ is in units of q·k·scale; differentiable.

        Rounding passes gradients straight through; scales are constants.  In training mode the
        scales come from this batch and enter the moving averages.

        Args:
            hidden: input of the attention module.
            rotary: the model's cos and sin at these positions, (batch or 1, q_len, rotary_dim),
                half-split layout; required by a rotary predictor, ignored by others.
            key_padding: True = a real token; padding has no influence on scales.
        """
        q, k = self.encode(hidden, rotary, key_padding)
        return q.values, k.values

    def scores(
        self,
        hidden: Float[Tensor, "batch q_len hidden_size"],
        rotary: tuple[Tensor, Tensor] | None = None,
        key_padding: Bool[Tensor, "batch q_len"] | None = None,
    ) -> Float[Tensor, "batch heads q_len q_len"]:
        """Predicted scores S̃ of all pairs in units of q·k·scale; differentiable as `project`.

        Nothing is masked: padded and future keys have scores too.  Exactly what selection sees.
        """
        q, k = self.encode(hidden, rotary, key_padding)
        return (q.codes @ k.codes.transpose(-1, -2)) * (q.scale * k.scale)

    def forward(
        self,
        hidden: Float[Tensor, "batch q_len hidden_size"],
        rotary: tuple[Tensor, Tensor] | None = None,
        key_padding: Bool[Tensor, "batch q_len"] | None = None,
    ) -> Float[Tensor, "batch heads q_len q_len"]:
        """See `scores`."""
        return self.scores(hidden, rotary, key_padding)

    def encode(
        self,
        hidden: Float[Tensor, "batch q_len hidden_size"],
        rotary: tuple[Tensor, Tensor] | None = None,
        key_padding: Bool[Tensor, "batch q_len"] | None = None,
        key_scale: Float[Tensor, "1 heads 1 1"] | None = None,
    ) -> tuple[Coded, Coded]:
        """Codes and scales of q̃ and k̃, both (batch, heads, q_len, width) in fp32.

        S̃ = codes·codesᵀ times both scales: that of q̃ is per row and holds the 1/√width, that of
        k̃ is per head (`key_scale` where the caller already stores keys under one).
        """
        if self.rotary and rotary is None:
            raise ValueError("rotary is missing: this predictor rotates q̃ and k̃, pass cos and sin")
        with torch.autocast(hidden.device.type, enabled=False):
            fused = self._fused()
            learn = self.training and torch.is_grad_enabled()
            real = None if key_padding is None else key_padding.to(hidden.device)
            if self.bits == 32:
                low = hidden.float() @ fused.codes
            else:
                scale = self._input_scale(hidden, real, learn)
                codes = self._codes(hidden.float(), scale)
                low = (codes @ fused.codes) * (scale * fused.scale)
            q, k = low.unflatten(-1, (2, self.heads, self.width)).permute(2, 0, 3, 1, 4)
            if self.rotary and rotary is not None:
                chosen = self.frequencies(rotary[0])
                angles = rotary[0].unsqueeze(1), rotary[1].unsqueeze(1)  # (B or 1, 1, L, pairs)
                q, k = rotate(q, angles, chosen), rotate(k, angles, chosen)
            unit = 1 / math.sqrt(self.width)
            if self.bits == 32:
                return Coded(q, q.new_tensor(unit)), Coded(k, k.new_ones(()))
            q_scale = row_scale(q, *self._format)
            k_scale = self._key_scale(k, real, learn) if key_scale is None else key_scale
            if learn:
                self.updates += 1
            return (
                Coded(self._codes(q, q_scale), q_scale * unit),
                Coded(self._codes(k, k_scale), k_scale),
            )

    def score_rows(self, q: Coded, k: Coded) -> Scores:
        """S̃ of queries against all keys (those of the cache included), row by row on demand."""
        batch, heads, q_len, _ = q.codes.shape
        left, right = q.codes.float(), k.codes.float().transpose(-1, -2)
        scale = (q.scale * k.scale).expand(batch, heads, q_len, 1)

        def rows(start: int, stop: int, keys: int) -> Tensor:
            with torch.autocast(left.device.type, enabled=False):
                scores = left[:, :, start:stop] @ right[..., :keys]
            return scores.mul_(scale[:, :, start:stop])

        return Scores(batch, heads, q_len, k.codes.shape[2], left.device, rows)

    # ------------------------------------------------------------------ parts

    def _fused(self) -> Coded:
        """P·[W̃_Q, W̃_K] (hidden_size, 2k), quantised; kept while the weights stay as they are."""
        if torch.is_grad_enabled() and (self.w_q.requires_grad or self.w_k.requires_grad):
            return self._multiply()
        if any(weight.is_inference() for weight in (self.w_q, self.w_k)):
            return self._multiply()  # such tensors do not count their changes
        weights = (self.w_q, self.w_k, self.signs)
        state = tuple((weight._version, weight.data_ptr()) for weight in weights)
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, self._multiply())
        return self._kept[1]

    def _multiply(self) -> Coded:
        both = self.projection @ torch.cat([self.w_q, self.w_k], 1).float()
        if self.bits == 32:
            return Coded(both, both.new_ones(()))
        scale = column_scale(both, *self._format)
        return Coded(self._codes(both, scale), scale)

    @property
    def _format(self) -> tuple[int, bool]:
        return self.bits, self.twos_complement

    def _codes(self, value: Tensor, scale: Tensor) -> Tensor:
        return to_codes(value, scale, *self._format)

    def _input_scale(self, hidden: Tensor, real: Tensor | None, learn: bool) -> Tensor:
        if not learn and int(self.updates):
            return self.input_scale
        tokens = hidden.flatten(0, 1) if real is None else hidden[real]  # (n, d)
        scale = fixed_scale(tokens[:, None], *self._format).reshape(())
        if learn:
            self._remember(self.input_scale, scale)
        return scale

    def _key_scale(self, k: Tensor, real: Tensor | None, learn: bool) -> Tensor:
        if not learn and int(self.updates):
            return self.key_scale.view(1, -1, 1, 1)
        tokens = k.transpose(1, 2)  # (B, L, H, width)
        tokens = tokens.flatten(0, 1) if real is None else tokens[real]  # (n, H, width)
        scale = fixed_scale(tokens, *self._format)
        if learn:
            self._remember(self.key_scale, scale)
        return scale.view(1, -1, 1, 1)

    @torch.no_grad()
    def _remember(self, average: Tensor, scale: Tensor) -> None:
        average.lerp_(scale, 1.0 - _MEMORY if int(self.updates) else 1.0)

    def frequencies(self, cos: Tensor) -> Tensor:
        """Which of the model's frequencies turn the predictor's pairs of columns, in order."""
        return spread_frequencies(cos, self.width, self.head_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> LayerPredictor:
        self._kept = self.packed = None  # weights move without counting it as a change
        return super()._apply(fn, recurse)


class Predictor(nn.Module):
    """One `LayerPredictor` per layer of a model."""

    layers: Sequence[LayerPredictor]

    def __init__(self, layers: Sequence[LayerPredictor]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must hold at least one LayerPredictor, got none")
        self.layers = cast("Sequence[LayerPredictor]", nn.ModuleList(layers))

    @classmethod
    def for_shape(
        cls,
        *,
        layers: int,
        hidden_size: int,
        heads: int,
        head_dim: int,
        projection: float = 0.25,
        bits: int = 4,
        rotary: bool = False,
        twos_complement: bool = False,
        seed: int = 0,
    ) -> Predictor:
        """An untrained predictor for such a model; `projection` is σ = width / head_dim."""
        check_at_least("layers", layers, 1)
        width = predictor_width(head_dim, projection, rotary=rotary)
        return cls._make(
            layers,
            seed,
            hidden_size=hidden_size,
            heads=heads,
            head_dim=head_dim,
            width=width,
            bits=bits,
            rotary=rotary,
            twos_complement=twos_complement,
        )

    @property
    def bits(self) -> int:
        """Width of the codes; 32 is no quantisation."""
        return self.layers[0].bits

    @property
    def width(self) -> int:
        """Columns per head."""
        return self.layers[0].width

    @property
    def rotary(self) -> bool:
        """Whether q̃ and k̃ are rotated."""
        return self.layers[0].rotary

    def shape(self) -> dict[str, int | bool]:
        """The sizes that `from_state` needs to build the same predictor."""
        first = self.layers[0]
        return {
            "layers": len(self.layers),
            "hidden_size": first.hidden_size,
            "heads": first.heads,
            "head_dim": first.head_dim,
            "width": first.width,
            "bits": first.bits,
            "rotary": first.rotary,
            "twos_complement": first.twos_complement,
        }

    @classmethod
    def from_state(
        cls, shape: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> Predictor:
        """A trained predictor from its `shape()` (numbers or their text) and `state_dict()`.

        Raises:
            ValueError: a size is missing or no number, or the weights do not fit the sizes.
        """
        shape = {"twos_complement": False, **shape}  # older files do not say
        names = ("layers", "hidden_size", "heads", "head_dim", "width", "bits")
        sizes = read_sizes(shape, names, ("rotary", "twos_complement"))
        predictor = cls._make(sizes.pop("layers"), 0, **sizes)
        load_weights(predictor, state)
        return predictor.eval()

    @classmethod
    def _make(cls, layers: int, seed: int, **sizes: Any) -> Predictor:
        return cls([LayerPredictor(seed=seed * 10_007 + n, **sizes) for n in range(layers)])


def predictor_width(head_dim: int, projection: float, *, rotary: bool) -> int:
    """Columns per head, round(σ · head_dim), at least 1; the next even number if rotary."""
    if not 0.0 < projection <= 1.0:
        raise ValueError(f"projection must be in (0, 1], got {projection}")
    width = max(1, round(projection * head_dim))
    return width + width % 2 if rotary else width
