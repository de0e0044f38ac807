"""Rotary positions at other widths than the model's: which frequencies, turning, turning back.

Layout of Llama: the first half of the rotated columns pairs with the second half, and cos and sin
hold their frequencies in two equal halves.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""cos and sin at some positions, (batch or 1, length, rotary_dim)."""


def spread_frequencies(
    cos: Float[Tensor, "#batch length rotary_dim"], width: int, head_dim: int
) -> Int64[Tensor, " pairs"]:
    """Which of the model's frequencies turn `width` columns of a predictor, in order.

    The model has rotary_dim/2 frequencies; an even selection from the fastest to the slowest is
    taken, and of the columns the share is turned that the model turns of its `head_dim`.

    Raises:
        NotImplementedError: the model interleaves its frequencies.
    """
    check_halves(cos)
    pairs = max(1, round(width / 2 * min(1.0, cos.shape[-1] / head_dim)))
    last = cos.shape[-1] // 2 - 1
    return torch.linspace(0, last, pairs, device=cos.device).round().long()


def rotate(
    low: Float[Tensor, "*heads length width"], rotary: Rotary, chosen: Int64[Tensor, " pairs"]
) -> Float[Tensor, "*heads length width"]:
    """Turn the pairs of columns (j, j + pairs) by the chosen frequencies' angles; leave the rest.

    cos and sin must broadcast against `low` but for their last dimension.
    """
    pairs = len(chosen)
    cos, sin = (side[..., chosen].float() for side in rotary)
    first, second, rest = low.split([pairs, pairs, low.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def turn_back(
    states: Float[Tensor, "batch heads length head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads length head_dim"]:
    """Queries or keys as they were before the model rotated them, in fp32.

    Also where cos and sin carry a factor (YaRN), and where only the first columns are rotated.
    """
    check_halves(rotary[0])
    half = rotary[0].shape[-1] // 2
    cos, sin = (side[..., :half].float().unsqueeze(1) for side in rotary)
    size = cos.square() + sin.square()
    first, second, rest = states.float().split([half, half, states.shape[-1] - 2 * half], -1)
    return torch.cat(
        [(first * cos + second * sin) / size, (second * cos - first * sin) / size, rest], -1
    )


def check_halves(cos: Float[Tensor, "#batch length rotary_dim"]) -> None:
    """Refuse a layout other than Llama's."""
    half = cos.shape[-1] // 2
    if cos.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be looked at; the calls before the capture were
    # All layouts agree at position 0; of the rest, one position tells them apart.
    if not torch.equal(cos[:, -1, :half], cos[:, -1, half:]):
        raise NotImplementedError(
            "rotary: cos and sin must repeat their frequencies in two halves, as Llama's do; "
            "models that interleave them are not supported by a rotary predictor"
        )
