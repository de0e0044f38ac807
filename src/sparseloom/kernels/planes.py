"""``PlaneCache``: cached keys as two bit planes, so that the low bits are read only if needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from sparseloom.quantize import join_planes, quantize, split_planes


@final
@dataclass(frozen=True, eq=False)
class PlaneCache:
    """Keys split into high and low bits, and values (SpAtten, HPCA 2021, §III-D).

    A key is ``scale · (msb · 2**lsb_bits + lsb)``; from the high plane alone it is
    ``scale · (msb · 2**lsb_bits + fill)`` with ``fill`` 0 (the low bits read as zero, as in the
    published hardware) or, with ``midpoint``, half of their range. The planes are separate
    tensors, as they are separate regions of memory in the accelerator. Keys only are split; the
    values are whatever floating-point tensor is given.

    Args:
        key_msb: integers (batch, kv_heads, kv_len, head_dim), the signed high bits.
        key_lsb: the same shape, the low bits as numbers in [0, 2**lsb_bits).
        key_scale: broadcastable to (batch, kv_heads, kv_len, head_dim); usually one per head,
            (batch, kv_heads, 1, 1).
        value: (batch, kv_heads, kv_len, value_dim).
        msb_bits: width of the high plane, sign included.
        lsb_bits: width of the low plane; both together at most 16.
        midpoint: see above.

    Raises:
        ValueError: shapes, devices or widths do not fit.
    """

    key_msb: Integer[Tensor, "batch kv_heads kv_len head_dim"]
    key_lsb: Integer[Tensor, "batch kv_heads kv_len head_dim"]
    key_scale: Float[Tensor, "#batch #kv_heads #kv_len #head_dim"]
    value: Float[Tensor, "batch kv_heads kv_len value_dim"]
    msb_bits: int = 8
    lsb_bits: int = 4
    midpoint: bool = False

    def __post_init__(self) -> None:
        if self.key_lsb.shape != self.key_msb.shape:
            raise ValueError(
                f"key_lsb must have shape {tuple(self.key_msb.shape)} as key_msb, "
                f"got {tuple(self.key_lsb.shape)}"
            )
        if self.value.shape[:3] != self.key_msb.shape[:3]:
            raise ValueError(
                f"value must have shape {(*self.key_msb.shape[:3], 'value_dim')} as key_msb, "
                f"got {tuple(self.value.shape)}"
            )
        for name in ("key_lsb", "key_scale", "value"):
            device = getattr(self, name).device
            if device != self.key_msb.device:
                raise ValueError(f"{name} must be on {self.key_msb.device}, got {device}")

    @classmethod
    def from_tensors(
        cls,
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        value: Float[Tensor, "batch kv_heads kv_len value_dim"],
        *,
        msb_bits: int = 8,
        lsb_bits: int = 4,
        midpoint: bool = False,
    ) -> PlaneCache:
        """Quantise keys linearly and symmetrically, one scale per batch entry and head.

        The scale is the smallest that clips nothing; the paper does not say how it chooses it.
        Its widths are 4+4, 6+4, 8+4, 10+4 and 12+4, of which 6+4 and 8+4 are common (§III-D).
        """
        quantized = quantize(key, msb_bits + lsb_bits, granularity="matrix", clip="max")
        msb, lsb = split_planes(quantized.codes, msb_bits, lsb_bits)
        return cls(msb, lsb, quantized.scale, value, msb_bits, lsb_bits, midpoint)

    def append(
        self,
        key: Float[Tensor, "batch kv_heads new head_dim"],
        value: Float[Tensor, "batch kv_heads new value_dim"],
    ) -> PlaneCache:
        """A cache with more tokens. The scale stays: larger keys are clipped to its range.

        Raises:
            ValueError: ``key_scale`` varies along the tokens, so none is known for new ones.
        """
        if self.key_scale.shape[-2:-1] != (1,):
            raise ValueError(
                "key_scale must be the same for all tokens to append more, "
                f"got shape {tuple(self.key_scale.shape)}"
            )
        bits = self.msb_bits + self.lsb_bits
        codes = quantize(key, bits, scale=self.key_scale).codes
        msb, lsb = split_planes(codes, self.msb_bits, self.lsb_bits)
        return PlaneCache(
            torch.cat([self.key_msb, msb], dim=2),
            torch.cat([self.key_lsb, lsb], dim=2),
            self.key_scale,
            torch.cat([self.value, value], dim=2),
            self.msb_bits,
            self.lsb_bits,
            self.midpoint,
        )

    def high_keys(self, msb: Tensor) -> Tensor:
        """Integer keys that the high plane alone stands for, before scaling."""
        fill = (1 << self.lsb_bits) // 2 if self.midpoint else 0
        return (msb.to(torch.int32) << self.lsb_bits) + fill

    def full_keys(self, msb: Tensor, lsb: Tensor) -> Tensor:
        """Integer keys from both planes, before scaling."""
        return join_planes(msb, lsb, self.lsb_bits)

    def key_stand_in(self) -> Float[Tensor, "batch kv_heads kv_len head_dim"]:
        """A tensor with the shape of the keys and the dtype and device of the values, no data."""
        return self.value.new_zeros(()).expand(self.key_msb.shape)
