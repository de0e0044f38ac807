"""Prediction and selection by the C++ backend, which never holds scores of more than a few rows.

The same rules as `LayerPredictor.encode`, `topk_mask` and `threshold_mask`, which remain the
reference; where scores are pooled, keys whose scores differ by a rounding error may change places.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.kernels.cpu import predict
from sparseloom.mask import SparseMask
from sparseloom.methods.coding import Coded
from sparseloom.methods.grid import Grid
from sparseloom.methods.pooling import Pooling
from sparseloom.methods.predictor import LayerPredictor

_CPU = torch.device("cpu")


def encode_to_codes(
    layer: LayerPredictor,
    hidden: Float[Tensor, "batch q_len hidden_size"],
    rotary: tuple[Tensor, Tensor] | None = None,
    key_scale: Float[Tensor, "1 heads 1 1"] | None = None,
) -> tuple[Coded, Coded] | None:
    """`layer.encode` to int8 codes; None where it has to be torch.

    That is: gradients, scales still to be learned, numbers that are not finite, codes of two's
    complement, and what `predict.unsupported` names.
    """
    if layer.twos_complement or torch.is_grad_enabled():
        return None
    if not int(layer.updates) or hidden.numel() == 0:
        return None
    if predict.unsupported(layer.bits, layer.width, hidden.device) is not None:
        return None
    rotation = None
    if layer.rotary:
        if rotary is None:
            return None
        rotation = predict.Rotation(*rotary, layer.frequencies(rotary[0]))
    scale = layer.key_scale if key_scale is None else key_scale
    coded = predict.encode(
        hidden,
        _packed(layer),
        bits=layer.bits,
        heads=layer.heads,
        width=layer.width,
        input_scale=layer.input_scale.item(),
        key_scale=scale.reshape(-1),
        rotation=rotation,
    )
    if coded is None:
        return None
    return Coded(coded.q, coded.q_scale), Coded(coded.k, scale.reshape(1, -1, 1, 1))


def _packed(layer: LayerPredictor) -> predict.Weights:
    """The layer's P·W̃ as products read it; kept while the weights stay as they are."""
    fused = layer._fused()
    if layer.packed is None or layer.packed[0] is not fused:
        with torch.inference_mode(False), torch.no_grad():
            codes, scale = (part.detach().clone() for part in fused)
            layer.packed = (fused, predict.pack_weights(codes, scale))
    return layer.packed[1]


def topk_of_codes(
    q: Coded,
    k: Coded,
    *,
    sparsity: float,
    minimum_keys: int,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Bool[Tensor, "#batch kv_len"] | None,
    query_padding: Bool[Tensor, "#batch q_len"] | None,
    pooling: Pooling,
) -> SparseMask:
    """`topk_mask` of the scores q·k of these codes (`predict.unsupported` has to be None)."""
    batch, heads, q_len, _ = q.codes.shape
    kv_len = k.codes.shape[2]
    sizes = (q_len, kv_len, block_size, is_causal)
    if key_padding is None:
        blocks, offsets = _plan(*sizes, sparsity, minimum_keys, batch, heads)
        offsets = offsets.clone()
    else:
        blocks = _blocks(*sizes, key_padding, sparsity, minimum_keys)
        offsets = _offsets(blocks, batch, heads)
    voters = None if block_size == (1, 1) else query_padding
    indices, _ = predict.top_keys(_codes(q, k), blocks, offsets, pooling=pooling, voters=voters)
    return _mask(indices, offsets, sizes)


def threshold_of_codes(
    q: Coded,
    k: Coded,
    thresholds: Float[Tensor, " heads"],
    *,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Bool[Tensor, "#batch kv_len"] | None,
) -> SparseMask:
    """`threshold_mask` of the scores q·k of these codes (`predict.unsupported` has to be None)."""
    sizes = (q.codes.shape[2], k.codes.shape[2], block_size, is_causal)
    blocks = _blocks(*sizes, key_padding, 0.0, 1)
    indices, offsets, _ = predict.keys_above(_codes(q, k), blocks, thresholds)
    return _mask(indices, offsets, sizes)


def _codes(q: Coded, k: Coded) -> predict.Codes:
    """Codes as int8 (the torch path has integer-valued fp32)."""
    batch, heads, q_len, _ = q.codes.shape
    return predict.Codes(
        q.codes.to(torch.int8),
        q.scale.expand(batch, heads, q_len, 1),
        k.codes.to(torch.int8),
        k.scale.reshape(-1).expand(heads),
    )


def _blocks(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Tensor | None,
    sparsity: float,
    minimum_keys: int,
) -> predict.Blocks:
    grid = Grid(
        q_len,
        kv_len,
        block_size=block_size,
        is_causal=is_causal,
        key_padding=key_padding,
        device=_CPU,
    )
    return predict.Blocks(
        block_size,
        is_causal,
        key_padding,
        grid.visible,
        grid.budget(sparsity, minimum_keys),
        grid.diagonal,
    )


@lru_cache(maxsize=16)
def _plan(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    sparsity: float,
    minimum_keys: int,
    batch: int,
    heads: int,
) -> tuple[predict.Blocks, Tensor]:
    """What depends on sizes alone; the layers of a model share it."""
    with torch.inference_mode(False):
        blocks = _blocks(q_len, kv_len, block_size, is_causal, None, sparsity, minimum_keys)
        return blocks, _offsets(blocks, batch, heads)


def _offsets(blocks: predict.Blocks, batch: int, heads: int) -> Tensor:
    budget = blocks.budget
    return predict.offsets_of(budget[:, None].expand(batch, heads, budget.shape[-1]))


def _mask(
    indices: Tensor, offsets: Tensor, sizes: tuple[int, int, tuple[int, int], bool]
) -> SparseMask:
    q_len, kv_len, block_size, _ = sizes
    return SparseMask(
        indices, offsets, block_size=block_size, q_len=q_len, kv_len=kv_len, validate=False
    )
