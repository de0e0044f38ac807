"""Dynamic Sparse Attention: a trained low-precision predictor chooses the pairs to compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparseloom.kernels import prediction
from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, AttentionShape, Work
from sparseloom.methods.coding import BITS, Coded
from sparseloom.methods.compiled import encode_to_codes, threshold_of_codes, topk_of_codes
from sparseloom.methods.learned import MethodShape, Predicting, layer_weights
from sparseloom.methods.pooling import POOLINGS, Pooling
from sparseloom.methods.predictor import LayerPredictor, Predictor, PredictorKeys, predictor_width
from sparseloom.methods.selection import (
    Scores,
    keeps_all,
    kept_blocks,
    threshold_mask,
    topk_mask,
)
from sparseloom.methods.settings import (
    check_at_least,
    check_block_size,
    check_choice,
    check_sparsity,
)

Selection = Literal["topk", "threshold", "balanced"]
MaskHeads = Literal["query", "kv", "one"]


@dataclass(frozen=True)
class DynamicSparse(Predicting):
    """Dynamic Sparse Attention (Liu et al., IEEE TC 2022; the algorithm of DOTA, ASPLOS 2022).

    Per layer, the input X of the attention module gives low-rank, low-precision queries and keys
    (equation 5, `LayerPredictor`); their products predict the scores, and only the pairs with the
    best predictions are computed.  The predictor is trained by `sl.adapt`; one predictor runs at
    any sparsity, block size and selection: `dataclasses.replace(method, sparsity=0.8)` keeps it.

    Args:
        sparsity: share of the allowed keys to drop per query, in [0, 1).
        block_size: (queries, keys) kept or dropped together: (1, 1) fine-grained, (8, 1) column
            vectors, (64, 64) blocks.
        projection: σ, width of the predictor over head_dim, in (0, 1].
        bits: 2, 4, 8, or 32 for none; of X, P·W̃, q̃ and k̃ alike.
        selection: `"topk"`, the same number of keys in every row (`topk_mask` has the budget rule);
            `"threshold"`, every key whose predicted score reaches that of its layer and head; or
            `"balanced"`, the budget of top-k filled as a detector does that compares keys with a
            threshold as they stream by: those that reach it in their order, then the best others.
        thresholds: per layer and head, in units of q·k·scale, from `sl.calibrate`.
        thresholds_at: the sparsity that they were taken at: they fit no other one.
        pooling: how pairs become one score per block (`pool_scores`).
        mask_heads: `"query"`, every head has a mask of its own; `"kv"`, the heads that share keys
            and values share one; `"one"` for all heads of a layer.  Shared masks are chosen by
            the heads' pooled scores: their summed probabilities where `pooling` is `"mass"`.
        tile: local top-k: the budget is split over tiles of so many keys, each of which is
            searched alone; a multiple of the block's keys.  None: one search over the row.
        minimum_keys: keys that a query keeps at least, if it may see as many.
        rotary: rotate q̃ and k̃ in models with rotary positions; False is equation 5 as printed,
            which fails on such models.  Settled when a predictor is made.
        twos_complement: codes from -2^(bits-1), at 2 bits {-2, -1, 0, 1}, instead of symmetric
            ones.  Settled when a predictor is made.
        predictor: the trained weights.
    """

    name: ClassVar[str] = "dynamic"
    needs_hidden_states: ClassVar[bool] = True
    owns_cache_state: ClassVar[bool] = True

    sparsity: float = 0.9
    block_size: tuple[int, int] = (1, 1)
    projection: float = 0.25
    bits: int = 4
    selection: Selection = "topk"
    thresholds: tuple[tuple[float, ...], ...] | None = None
    thresholds_at: float | None = None
    pooling: Pooling = "mass"
    mask_heads: MaskHeads = "query"
    tile: int | None = None
    minimum_keys: int = 16
    rotary: bool = True
    twos_complement: bool = False
    predictor: Predictor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_block_size(self.block_size)
        check_choice("bits", self.bits, BITS)
        check_choice("selection", self.selection, get_args(Selection))
        check_choice("mask_heads", self.mask_heads, get_args(MaskHeads))
        self._check_tile()
        if self.twos_complement and self.bits == 32:
            raise ValueError("twos_complement must be false at 32 bits, where nothing is coded")
        check_choice("pooling", self.pooling, POOLINGS)
        check_at_least("minimum_keys", self.minimum_keys, 1)
        width = predictor_width(64, self.projection, rotary=False)  # refuses what is out of range
        if self.predictor is None:
            return
        shape = self.predictor.layers[0]
        for name in ("bits", "twos_complement"):
            made, given = getattr(shape, name), getattr(self, name)
            if made != given:
                raise ValueError(
                    f"{name} must be {made}, what the predictor was made with, got {given}"
                )
        width = predictor_width(shape.head_dim, self.projection, rotary=shape.rotary)
        if width != shape.width:
            raise ValueError(
                f"projection must give the predictor's width of {shape.width} for head_dim "
                f"{shape.head_dim}, got {self.projection} (width {width})"
            )
        if self.thresholds is not None:
            sizes = {len(heads) for heads in self.thresholds}
            if len(self.thresholds) != len(self.predictor.layers) or sizes != {shape.heads}:
                raise ValueError(
                    f"thresholds must hold {len(self.predictor.layers)} layers of {shape.heads} "
                    f"heads, got {len(self.thresholds)} layers of {sorted(sizes)}"
                )

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The mask of the query heads from the hidden states; queries and keys are not looked at.

        With `inputs.past` the call's keys are appended to it.

        Raises:
            ValueError: no predictor, no hidden states, no thresholds of this sparsity where they
                are needed, or keys in the cache of which the predictor knows nothing.
        """
        layer = self._layer(inputs)
        q, keys = self._codes(layer, inputs)
        device = q.codes.device
        unsupported = prediction.unsupported(self.bits, layer.width, device)
        if unsupported is not None or not self._is_compiled(device.type):
            return self.mask_from_scores(layer.score_rows(q, keys), inputs)
        if self.selection == "threshold":
            return threshold_of_codes(
                q,
                keys,
                self._thresholds(inputs.layer),
                block_size=self.block_size,
                is_causal=inputs.is_causal,
                key_padding=inputs.key_padding,
                bits=self.bits,
            )
        return topk_of_codes(
            q,
            keys,
            sparsity=self.sparsity,
            minimum_keys=self.minimum_keys,
            block_size=self.block_size,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
            query_padding=inputs.query_padding,
            pooling=self.pooling,
            bits=self.bits,
            tile=self.tile,
        )

    def predicted_scores(self, inputs: AttentionInputs) -> Scores:
        """S̃ of the call's queries against all keys, on demand; appends to `inputs.past`."""
        layer = self._layer(inputs)
        return layer.score_rows(*self._codes(layer, inputs))

    def mask_from_scores(
        self, scores: Scores | Float[Tensor, "batch heads q_len kv_len"], inputs: AttentionInputs
    ) -> SparseMask:
        """Selection alone, from scores that are there already, as in training."""
        heads = {"query": inputs.query.shape[1], "kv": inputs.key.shape[1], "one": 1}
        if self.selection == "threshold":
            return threshold_mask(
                scores,
                self._thresholds(inputs.layer),
                block_size=self.block_size,
                is_causal=inputs.is_causal,
                key_padding=inputs.key_padding,
                mask_heads=heads[self.mask_heads],
            )
        return topk_mask(
            scores,
            sparsity=self.sparsity,
            minimum_keys=self.minimum_keys,
            block_size=self.block_size,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
            query_padding=inputs.query_padding,
            pooling=self.pooling,
            mask_heads=heads[self.mask_heads],
            tile=self.tile,
            caps=self._thresholds(inputs.layer) if self.selection == "balanced" else None,
        )

    @property
    def needs_thresholds(self) -> bool:
        """Whether the method cannot run before `calibrate_thresholds`."""
        return self.selection != "topk" and self.thresholds is None

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether the budget of a row that sees all keys leaves one out.

        So sparsity 0 runs dense, and inputs of at most `minimum_keys` keys.
        """
        del q_len
        return not keeps_all(kv_len, self.sparsity, self.minimum_keys)

    def work(self, shape: AttentionShape) -> Work | None:
        """The budget of `topk_mask` and the predictor; by thresholds, what they were made for.

        None without a predictor, so that selecting says what is missing.
        """
        if self.predictor is None:
            return None
        kept = kept_blocks(
            shape.q_len,
            shape.kv_len,
            self.block_size,
            is_causal=shape.is_causal,
            sparsity=self.sparsity,
            minimum_keys=self.minimum_keys,
        )
        width = self.predictor.width
        return Work(self.block_size, kept, width, self.bits, self._is_compiled("cpu"))

    def prediction_macs(self, shape: AttentionShape) -> int:
        """Multiply-accumulates at `bits` width: q_len·d·2k of X·P·W̃ for the new tokens, and width
        for each pair that causality allows, per head (k = heads · width).

        The row chunks on a CPU compute a few pairs more, where a chunk meets the diagonal.
        """
        if self.predictor is None:
            width = predictor_width(shape.head_dim, self.projection, rotary=False)
        else:
            width = self.predictor.width
        k = shape.heads * width
        projection = shape.q_len * shape.hidden_size * 2 * k
        return shape.batch * (projection + shape.allowed_pairs * k)

    def new_state(self, layer: int) -> PredictorKeys:
        """Empty predictor keys for one layer's cache."""
        del layer
        return PredictorKeys(self.bits)

    def remember(self, inputs: AttentionInputs) -> None:
        """Append the call's predictor keys to `inputs.past`, for calls that run dense."""
        past = _past(inputs)
        if past is None or self.predictor is None:  # at sparsity 0 none is needed
            return
        with torch.no_grad():
            past.append(self._encode(self._layer(inputs), inputs)[1])

    # ------------------------------------------------------------------ weights

    @property
    def module(self) -> Predictor | None:
        """The predictor."""
        return self.predictor

    def initialise(self, shape: MethodShape, *, seed: int = 0) -> DynamicSparse:
        """With a predictor of σ = `projection`, rotary where the model and `rotary` are."""
        predictor = Predictor.for_shape(
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            head_dim=shape.head_dim,
            projection=self.projection,
            bits=self.bits,
            rotary=self.rotary and shape.rotary,
            twos_complement=self.twos_complement,
            seed=seed,
        )
        return dataclasses.replace(self, predictor=predictor)

    def sizes(self) -> dict[str, int | bool]:
        """See `Predictor.shape`."""
        if self.predictor is None:
            raise ValueError("DynamicSparse has no predictor whose sizes could be asked for")
        return self.predictor.shape()

    def restore(
        self, sizes: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> DynamicSparse:
        """See `Predictor.from_state`."""
        return dataclasses.replace(self, predictor=Predictor.from_state(sizes, state))

    def predicted(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows kv_len"]:
        """S̃ of equation 5, with gradients."""
        hidden = inputs.hidden_states
        if hidden is None:
            raise ValueError("hidden_states are missing: DynamicSparse predicts from them")
        layer = self._layer(inputs)
        low_q, low_k = layer.project(hidden, inputs.rotary, inputs.query_padding)
        return low_q[:, :, rows] @ low_k.transpose(-1, -2)

    # ------------------------------------------------------------------ private

    def _is_compiled(self, device: str) -> bool:
        """Whether the backend of such a device knows the rule of selection; the predictor is
        another matter."""
        local = self.tile is not None and device == "cpu"
        return self.selection != "balanced" and not local and self.mask_heads == "query"

    def _check_tile(self) -> None:
        if self.tile is None:
            return
        check_at_least("tile", self.tile, 1)
        if self.tile % self.block_size[1]:
            raise ValueError(
                f"tile must be a multiple of the {self.block_size[1]} keys of a block, "
                f"got {self.tile}"
            )
        if self.selection == "threshold":
            raise ValueError(f"tile must be none with selection='threshold', got {self.tile}")

    def _layer(self, inputs: AttentionInputs) -> LayerPredictor:
        layers = None if self.predictor is None else self.predictor.layers
        return layer_weights(layers, inputs.layer, "DynamicSparse")

    @torch.no_grad()
    def _codes(self, layer: LayerPredictor, inputs: AttentionInputs) -> tuple[Coded, Coded]:
        """Codes of the call's queries and of all keys; appends to `inputs.past`."""
        past = _past(inputs)
        q, k = self._encode(layer, inputs)
        keys = k if past is None else past.append(k)
        if keys.codes.shape[2] != inputs.key.shape[2]:
            raise ValueError(
                f"past must hold the predictor's keys of all earlier tokens: attention has "
                f"{inputs.key.shape[2]} keys in layer {inputs.layer}, the predictor "
                f"{keys.codes.shape[2]} (was the cache filled outside of sparsify?)"
            )
        return q, keys

    def _encode(self, layer: LayerPredictor, inputs: AttentionInputs) -> tuple[Coded, Coded]:
        hidden, past = inputs.hidden_states, _past(inputs)
        if hidden is None:
            raise ValueError("hidden_states are missing: DynamicSparse predicts from them")
        scale = None if past is None or self.bits == 32 else past.scale
        coded = encode_to_codes(layer, hidden, inputs.rotary, scale)
        if coded is not None:
            return coded
        return layer.encode(hidden, inputs.rotary, inputs.query_padding, scale)

    def _thresholds(self, layer: int) -> Tensor:
        if self.thresholds is None:
            raise ValueError(
                f"thresholds are missing for selection={self.selection!r}: run sl.calibrate "
                "(or methods.calibrate_thresholds) first"
            )
        if self.thresholds_at not in (None, self.sparsity):
            raise ValueError(
                f"sparsity must be {self.thresholds_at}, at which the thresholds were taken, got "
                f"{self.sparsity}: run sl.calibrate anew"
            )
        return torch.tensor(self.thresholds[layer])


def _past(inputs: AttentionInputs) -> PredictorKeys | None:
    if inputs.past is None or isinstance(inputs.past, PredictorKeys):
        return inputs.past
    raise TypeError(f"past must be PredictorKeys, got {type(inputs.past).__name__}")
