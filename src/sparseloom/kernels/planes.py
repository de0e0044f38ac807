"""``PlaneCache``: cached keys as bit planes, so that the low bits are read only if needed."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float, Int8, Integer, UInt8
from torch import Tensor

from sparseloom.kernels.cpu.store import can_store, store
from sparseloom.quantize import join_planes, quantize, split_planes

_NIBBLE = 4


@dataclass(slots=True)
class _Room:
    """Buffers whose front a cache is, and how many tokens of them some cache holds."""

    buffers: list[Tensor]
    used: int

    def takes(self, length: int, end: int) -> bool:
        """Whether tokens ``length`` to ``end`` are free: no other cache went on from here."""
        front = self.buffers[0]
        writable = torch.is_inference_mode_enabled() or not front.is_inference()
        return self.used == length and end <= front.shape[2] and writable


@final
@dataclass(frozen=True, eq=False)
class PlaneCache:
    """Keys split into high and low bits, and values (SpAtten, HPCA 2021, §III-D).

    A key is ``scale · (msb · 2**lsb_bits + lsb)``; from the high plane alone it is
    ``scale · (msb · 2**lsb_bits + fill)`` with ``fill`` 0 (the low bits read as zero, as in the
    published hardware) or, with ``midpoint``, half of their range. The planes are separate
    tensors, as they are separate regions of memory in the accelerator. With ``lsb_bits`` 0 there
    is one plane only, a plain quantised cache. The values are whatever floating-point tensor is
    given, or int8 codes with a scale.

    Args:
        key_msb: integers (batch, kv_heads, kv_len, head_dim), the signed high bits.
        key_lsb: the low bits, numbers in [0, 2**lsb_bits): as ``pack_nibbles`` stores them for up
            to 4 bits, else one integer per dimension; None for ``lsb_bits`` 0.
        key_scale: broadcastable to (batch, kv_heads, kv_len, head_dim); usually one per head,
            (batch, kv_heads, 1, 1).
        value: (batch, kv_heads, kv_len, value_dim).
        msb_bits: width of the high plane, sign included.
        lsb_bits: width of the low plane; both together at most 16.
        midpoint: see above.
        value_scale: for int8 values: a value is ``value_scale · value``; broadcastable as
            ``key_scale`` is.

    Raises:
        TypeError: ``value`` or ``key_lsb`` has a wrong dtype.
        ValueError: shapes, devices or widths do not fit.
    """

    key_msb: Integer[Tensor, "batch kv_heads kv_len head_dim"]
    key_lsb: Integer[Tensor, "batch kv_heads kv_len lsb_dim"] | None
    key_scale: Float[Tensor, "#batch #kv_heads #kv_len #head_dim"]
    value: (
        Float[Tensor, "batch kv_heads kv_len value_dim"]
        | Int8[Tensor, "batch kv_heads kv_len value_dim"]
    )
    msb_bits: int = 8
    lsb_bits: int = 4
    midpoint: bool = False
    value_scale: Float[Tensor, "#batch #kv_heads #kv_len #value_dim"] | None = None
    _room: _Room | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.key_msb.shape)
        if (self.key_lsb is None) != (self.lsb_bits == 0):
            raise ValueError(
                f"key_lsb must be None for lsb_bits = 0 only, got lsb_bits = {self.lsb_bits}"
            )
        if self.key_lsb is not None:
            packed = self.lsb_bits <= _NIBBLE
            wanted = (*shape[:3], (shape[3] + 1) // 2) if packed else shape
            if self.key_lsb.shape != wanted:
                raise ValueError(
                    f"key_lsb must have shape {wanted} for {self.lsb_bits} bits of key_msb of "
                    f"shape {shape}, got {tuple(self.key_lsb.shape)}"
                )
            if packed and self.key_lsb.dtype != torch.uint8:
                raise TypeError(
                    f"key_lsb must be uint8 (pack_nibbles) for {self.lsb_bits} bits, "
                    f"got {self.key_lsb.dtype}"
                )
        if self.value.shape[:3] != shape[:3]:
            raise ValueError(
                f"value must have shape {(*shape[:3], 'value_dim')} as key_msb, "
                f"got {tuple(self.value.shape)}"
            )
        if self.value.is_floating_point() == (self.value_scale is not None):
            raise TypeError(
                "value must be int8 with value_scale and floating-point without, "
                f"got {self.value.dtype}"
            )
        for name in ("key_lsb", "key_scale", "value", "value_scale"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tensor.device != self.key_msb.device:
                raise ValueError(f"{name} must be on {self.key_msb.device}, got {tensor.device}")

    @classmethod
    def from_tensors(
        cls,
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        value: Float[Tensor, "batch kv_heads kv_len value_dim"],
        *,
        msb_bits: int = 8,
        lsb_bits: int = 4,
        midpoint: bool = False,
        int8_values: bool = False,
    ) -> PlaneCache:
        """Quantise keys linearly and symmetrically, one scale per batch entry and head.

        The scale is the smallest that clips nothing; the paper does not say how it chooses it.
        Its widths are 4+4, 6+4, 8+4, 10+4 and 12+4, of which 6+4 and 8+4 are common (§III-D).
        ``msb_bits=8, lsb_bits=0, int8_values=True`` is a plain INT8 cache.

        Args:
            key: (batch, kv_heads, kv_len, head_dim).
            value: (batch, kv_heads, kv_len, value_dim).
            msb_bits: width of the high plane.
            lsb_bits: width of the low plane, 0 for none.
            midpoint: what the high plane alone stands for, see the class.
            int8_values: quantise the values too, as the keys, to 8 bits.
        """
        keys = quantize(key, msb_bits + lsb_bits, granularity="matrix", clip="max")
        msb, lsb = _split(keys.codes, msb_bits, lsb_bits)
        scale = None
        if int8_values:
            value, scale, _ = quantize(value, 8, granularity="matrix", clip="max")
        return cls(msb, lsb, keys.scale, value, msb_bits, lsb_bits, midpoint, scale)

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        return self.key_msb.shape[2]

    def append(
        self,
        key: Float[Tensor, "batch kv_heads new head_dim"],
        value: Float[Tensor, "batch kv_heads new value_dim"],
    ) -> PlaneCache:
        """A cache with more tokens. The scales stay: larger numbers are clipped to their range.

        This cache stays as it is. Room is kept for as many tokens again, and the next cache
        takes it, so that appending one by one costs the same per token at any length.

        Raises:
            ValueError: a scale varies along the tokens, so none is known for new ones.
        """
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if scale is not None and scale.shape[-2:-1] != (1,):
                raise ValueError(
                    f"{name} must be the same for all tokens to append more, "
                    f"got shape {tuple(scale.shape)}"
                )
        codes = quantize(key, self.msb_bits + self.lsb_bits, scale=self.key_scale).codes
        msb, lsb = _split(codes, self.msb_bits, self.lsb_bits)
        if self.value_scale is not None:
            value = quantize(value, 8, scale=self.value_scale).codes
        old = [t for t in (self.key_msb, self.value, self.key_lsb) if t is not None]
        new = [t for t in (msb, value, lsb) if t is not None]
        room, joined = self._join(old, new)
        cache = replace(
            self, key_msb=joined[0], value=joined[1], key_lsb=None if lsb is None else joined[2]
        )
        object.__setattr__(cache, "_room", room)
        return cache

    def append_within(
        self,
        key: Float[Tensor, "batch kv_heads new head_dim"],
        value: Float[Tensor, "batch kv_heads new value_dim"],
        *,
        value_bits: int = 8,
    ) -> PlaneCache | None:
        """What ``append`` returns, in one pass of C++ without a single PyTorch operation on rows.

        Args:
            key, value: the new rows.
            value_bits: bits that codes of values may use, up to 8.

        Returns:
            None where ``append`` has to do it: a number exceeds the scales, is not finite, or the
            tensors are not such as C++ takes.
        """
        scale = self.value_scale
        if scale is None or not (
            can_store(key, self.key_scale, self.lsb_bits) and can_store(value, scale, 0)
        ):
            return None
        length, end = self.length, self.length + key.shape[2]
        room = self._room
        if room is None or not room.takes(length, end):
            old = [t for t in (self.key_msb, self.value, self.key_lsb) if t is not None]
            room = _Room([_larger(tensor, max(end, 2 * length)) for tensor in old], length)
        new = [buffer[:, :, length:end] for buffer in room.buffers]
        bits, low = self.msb_bits + self.lsb_bits, new[2] if self.lsb_bits else None
        if not store(key, self.key_scale, bits, new[0], low, self.lsb_bits):
            return None
        if not store(value, scale, value_bits, new[1]):
            return None
        room.used = end
        front = [buffer[:, :, :end] for buffer in room.buffers]
        cache = copy(self)
        changed = {"key_msb": front[0], "value": front[1], "_room": room}
        if self.lsb_bits:
            changed["key_lsb"] = front[2]
        for name, held in changed.items():
            object.__setattr__(cache, name, held)
        return cache

    def _join(self, old: list[Tensor], new: list[Tensor]) -> tuple[_Room | None, list[Tensor]]:
        """Old and new rows of each tensor in one, in place if there is room behind the old."""
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (*old, *new))
        same = all(a.dtype == b.dtype for a, b in zip(old, new, strict=True))
        if tracked or not same or torch.compiler.is_compiling():
            return None, [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
        length, end = self.length, self.length + new[0].shape[2]
        room = self._room
        if room is None or not room.takes(length, end):
            room = _Room([_larger(tensor, max(end, 2 * length)) for tensor in old], length)
        for buffer, tensor in zip(room.buffers, new, strict=True):
            buffer[:, :, length:end] = tensor
        room.used = end
        return room, [buffer[:, :, :end] for buffer in room.buffers]

    def high_keys(self, msb: Tensor) -> Tensor:
        """Integer keys that the high plane alone stands for, before scaling."""
        return (msb.to(torch.int32) << self.lsb_bits) + self.fill

    def full_keys(self, msb: Tensor, lsb: Tensor | None) -> Tensor:
        """Integer keys from both planes as they are stored, before scaling."""
        if lsb is None:
            return msb.to(torch.int32)
        if self.lsb_bits <= _NIBBLE:
            lsb = unpack_nibbles(lsb, msb.shape[-1])
        return join_planes(msb, lsb, self.lsb_bits)

    @property
    def fill(self) -> int:
        """What the low bits count as where they are not read."""
        return (1 << self.lsb_bits) // 2 if self.midpoint else 0

    def stand_ins(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tensors with the shapes and device of keys and values, and no data."""
        zero = self.key_msb.new_zeros((), dtype=dtype)
        return zero.expand(self.key_msb.shape), zero.expand(self.value.shape)


def pack_nibbles(numbers: Integer[Tensor, "*rows dim"]) -> UInt8[Tensor, "*rows packed_dim"]:
    """Numbers in [0, 16), two per byte: byte j holds j in its low half and j + ⌈dim/2⌉ above."""
    half = (numbers.shape[-1] + 1) // 2
    low, high = numbers[..., :half].to(torch.uint8), numbers[..., half:].to(torch.uint8)
    if high.shape[-1] < half:
        high = torch.nn.functional.pad(high, (0, 1))
    return low | (high << _NIBBLE)


def unpack_nibbles(
    packed: UInt8[Tensor, "*rows packed_dim"], dim: int
) -> UInt8[Tensor, "*rows dim"]:
    """The ``dim`` numbers per row that ``pack_nibbles`` packed."""
    return torch.cat([packed & 15, packed >> _NIBBLE], dim=-1)[..., :dim]


def _split(codes: Tensor, msb_bits: int, lsb_bits: int) -> tuple[Tensor, Tensor | None]:
    """Planes as the cache stores them."""
    if lsb_bits == 0:
        return codes, None
    msb, lsb = split_planes(codes, msb_bits, lsb_bits)
    return msb, pack_nibbles(lsb) if lsb_bits <= _NIBBLE else lsb


def _larger(tensor: Tensor, capacity: int) -> Tensor:
    """A buffer for ``capacity`` rows that begins with those of the tensor."""
    batch, heads, length, dim = tensor.shape
    buffer = tensor.new_empty(batch, heads, capacity, dim)
    buffer[:, :, :length] = tensor
    return buffer
