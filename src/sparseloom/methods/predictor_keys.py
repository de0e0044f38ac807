"""What the predictor remembers of earlier tokens while a model generates."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from sparseloom.methods.base import LayerState
from sparseloom.methods.coding import BITS, Coded
from sparseloom.methods.settings import check_choice


class PredictorKeys(LayerState):
    """The predictor's keys of a layer's earlier tokens: codes (int8, or fp32 at 32 bits) in
    (batch, heads, length, width), and the scale per head under which they were made.

    Keys are stored as codes: INT8 storage is a sixteenth to an eighth of the key/value cache, and
    appending quantises nothing anew.
    """

    def __init__(self, bits: int) -> None:
        check_choice("bits", bits, BITS)
        self.bits = bits
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return 0 if self.codes is None else self.codes.shape[2]

    def append(self, keys: Coded) -> Coded:
        """Add the keys of new tokens, (batch, heads, new, width), and return all keys.

        Keys must have the scale of the ones before (`LayerPredictor.encode(key_scale=…)`).
        """
        new = keys.codes.detach()
        new = new if self.bits == 32 else new.to(torch.int8)
        self.codes = new if self.codes is None else torch.cat([self.codes, new], 2)
        self.scale = keys.scale.detach() if self.scale is None else self.scale
        return Coded(self.codes, self.scale)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative number drops that many from the end."""
        if self.codes is not None:
            self.codes = self.codes[:, :, : max(0, self.length + length) if length < 0 else length]

    def reorder(self, beams: Int64[Tensor, " batch"]) -> None:
        """Batch entry i becomes what entry `beams[i]` was."""
        if self.codes is not None:
            self.codes = self.codes.index_select(0, beams.to(self.codes.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry `repeats` times in a row."""
        if self.codes is not None:
            self.codes = self.codes.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these batch entries stay."""
        if self.codes is not None:
            self.codes = self.codes[indices.to(self.codes.device)]
