"""Keys and values of one layer as a generation method stores them: as they are, or quantised.

One scale per sequence and head covers all its tokens, padding excluded. Where a new token exceeds
it, the scale grows to fit and the codes before are rounded to it once more: the paper (SpAtten,
HPCA 2021, §III-D) names linear symmetric codes, but no rule for their scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.kernels import PlaneCache
from sparseloom.quantize import code_range, quantize


class Stored:
    """Keys and values that grow in place.

    Args:
        key_bits: widths of the high and the low plane of the keys (0 for no low plane); None
            stores keys as they are.
        value_bits: width of the values. Up to 8 beside quantised keys they are stored as int8
            codes, otherwise as the numbers that the codes stand for.
    """

    def __init__(self, key_bits: tuple[int, int] | None, value_bits: int | None) -> None:
        self.key_bits, self.value_bits = key_bits, value_bits
        self.length = 0
        self._plain: tuple[Tensor, Tensor] | None = None
        self._planes: PlaneCache | None = None
        self._value_scale: Tensor | None = None
        self._used = 0
        self._dtype = torch.float32

    @property
    def cache(self) -> tuple[Tensor, Tensor] | PlaneCache:
        """What `sparseloom.decode_attention` reads."""
        return self.floats() if self._planes is None else self._planes

    def floats(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, kv_heads, length, dim), in the type that they came in."""
        if self._planes is not None:
            key, value = _unpacked(self._planes)
            return key.to(self._dtype), value.to(self._dtype)
        assert self._plain is not None
        key, value = self._plain
        return key[:, :, : self.length], value[:, :, : self.length]

    def stand_ins(self) -> tuple[Tensor, Tensor]:
        """What has the shapes of `floats`, and its numbers only where they need no unpacking."""
        return self.floats() if self._planes is None else self._planes.stand_ins(self._dtype)

    def append(
        self,
        key: Float[Tensor, "batch kv_heads new head_dim"],
        value: Float[Tensor, "batch kv_heads new value_dim"],
        valid: Bool[Tensor, "batch new"] | None = None,
    ) -> None:
        """Store more tokens; padding takes no part in the scales."""
        self._dtype = key.dtype
        if self._append_within(key, value, valid):
            return
        if self.value_bits is not None:
            self._value_scale = _grown(self._value_scale, value, self.value_bits, valid)
        if self.key_bits is None:
            self._append_plain(key, self._on_grid(value))
        else:
            self._append_planes(key, value, valid)
        self.length += key.shape[2]

    def crop(self, length: int) -> None:
        """Drop all but the first `length` tokens; their scales stay."""
        if length >= self.length:
            return
        self.length = length
        if self._planes is not None:
            self._planes = _each(self._planes, lambda rows: rows[:, :, :length], scales=False)
        elif self._plain is not None:  # views may be about: what follows must not write into them
            self._used = -1

    def select(self, indices: Tensor) -> None:
        """Batch entry i becomes what entry `indices[i]` was."""
        if self._value_scale is not None:
            self._value_scale = self._value_scale.index_select(0, indices)
        if self._planes is not None:
            self._planes = _each(self._planes, lambda t: t.index_select(0, indices), scales=True)
            if self._planes.value_scale is not None:  # known as the same object
                self._value_scale = self._planes.value_scale
        elif self._plain is not None:
            key, value = self.floats()
            self._plain = key.index_select(0, indices), value.index_select(0, indices)
            self._used = -1

    def _append_within(self, key: Tensor, value: Tensor, valid: Tensor | None) -> bool:
        """Append to planes whose scales fit: what nearly every step of generation does."""
        if self._planes is None or self.value_bits is None or valid is not None:
            return False
        planes = self._planes.append_within(key, value, value_bits=self.value_bits)
        if planes is None:
            return False
        self._planes = planes
        self.length += key.shape[2]
        return True

    def _append_plain(self, key: Tensor, value: Tensor) -> None:
        end = self.length + key.shape[2]
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            old = None if self._plain is None else self.floats()
            self._plain = (key, value) if old is None else (
                torch.cat([old[0], key], 2), torch.cat([old[1], value], 2)
            )  # fmt: skip
            self._used = -1
            return
        plain = self._plain
        fits = plain is not None and self._used == self.length and end <= plain[0].shape[2]
        if plain is None or not fits or (plain[0].is_inference() and not _inference()):
            room = end if plain is None else max(end, self.length + self.length // 2 + 16)
            fresh = tuple(t.new_empty((*t.shape[:2], room, t.shape[3])) for t in (key, value))
            if plain is not None:
                for new, old in zip(fresh, self.floats(), strict=True):
                    new[:, :, : self.length] = old
            plain = self._plain = (fresh[0], fresh[1])
        for buffer, rows in zip(plain, (key, value), strict=True):
            buffer[:, :, self.length : end] = rows
        self._used = end

    def _append_planes(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        assert self.key_bits is not None
        msb_bits, lsb_bits = self.key_bits
        old = self._planes
        scale = None if old is None else old.key_scale
        grown = _grown(scale, key, msb_bits + lsb_bits, valid)
        codes = self.value_bits is not None and self.value_bits <= 8
        value_scale = self._value_scale if codes else None
        if old is None or grown is not scale or old.value_scale is not value_scale:
            fresh = _empty(key, value, grown, value_scale, self.key_bits)
            self._planes = fresh if old is None else fresh.append(*_unpacked(old))
        assert self._planes is not None
        self._planes = self._planes.append(key, value if codes else self._on_grid(value))

    def _on_grid(self, value: Tensor) -> Tensor:
        """Values rounded to what their codes can stand for."""
        if self.value_bits is None:
            return value
        return (
            quantize(value, self.value_bits, scale=self._value_scale).dequantize().to(value.dtype)
        )


def _grown(scale: Tensor | None, x: Tensor, bits: int, valid: Tensor | None) -> Tensor:
    """A scale (batch, heads, 1, 1) that clips nothing valid of `x`; the same object if it fits."""
    x = x.detach().float()
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0)
    wanted = x.abs().amax((-2, -1), keepdim=True) / code_range(bits)[1]
    if scale is None:
        return torch.where(wanted > 0, wanted, 1.0)
    return torch.maximum(scale, wanted) if bool((wanted > scale).any()) else scale


def _empty(
    key: Tensor,
    value: Tensor,
    key_scale: Tensor,
    value_scale: Tensor | None,
    bits: tuple[int, int],
) -> PlaneCache:
    (batch, heads, _, width), value_width = key.shape, value.shape[3]
    low = None
    if bits[1]:
        packed = bits[1] <= 4
        dtype = torch.uint8 if packed else torch.int8 if bits[1] < 8 else torch.int16
        low = key.new_empty((batch, heads, 0, (width + 1) // 2 if packed else width), dtype=dtype)
    return PlaneCache(
        key.new_empty((batch, heads, 0, width), dtype=torch.int8 if bits[0] <= 8 else torch.int16),
        low,
        key_scale,
        value.new_empty(
            (batch, heads, 0, value_width), dtype=value.dtype if value_scale is None else torch.int8
        ),
        msb_bits=bits[0],
        lsb_bits=bits[1],
        value_scale=value_scale,
    )


def _unpacked(planes: PlaneCache) -> tuple[Tensor, Tensor]:
    """Keys in fp32, and values: in fp32 where they are codes."""
    key = planes.full_keys(planes.key_msb, planes.key_lsb) * planes.key_scale
    return key, planes.value if planes.value_scale is None else planes.value * planes.value_scale


def _each(planes: PlaneCache, change: Callable[[Tensor], Tensor], *, scales: bool) -> PlaneCache:
    names = ["key_msb", "key_lsb", "value", *(("key_scale", "value_scale") if scales else ())]
    found = {name: getattr(planes, name) for name in names}
    return replace(planes, **{n: None if t is None else change(t) for n, t in found.items()})


def _inference() -> bool:
    return torch.is_inference_mode_enabled()
