"""The lightning indexer of DeepSeek Sparse Attention: one small scorer for all heads of a layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast, get_args

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.coding import row_scale, to_codes
from sparseloom.methods.learned import (
    Comparison,
    MethodShape,
    Predicting,
    allowed_rows,
    in_float,
    layer_weights,
    load_weights,
    read_sizes,
    true_scores,
)
from sparseloom.methods.pooling import Pooling
from sparseloom.methods.rotary import Rotary, rotate, spread_frequencies
from sparseloom.methods.selection import Scores, keeps_all, topk_mask
from sparseloom.methods.settings import (
    check_at_least,
    check_block_size,
    check_choice,
    check_sparsity,
)
from sparseloom.methods.token_state import TokenState

_SIZES = ("layers", "hidden_size", "index_heads", "width", "rotary_columns", "bits")


@dataclass(frozen=True)
class LightningIndexer(Predicting):
    """The lightning indexer of DeepSeek-V3.2-Exp (report of 2025, §2.1; its inference code).

    Of the hidden states of a layer it makes a few small queries q_j and weights w_j per token, and
    one key k that they share; I = Σ_j w_j · ReLU(q_j·k) ranks the keys, and every query keeps the
    best, the same for all heads.  It learns from KL(heads' summed attention ‖ softmax I), cut off
    from the model: no gradient of its loss ever leaves it.

    Other than published: queries come from the hidden states, because there is no latent query;
    INT8 stands in for FP8; and the joint phase also compares over all keys, not the chosen ones.

    Args:
        sparsity: share of the allowed keys to drop per query, in [0, 1).
        block_size: (queries, keys) kept or dropped together.
        index_heads: queries per token (64 there).
        width: columns of queries and key, even (128 there).
        bits: 8, codes with a scale per query and per key, after a Hadamard rotation where the
            width is a power of two; or 32 for none.
        rotary_share: of the columns that are rotated in models with rotary positions, in [0, 1].
        minimum_keys: keys that a query keeps at least, if it may see as many.
        pooling: how pairs become one score per block (`pool_scores`).
        indexer: the trained weights.
    """

    name: ClassVar[str] = "indexer"
    needs_hidden_states: ClassVar[bool] = True
    owns_cache_state: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = ("kl",)

    sparsity: float = 0.9
    block_size: tuple[int, int] = (1, 1)
    index_heads: int = 4
    width: int = 32
    bits: int = 8
    rotary_share: float = 0.5
    minimum_keys: int = 16
    pooling: Pooling = "mass"
    indexer: Indexer | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_block_size(self.block_size)
        check_at_least("index_heads", self.index_heads, 1)
        check_at_least("width", self.width, 2)
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        check_choice("bits", self.bits, (8, 32))
        if not 0.0 <= self.rotary_share <= 1.0:
            raise ValueError(f"rotary_share must be in [0, 1], got {self.rotary_share}")
        check_at_least("minimum_keys", self.minimum_keys, 1)
        check_choice("pooling", self.pooling, get_args(Pooling))
        if self.indexer is None:
            return
        made = self.indexer.sizes()
        for name in ("index_heads", "width", "bits"):
            if made[name] != getattr(self, name):
                raise ValueError(
                    f"{name} must be {made[name]}, what the indexer was made with, "
                    f"got {getattr(self, name)}"
                )

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """One mask for all heads, from the hidden states; appends to `inputs.past`.

        Raises:
            ValueError: no weights, no hidden states, or keys in the cache that it has not seen.
        """
        return topk_mask(
            self.predicted_scores(inputs),
            sparsity=self.sparsity,
            minimum_keys=self.minimum_keys,
            block_size=self.block_size,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
            query_padding=inputs.query_padding,
            pooling=self.pooling,
        )

    @torch.no_grad()
    def predicted_scores(self, inputs: AttentionInputs) -> Scores:
        """I of the call's queries against all keys, one head, on demand; appends to the past."""
        found = self._encode(inputs)
        kv_len, seen = inputs.key.shape[2], found.key.shape[1]
        if seen != kv_len:
            raise ValueError(
                f"past must hold the indexer's keys of all earlier tokens: attention has {kv_len} "
                f"keys in layer {inputs.layer}, the indexer {seen}"
            )

        def rows(start: int, stop: int, keys: int) -> Tensor:
            return found.scores(slice(start, stop), keys)

        batch, q_len = found.query.shape[0], inputs.query.shape[2]
        return Scores(batch, 1, q_len, kv_len, found.key.device, rows)

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether the budget of a row that sees all keys leaves one out."""
        del q_len
        return not keeps_all(kv_len, self.sparsity, self.minimum_keys)

    def prediction_macs(self, shape: AttentionShape) -> int:
        """Multiply-accumulates: projections of the new tokens, then index_heads · (width + 1) for
        each pair that causality allows."""
        columns = self.index_heads * (self.width + 1) + self.width
        pairs = shape.allowed_pairs * self.index_heads * (self.width + 1)
        return shape.batch * (shape.q_len * shape.hidden_size * columns + pairs)

    def new_state(self, layer: int) -> TokenState:
        """Empty keys of one layer's cache."""
        del layer
        return TokenState()

    @torch.no_grad()
    def remember(self, inputs: AttentionInputs) -> None:
        """Append the call's keys to `inputs.past`, for calls that run dense."""
        if inputs.past is not None and self.indexer is not None:
            self._encode(inputs)

    # ------------------------------------------------------------------ weights

    @property
    def module(self) -> Indexer | None:
        """The weights of all layers."""
        return self.indexer

    def initialise(self, shape: MethodShape, *, seed: int = 0) -> LightningIndexer:
        """With fresh weights; rotary where the model is."""
        turned = 2 * round(self.width * self.rotary_share / 2) if shape.rotary else 0
        made = Indexer(
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            index_heads=self.index_heads,
            width=self.width,
            rotary_columns=turned,
            bits=self.bits,
            seed=seed,
        )
        return dataclasses.replace(self, indexer=made)

    def sizes(self) -> dict[str, int | bool]:
        """See `Indexer.sizes`."""
        if self.indexer is None:
            raise ValueError("LightningIndexer has no weights whose sizes could be asked for")
        return self.indexer.sizes()

    def restore(
        self, sizes: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> LightningIndexer:
        """With stored weights."""
        made = Indexer(**read_sizes(sizes, _SIZES))
        load_weights(made, state)
        return dataclasses.replace(self, indexer=made.eval())

    def predicted(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "batch 1 rows kv_len"]:
        """I of some query rows, with gradients into the indexer alone."""
        found = self._layer(inputs).encode(_hidden(inputs).detach(), inputs.rotary)
        return found.scores(rows, inputs.key.shape[2])

    def compare(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"], *, detach: bool
    ) -> Comparison:
        """The heads' mean attention, as logarithms, beside I; cut off from the model anyway."""
        del detach
        inputs = in_float(inputs, detach=True)
        allowed = allowed_rows(inputs, rows)
        with torch.no_grad():
            lowest = torch.finfo(torch.float32).min
            true = true_scores(inputs, rows).masked_fill(~allowed, lowest).softmax(-1)
            target = true.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).log()
        return Comparison(target, self.predicted(inputs, rows), allowed)

    def _encode(self, inputs: AttentionInputs) -> Found:
        """What selection needs of the call, with the keys of its past, which grows by it."""
        found = self._layer(inputs).encode(_hidden(inputs), inputs.rotary)
        past = _past(inputs)
        if past is None:
            return found
        key = found.key.to(torch.int8) if self.bits == 8 else found.key
        key, scale = past.append(key, found.key_scale)
        return found._replace(key=key, key_scale=scale)

    def _layer(self, inputs: AttentionInputs) -> LayerIndexer:
        layers = None if self.indexer is None else self.indexer.layers
        return layer_weights(layers, inputs.layer, "LightningIndexer")


class Found(NamedTuple):
    """Queries, weights and keys of some tokens: codes, or numbers at 32 bits, with what scales
    them.  The queries' scales are in their weights."""

    query: Float[Tensor, "batch index_heads q_len width"]
    weight: Float[Tensor, "batch index_heads q_len 1"]
    key: Shaped[Tensor, "batch kv_len width"]
    key_scale: Float[Tensor, "batch kv_len 1"]

    def scores(self, rows: slice | Tensor, keys: int) -> Float[Tensor, "batch 1 rows keys"]:
        """I of some queries and the first `keys` keys; products of codes are exact in fp32."""
        key = self.key[:, None, :keys].float().transpose(-1, -2)
        with torch.autocast(key.device.type, enabled=False):
            products = (self.query[:, :, rows] @ key).relu()
            summed = (products * self.weight[:, :, rows]).sum(1, keepdim=True)
            return summed * self.key_scale[:, :keys].transpose(-1, -2)[:, None]


class LayerIndexer(nn.Module):
    """The indexer of one layer; sizes as in `Indexer`."""

    def __init__(
        self, hidden_size: int, index_heads: int, width: int, rotary_columns: int, bits: int
    ) -> None:
        super().__init__()
        self.heads, self.width, self.turned, self.bits = index_heads, width, rotary_columns, bits
        self.w_q = nn.Linear(hidden_size, index_heads * width, bias=False)
        self.w_k = nn.Linear(hidden_size, width, bias=False)
        self.w_weight = nn.Linear(hidden_size, index_heads, bias=False)
        self.norm = nn.LayerNorm(width)

    def encode(
        self, hidden: Float[Tensor, "batch length hidden_size"], rotary: Rotary | None
    ) -> Found:
        """Queries, weights and keys of these tokens; differentiable, rounding straight through.

        Raises:
            ValueError: the positions of a rotary model are missing.
        """
        if self.turned and rotary is None:
            raise ValueError("rotary is missing: this indexer rotates q and k, pass cos and sin")
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            query = self.w_q(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            key = self.norm(self.w_k(hidden))
            weight = self.w_weight(hidden).transpose(1, 2)[..., None]
            weight = weight / math.sqrt(self.heads * self.width)
            if self.turned and rotary is not None:
                cos, sin = rotary
                chosen = spread_frequencies(cos, self.turned, cos.shape[-1])
                key = rotate(key, (cos, sin), chosen)
                query = rotate(query, (cos.unsqueeze(1), sin.unsqueeze(1)), chosen)
            if self.bits == 32:
                return Found(query, weight, key, key.new_ones(*key.shape[:-1], 1))
            query, key = _hadamard(query), _hadamard(key)
            q_scale, k_scale = row_scale(query, self.bits), row_scale(key, self.bits)
            query, key = to_codes(query, q_scale, self.bits), to_codes(key, k_scale, self.bits)
            return Found(query, weight * q_scale, key, k_scale)


class Indexer(nn.Module):
    """One `LayerIndexer` per layer of a model.

    Args:
        layers, hidden_size: of the model.
        index_heads, width: queries per token, and their columns.
        rotary_columns: the first columns, that are rotated; 0 in models without positions.
        bits: 8 or 32.
        seed: draws the weights.
    """

    layers: Sequence[LayerIndexer]

    def __init__(
        self,
        *,
        layers: int,
        hidden_size: int,
        index_heads: int,
        width: int,
        rotary_columns: int,
        bits: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._sizes = (layers, hidden_size, index_heads, width, rotary_columns, bits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = [LayerIndexer(*self._sizes[1:]) for _ in range(layers)]
        self.layers = cast("Sequence[LayerIndexer]", nn.ModuleList(made))

    def sizes(self) -> dict[str, int | bool]:
        """The sizes that an equal module is made with."""
        return dict(zip(_SIZES, self._sizes, strict=True))


def _hadamard(states: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
    """Rotated by the Hadamard matrix over √width, which spreads outliers over all columns and
    changes no product; as they are where the width is no power of two."""
    width = states.shape[-1]
    if width & (width - 1):
        return states
    matrix = torch.ones(1, 1, device=states.device)
    while len(matrix) < width:
        top = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)])
    return states @ (matrix / math.sqrt(width))


def _hidden(inputs: AttentionInputs) -> Tensor:
    if inputs.hidden_states is None:
        raise ValueError("hidden_states are missing: LightningIndexer predicts from them")
    return inputs.hidden_states


def _past(inputs: AttentionInputs) -> TokenState | None:
    if inputs.past is None or isinstance(inputs.past, TokenState):
        return inputs.past
    raise TypeError(f"past must be TokenState, got {type(inputs.past).__name__}")
