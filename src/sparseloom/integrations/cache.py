"""A cache layer that knows more about its keys: which are padding, and what a method keeps of them.

`model.generate` makes its own cache, so its layers are replaced where they stand, one at a time,
when the attention of that layer first runs.  What belongs to the keys then follows every operation
on them: beam search reorders, assisted decoding crops, batches are repeated and selected.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparseloom.integrations._compat import STATIC_CACHE
from sparseloom.methods.base import LayerState, Method, Selector


class SparseLayer(DynamicLayer):
    """A growing cache layer with the validity of its keys and a method's state for them.

    Attributes:
        valid: (batch, keys) bool, False for padding; None while every key is valid.
        state: what the method that runs on this layer remembers of the keys, if it does.
        method: the method whose state that is.
    """

    valid: Bool[Tensor, "batch keys"] | None
    state: LayerState | None
    method: Method | None

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> SparseLayer:
        """The same keys and values in a layer of this kind."""
        mine = cls()
        for name in ("keys", "values", "is_initialized", "dtype", "device"):
            if hasattr(layer, name):
                setattr(mine, name, getattr(layer, name))
        return mine

    def remember(
        self, given: Bool[Tensor, "_ _"] | None, *, batch: int, new: int, total: int
    ) -> Bool[Tensor, "batch total"] | None:
        """Take in which keys count, after `new` tokens were added; returns it for all keys.

        Args:
            given: validity as this call's attention mask has it, of all tokens seen so far; None
                where it has no padding.
            batch: sequences.
            new: tokens added by this call.
            total: keys that the layer holds now.
        """
        if given is not None:
            given = given.expand(batch, -1)
        earlier = total - new
        known = self.valid if self.valid is not None and self.valid.shape[1] == earlier else None
        if given is not None and given.shape[1] == total:
            self.valid = given
        elif given is None and known is None:
            self.valid = None
        else:  # the layer dropped keys: the mask's columns are not its keys, its end is
            all_valid = torch.ones(batch, total, dtype=torch.bool, device=self.device)
            known = all_valid[:, :earlier] if known is None else known
            fresh = all_valid[:, :new] if given is None else given[:, -new:]
            self.valid = torch.cat([known, fresh], dim=1)
        return self.valid

    def claim(self, method: Method, layer: int, *, new: int, total: int) -> LayerState | None:
        """What `method` remembers of the tokens before the `new` last of `total`, if it does that.

        None also where it runs dense on tokens that it has not seen; it cannot select after them.

        Raises:
            ValueError: it is about to select among keys that it has not seen.
        """
        if not isinstance(method, Selector) or not method.owns_cache_state:
            return None
        if self.state is None or self.method is not method:
            self.state, self.method = method.new_state(layer), method
        if self.state is None or self.state.length == total - new:
            return self.state
        if method.worthwhile(new, total):
            raise ValueError(
                f"past_key_values holds {total - new} tokens of which method {method.name!r} has "
                f"seen {self.state.length}: start with an empty cache inside the sparsify block"
            )
        return None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the last tokens (the argument is a length before transformers 5.x)."""
        super().crop(*args, **kwargs)
        length = self.get_seq_length()
        if self.valid is not None:
            self.valid = self.valid[:, :length]
        if self.state is not None:
            self.state.crop(length)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the surviving beams."""
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid[beam_idx.to(self.valid.device)]
        if self.state is not None:
            self.state.reorder(beam_idx.long())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)
        if self.state is not None:
            self.state.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices.to(self.valid.device)]
        if self.state is not None:
            self.state.batch_select_indices(indices)

    def _forget(self) -> None:
        self.valid = self.state = self.method = None


def layer_of(cache: Any, index: int) -> SparseLayer:
    """Layer `index` of a cache, replaced by a `SparseLayer` if it is not one yet.

    Raises:
        NotImplementedError: a static, quantised or otherwise special cache.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if getattr(cache, "is_compileable", False):
        raise NotImplementedError(STATIC_CACHE)
    replicates = getattr(cache, "layer_class_to_replicate", None)
    if replicates is DynamicLayer:
        while len(cache.layers) <= index:
            cache.layers.append(SparseLayer())
    if index >= len(cache.layers):
        raise ValueError(f"past_key_values has {len(cache.layers)} layers, but layer {index} ran")
    layer: Any = cache.layers[index]
    if isinstance(layer, SparseLayer):
        return layer
    whole = type(layer) is DynamicLayer or (
        # Equal to a plain layer while nothing has left its window; the mask function refuses more.
        type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window
    )
    if not whole:
        raise NotImplementedError(
            f"past_key_values: a cache of {type(layer).__name__} is not supported, only "
            "DynamicCache is"
        )
    mine = SparseLayer.adopt(layer)
    cache.layers[index] = mine
    return mine
