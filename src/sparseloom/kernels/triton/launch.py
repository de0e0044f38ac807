"""From an ``AttentionCall`` to grids and arguments, the same for every kernel over query blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.triton.configs import Tiles, width
from sparseloom.kernels.triton.transpose import longest_first

LOG2E = 1.4426950408889634


class Launch(NamedTuple):
    """A call cut into programs: one per unit of heads, query block, and part of one."""

    call: AttentionCall
    tiles: Tiles
    order: Tensor

    @classmethod
    def make(
        cls, call: AttentionCall, choose: Callable[..., Tiles], *, pack: bool = True
    ) -> Launch:
        """``choose`` is one of the functions in ``configs``; ``pack`` allows heads to share."""
        assert call.indices is not None
        assert call.offsets is not None
        call = call._replace(indices=call.indices.contiguous(), offsets=call.offsets.contiguous())
        assert call.offsets is not None
        # Aligned runs of this many query heads have both keys and mask in common.
        shared = math.gcd(call.groups, call.query.shape[1] // call.offsets.shape[1])
        dim = max(width(call.query.shape[3]), width(call.value.shape[3]))
        tiles = choose(
            call.block_size[0], shared if pack else 1, dim, call.query.dtype, capability(call.query)
        )
        return cls(call, tiles, longest_first(call.offsets))

    @property
    def split(self) -> int:
        """Programs per query block."""
        return -(-self.call.block_size[0] // self.tiles.tile_q)

    @property
    def units(self) -> int:
        """Units of heads per batch entry."""
        return self.call.query.shape[1] // self.tiles.pack

    def grid(self, units: int | None = None) -> tuple[int]:
        """Programs for so many units, by default for all."""
        assert self.call.offsets is not None
        units = self.call.query.shape[0] * self.units if units is None else units
        return (units * self.split * (self.call.offsets.shape[2] - 1),)

    def arguments(self, first_unit: int = 0) -> dict[str, Any]:
        """What every kernel over query blocks takes."""
        call, tiles = self.call, self.tiles
        dims = call.query.shape[3], call.value.shape[3]
        return {
            **mask_arguments(call),
            "order": self.order,
            "first_unit": first_unit,
            "units": self.units,
            "heads": call.query.shape[1],
            "scale": call.scale * LOG2E,
            "KEY_GROUP": call.groups,
            "TILE_Q": tiles.tile_q,
            "TILE_K": tiles.tile_k,
            "SPLIT": self.split,
            "PACK": tiles.pack,
            "ROWS": tiles.rows,
            "DIM": dims[0],
            "WIDTH": width(dims[0]),
            "VALUE_DIM": dims[1],
            "VALUE_WIDTH": width(dims[1]),
            "AXIS": 0 if tiles.keys_on_m else 1,
            "PRECISION": precision(),
            "STAGES": tiles.stages,
            **compiler_options(tiles),
        }


def compiler_options(tiles: Tiles) -> dict[str, Any]:
    """What Triton itself takes at a launch."""
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def mask_arguments(call: AttentionCall) -> dict[str, Any]:
    """The mask: its lists, who shares them, causality and padding."""
    assert call.indices is not None
    assert call.offsets is not None
    padding = call.key_padding
    return {
        "indices": call.indices,
        "offsets": call.offsets,
        # Without padding it is not read, but something must be passed.
        "padding": call.indices if padding is None else padding.contiguous().view(torch.uint8),
        "q_len": call.q_len,
        "kv_len": call.kv_len,
        "q_blocks": call.offsets.shape[2] - 1,
        "mask_heads": call.offsets.shape[1],
        "MASK_BATCH": call.offsets.shape[0] > 1,
        "MASK_GROUP": call.query.shape[1] // call.offsets.shape[1],
        "BLOCK_Q": call.block_size[0],
        "BLOCK_K": call.block_size[1],
        "CAUSAL": call.is_causal,
        "PADDED": padding is not None,
    }


def adjacent(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring dims adjacent."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of batch, head and row of each tensor, as the kernels call them."""
    return {
        f"{name}_{axis}": tensor.stride(place)
        for name, tensor in tensors.items()
        for place, axis in enumerate(("batch", "head", "row"))
    }


def capability(tensor: Tensor) -> int:
    """10 · major + minor of the tensor's device; 90 where the interpreter stands in for one."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def precision() -> str:
    """How fp32 products are computed: as IEEE has it, unless the user allowed less.

    ``torch.set_float32_matmul_precision`` allows three products in TF32, or one.
    """
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[
        torch.get_float32_matmul_precision()
    ]
