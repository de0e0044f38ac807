"""What methods remember of earlier tokens while a model generates, as tensors that grow."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int64
from torch import Tensor, cat

from sparseloom.methods.base import LayerState


class TokenState(LayerState):
    """Tensors with a row per token, (batch, …, tokens, width), all of the same tokens."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self.tensors[0].shape[-2] if self.tensors else 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add the rows of new tokens; returns those of all tokens."""
        rows = tuple(tensor.detach() for tensor in new)
        if self.tensors:
            rows = tuple(cat(pair, -2) for pair in zip(self.tensors, rows, strict=True))
        self.tensors = rows
        return rows

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative number drops that many from the end."""
        keep = max(0, self.length + length) if length < 0 else length
        self._change(lambda tensor: tensor[..., :keep, :])

    def reorder(self, beams: Int64[Tensor, " batch"]) -> None:
        """Batch entry i becomes what entry `beams[i]` was."""
        self._change(lambda tensor: tensor.index_select(0, beams.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry `repeats` times in a row."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these batch entries stay."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = tuple(change(tensor) for tensor in self.tensors)
