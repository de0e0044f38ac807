"""What regions do to keys, values and queries beside masking: means over segments, 4-bit codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.quantize import quantize
from sparseloom.region_model import LOW_CODE


def segment_sizes(
    kv_len: int, size: int, key_padding: Bool[Tensor, "batch kv_len"] | None
) -> Int64[Tensor, "batch_or_1 segments"]:
    """Keys of each segment of `size` that are there and not padding."""
    attended = torch.ones(1, kv_len, dtype=torch.int64)
    if key_padding is not None:
        attended = key_padding.to(torch.int64)
    return F.pad(attended, (0, -kv_len % size)).unflatten(-1, (-1, size)).sum(-1)


def segment_means(
    tensor: Float[Tensor, "batch heads kv_len dim"],
    size: int,
    key_padding: Bool[Tensor, "batch kv_len"] | None,
) -> Float[Tensor, "batch heads segments dim"]:
    """Means of each segment of `size` keys over those that are not padding; 0 where all are."""
    counts = segment_sizes(tensor.shape[2], size, key_padding).to(tensor.device)
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    if key_padding is not None:
        # Filled and not multiplied: what stands in the padding may be infinite.
        wide = wide.masked_fill(~key_padding[:, None, :, None], 0)
    padded = F.pad(wide, (0, 0, 0, -tensor.shape[2] % size))
    sums = padded.unflatten(2, (-1, size)).sum(3)
    return (sums / counts.clamp(min=1)[:, None, :, None]).to(tensor.dtype)


def low_precision(
    tensor: Float[Tensor, "batch heads length dim"],
    shift: int,
    key_padding: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch heads length dim"]:
    """The values that 4-bit codes with a power of two per vector stand for; gradient 1.

    8-bit codes, one scale per head, lose the fewest low bits with which their largest, rounded,
    becomes at most 7, but at most `shift` bits; ties round to the even code, what still exceeds 7
    is clipped (`low_codes` in `sparseloom.region_model` in numpy).
    """
    if key_padding is not None:
        tensor = tensor.masked_fill(~key_padding[:, None, :, None], 0)
    eight = quantize(tensor.detach(), 8, granularity="matrix")
    codes = eight.codes.float()
    largest = codes.abs().amax(-1, keepdim=True)
    lost = torch.zeros_like(largest)
    for bits in range(shift, 0, -1):
        # The last one written is the fewest bits that suffice; at first, the most allowed.
        fits = (largest / 2**bits).round() <= LOW_CODE
        lost = torch.where(fits | (bits == shift), float(bits), lost)
    lost = torch.where(largest <= LOW_CODE, 0.0, lost)
    unit = lost.exp2()
    values = (codes / unit).round().clamp(-LOW_CODE, LOW_CODE) * unit * eight.scale
    # Adding zero keeps the values bit for bit.
    return values.to(tensor.dtype) + (tensor - tensor.detach())
