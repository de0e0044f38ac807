"""Prediction and selection by a compiled backend (C++ on the CPU, Triton on GPUs), which never
holds scores of more than a few rows.

The same rules as `LayerPredictor.encode`, `topk_mask` and `threshold_mask`, which remain the
reference; where scores are pooled, keys whose scores differ by a rounding error may change places.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.kernels import prediction
from sparseloom.mask import SparseMask
from sparseloom.methods.coding import Coded
from sparseloom.methods.grid import Grid
from sparseloom.methods.pooling import Pooling
from sparseloom.methods.predictor import LayerPredictor


class Plan(NamedTuple):
    """Blocks, budgets and places of a call.

    Args:
        offsets: where each query block's keys go.
        total: the last of them; None: only the device knows it.
        tile: key blocks that are searched together; None: whole rows.
        shares: of the budget, for each tile.
    """

    blocks: prediction.Blocks
    offsets: Int64[Tensor, "batch heads q_blocks_plus_1"]
    total: int | None
    tile: int | None = None
    shares: Int64[Tensor, "#batch q_blocks tiles"] | None = None


def encode_to_codes(
    layer: LayerPredictor,
    hidden: Float[Tensor, "batch q_len hidden_size"],
    rotary: tuple[Tensor, Tensor] | None = None,
    key_scale: Float[Tensor, "1 heads 1 1"] | None = None,
) -> tuple[Coded, Coded] | None:
    """`layer.encode` to int8 codes; None where it has to be torch.

    That is: gradients, scales still to be learned, numbers that are not finite, codes of two's
    complement, and what `prediction.unsupported` names.
    """
    if layer.twos_complement or torch.is_grad_enabled():
        return None
    # Packed weights say that scales were learned: a GPU is not asked each time.
    if hidden.numel() == 0 or (layer.packed is None and not int(layer.updates)):
        return None
    if prediction.unsupported(layer.bits, layer.width, hidden.device) is not None:
        return None
    rotation = None
    if layer.rotary:
        if rotary is None:
            return None
        rotation = prediction.Rotation(*rotary, layer.frequencies(rotary[0]))
    scale = layer.key_scale if key_scale is None else key_scale
    backend = prediction.backend(hidden.device)
    with torch.cuda.device_of(hidden):
        coded = backend.encode(
            hidden,
            _packed(layer, backend),
            bits=layer.bits,
            heads=layer.heads,
            width=layer.width,
            input_scale=layer.input_scale if hidden.is_cuda else layer.input_scale.item(),
            key_scale=scale.reshape(-1),
            rotation=rotation,
        )
    if coded is None:
        return None
    return Coded(coded.q, coded.q_scale), Coded(coded.k, scale.reshape(1, -1, 1, 1))


def _packed(layer: LayerPredictor, backend: ModuleType) -> Any:
    """The layer's P·W̃ as products read it; kept while the weights stay as they are."""
    fused = layer._fused()
    if layer.packed is None or layer.packed[0] is not fused:
        with torch.inference_mode(False), torch.no_grad():
            codes, scale = (part.detach().clone() for part in fused)
            layer.packed = (fused, backend.pack_weights(codes, scale))
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
    bits: int = 8,
    tile: int | None = None,
) -> SparseMask:
    """`topk_mask` of the scores q·k of these codes (`prediction.unsupported` has to be None).

    Args:
        bits: that no code exceeds; the fewer, the shorter the search.
        tile: local top-k, on a GPU.
    """
    batch, heads, q_len, _ = q.codes.shape
    kv_len, device = k.codes.shape[2], q.codes.device
    sizes = (q_len, kv_len, block_size, is_causal)
    rule = (sparsity, minimum_keys, tile, batch, heads, device)
    if key_padding is None:
        plan = _plan_of_sizes(*sizes, *rule)
        offsets = plan.offsets.clone()
    else:
        plan = _plan(*sizes, key_padding.to(device), *rule)
        offsets = plan.offsets
    local = {} if plan.tile is None else {"tile": plan.tile, "shares": plan.shares}
    with torch.cuda.device_of(q.codes):
        indices, _ = prediction.backend(device).top_keys(
            _codes(q, k, bits),
            plan.blocks,
            offsets,
            pooling=pooling,
            voters=None if block_size == (1, 1) else query_padding,
            total=plan.total,
            **local,
        )
    return _mask(indices, offsets, sizes)


def threshold_of_codes(
    q: Coded,
    k: Coded,
    thresholds: Float[Tensor, " heads"],
    *,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Bool[Tensor, "#batch kv_len"] | None,
    bits: int = 8,
) -> SparseMask:
    """`threshold_mask` of the scores q·k of these codes (`prediction.unsupported` has to be
    None)."""
    device = q.codes.device
    sizes = (q.codes.shape[2], k.codes.shape[2], block_size, is_causal)
    padding = None if key_padding is None else key_padding.to(device)
    grid = _grid(*sizes, padding, device)
    blocks = prediction.Blocks(
        block_size, is_causal, padding, grid.visible, grid.budget(0.0, 1), grid.diagonal
    )
    with torch.cuda.device_of(q.codes):
        indices, offsets, _ = prediction.backend(device).keys_above(
            _codes(q, k, bits), blocks, thresholds
        )
    return _mask(indices, offsets, sizes)


def _codes(q: Coded, k: Coded, bits: int) -> prediction.Codes:
    """Codes as int8 (the torch path has integer-valued fp32)."""
    batch, heads, q_len, _ = q.codes.shape
    return prediction.Codes(
        q.codes.to(torch.int8),
        q.scale.expand(batch, heads, q_len, 1),
        k.codes.to(torch.int8),
        k.scale.reshape(-1).expand(heads),
        bits,
    )


def _grid(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Tensor | None,
    device: torch.device,
) -> Grid:
    return Grid(
        q_len,
        kv_len,
        block_size=block_size,
        is_causal=is_causal,
        key_padding=key_padding,
        device=device,
    )


def _plan(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Tensor | None,
    sparsity: float,
    minimum_keys: int,
    tile: int | None,
    batch: int,
    heads: int,
    device: torch.device,
) -> Plan:
    grid = _grid(q_len, kv_len, block_size, is_causal, key_padding, device)
    budget = grid.budget(sparsity, minimum_keys)
    shares, width = None, None if tile is None else tile // block_size[1]
    if width is not None and width < grid.kv_blocks:
        shares = grid.shares(budget, width)
        budget = shares.sum(-1)
    blocks = prediction.Blocks(
        block_size, is_causal, key_padding, grid.visible, budget, grid.diagonal
    )
    offsets = prediction.offsets_of(budget[:, None].expand(batch, heads, budget.shape[-1]))
    return Plan(blocks, offsets, None, None if shares is None else width, shares)


@lru_cache(maxsize=16)
def _plan_of_sizes(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    sparsity: float,
    minimum_keys: int,
    tile: int | None,
    batch: int,
    heads: int,
    device: torch.device,
) -> Plan:
    """What depends on sizes alone; the layers of a model share it."""
    sizes, rule = (q_len, kv_len, block_size, is_causal), (sparsity, minimum_keys, tile)
    with torch.inference_mode(False):
        plan = _plan(*sizes, None, *rule, batch, heads, device)
        return plan._replace(total=int(plan.offsets[-1, -1, -1]))


def _mask(
    indices: Tensor, offsets: Tensor, sizes: tuple[int, int, tuple[int, int], bool]
) -> SparseMask:
    q_len, kv_len, block_size, _ = sizes
    return SparseMask(
        indices, offsets, block_size=block_size, q_len=q_len, kv_len=kv_len, validate=False
    )
