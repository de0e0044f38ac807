"""Methods that choose which cached keys each step of generation reads, and what they remember.

The prompt runs whole. From then on every step has one new token per sequence; each layer asks the
method what to read of its cache (`Run.read`), and shows it what came of it (`Run.observe`). Keys
and values stay in the cache, so that positions are those of the text whatever is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.methods.base import AttentionInputs, Method


class Reading(NamedTuple):
    """What one step of one layer reads: arguments of `sparseloom.decode_attention`.

    Attributes:
        keep: positions (batch, 1 or kv_heads or heads, kept), −1 = empty; None reads all keys.
        value_keep: share of those whose values are read, per row; None = all.
        progressive: threshold under which a row fetches the low bits of its keys; None reads
            all bits at once.
        index_bytes: what was read of the cache's summaries in order to choose.
        prediction_macs: multiply-accumulates spent on choosing.
    """

    keep: Int64[Tensor, "batch keep_heads kept"] | None = None
    value_keep: float | None = None
    progressive: float | None = None
    index_bytes: int = 0
    prediction_macs: int = 0


class Run(ABC):
    """What a method remembers of the sequences of one cache, over layers and steps.

    The cache owns it and calls `crop` and `select` whenever it does the same to its keys.
    """

    needs_importance: ClassVar[bool] = True
    """Whether `prompt` and `observe` have to be told the probabilities."""

    length: int = 0
    """Tokens seen by the first layer."""

    @abstractmethod
    def prompt(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"] | None,
        head_importance: Float[Tensor, "batch heads"] | None,
    ) -> None:
        """Take in a layer's dense attention of several tokens.

        Args:
            inputs: the call.
            key_importance: probabilities summed over the queries that are not padding.
            head_importance: Σ|out| of each head over those queries.
        """

    @abstractmethod
    def read(self, inputs: AttentionInputs) -> Reading:
        """What a layer's step reads; `inputs.query` is (batch, heads, 1, head_dim).

        `inputs.key` has the keys only where the cache does not quantise them.
        """

    def observe(
        self,
        inputs: AttentionInputs,
        key_importance: Float[Tensor, "batch heads kv_len"],
        head_importance: Float[Tensor, "batch heads"],
    ) -> None:
        """Take in what came of a step; called where `needs_importance`."""
        del inputs, key_importance, head_importance

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    @abstractmethod
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Batch entry i becomes what entry `indices[i]` was."""


class Generating(Method):
    """A method that chooses what generation reads of its cache.

    Properties are the defaults of what the cache itself does to keys and values.
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """Tokens of the cache leave: "prune"."""
        return super().capabilities | {"prune"}

    @abstractmethod
    def new_run(self, layers: int) -> Run:
        """Memory for the sequences of a new cache.

        Args:
            layers: of the model.
        """

    @property
    def stored_key_bits(self) -> tuple[int, int] | None:
        """Widths of the two planes in which the cache stores keys; None = as they are."""
        return None

    @property
    def stored_value_bits(self) -> int | None:
        """Width of stored values; None = as they are."""
        return None


def listed(
    kept: Bool[Tensor, "batch heads keys"], positions: Int64[Tensor, "batch heads keys"] | None
) -> Int64[Tensor, "batch heads kept"]:
    """Positions of what is kept, in order, −1 behind them where a row keeps fewer.

    Args:
        kept: which columns stay.
        positions: what the columns are; None = their own numbers.
    """
    places = kept.flatten().nonzero()[:, 0]
    found = places % kept.shape[-1] if positions is None else positions.flatten()[places]
    rows = kept.shape[:-1]
    if rows.numel() == 1:
        return found.view(*rows, -1)
    counts = kept.sum(-1)
    width = int(counts.max())
    if bool((counts == width).all()):
        return found.view(*rows, width)
    out = kept.new_full((*rows, width), -1, dtype=torch.int64)
    out[torch.arange(width, device=kept.device) < counts[..., None]] = found
    return out


def longer(tensor: Tensor, length: int) -> Tensor:
    """The tensor with zeros behind its last dimension, up to `length`."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]))


Change = Callable[[Tensor], Tensor]


class History:
    """What a run held before each of its last 16 calls, so that they can be taken back exactly."""

    def __init__(self) -> None:
        self._calls: deque[tuple[int, tuple[Tensor | None, ...]]] = deque(maxlen=16)

    def note(self, length: int, *held: Tensor | None) -> None:
        """Before a call that finds `length` tokens; the tensors must not change in place."""
        self._calls.append((length, held))

    def back_to(self, length: int) -> tuple[Tensor | None, ...] | None:
        """What was held at that length; None where it is too far back, or within a call."""
        while self._calls and self._calls[-1][0] > length:
            self._calls.pop()
        if self._calls and self._calls[-1][0] == length:
            return self._calls.pop()[1]
        return None

    def change(self, change: Change) -> None:
        """Apply to every tensor."""
        for _ in range(len(self._calls)):
            length, held = self._calls.popleft()
            self.note(length, *(None if t is None else change(t) for t in held))


def real_tokens(inputs: AttentionInputs) -> Bool[Tensor, "batch keys"]:
    """Which keys are not padding."""
    if inputs.key_padding is not None:
        return inputs.key_padding
    shape = (inputs.query.shape[0], inputs.key.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=inputs.query.device)


def every_token(inputs: AttentionInputs) -> Int64[Tensor, "batch keys"]:
    """All positions, −1 in place of padding."""
    batch, kv_len = inputs.query.shape[0], inputs.key.shape[2]
    positions = torch.arange(kv_len, device=inputs.query.device).expand(batch, -1)
    valid = inputs.key_padding
    return positions if valid is None else positions.masked_fill(~valid, -1)
