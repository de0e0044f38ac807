"""The cache of a model that generates with a method that chooses what each step reads.

Keys and values of the prompt, which runs whole, are stored as the method wants them (`Stored`), and
so are those of each step. The layers of a cache share the method's memory of it, its `Run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseloom.integrations import _compat
from sparseloom.integrations.cache import SparseLayer, layer_of
from sparseloom.integrations.stored import Stored
from sparseloom.methods.base import Method
from sparseloom.methods.generation import Generating, Run


@dataclass(eq=False)
class _Shared:
    """What the layers of one cache have in common."""

    method: Generating
    layers: int
    run: Run


class GenerationLayer(SparseLayer):
    """A cache layer that stores keys and values as a method wants, and its memory of them.

    `keys` and `values` are what is stored, unpacked; a model that uses the cache outside of the
    `sparsify` block sees those.

    Args:
        shared: what the layers of the cache have in common.
        leads: whether this is the layer that makes the method's memory follow the cache.
    """

    def __init__(self, shared: _Shared, *, leads: bool) -> None:
        self.shared, self.leads = shared, leads
        self._clear()
        super().__init__()

    @property
    def run(self) -> Run:
        """The method's memory of this cache."""
        return self.shared.run

    @property
    def stored(self) -> Stored:
        """Keys and values, those that were waiting for their padding included."""
        self.settle()
        return self._stored

    @property
    def keys(self) -> Tensor | None:
        """(batch, kv_heads, length, head_dim); None before the first tokens."""
        return self.stored.floats()[0] if self.get_seq_length() else None

    @keys.setter
    def keys(self, _: object) -> None:  # the base class clears what it would hold
        pass

    @property
    def values(self) -> Tensor | None:
        """(batch, kv_heads, length, value_dim); None before the first tokens."""
        return self.stored.floats()[1] if self.get_seq_length() else None

    @values.setter
    def values(self, _: object) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values.

        Where `decode_attention` will read the planes, what is returned only has their shapes.
        """
        del args, kwargs
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        planes, self.reads_planes = self.reads_planes, False
        stored, new = self.stored, key_states.shape[2]
        if stored.key_bits is None and stored.value_bits is None:
            stored.append(key_states, value_states)
            return stored.floats()
        if new == 1 and stored.length:  # a step: its token is text
            stored.append(key_states, value_states)
            return stored.stand_ins() if planes else stored.floats()
        self._waiting = (key_states, value_states)
        if not stored.length:
            return key_states, value_states
        keys, values = stored.floats()
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def settle(self) -> None:
        """Store the tokens that were waiting until their padding is known."""
        if self._waiting is None:
            return
        (key, value), self._waiting = self._waiting, None
        total = self._stored.length + key.shape[2]
        valid = self.valid
        if valid is not None:
            valid = valid[:, -key.shape[2] :] if valid.shape[1] == total else None
        self._stored.append(key, value, valid)

    def get_seq_length(self, *args: Any) -> int:
        """Tokens held."""
        del args
        waiting = 0 if self._waiting is None else self._waiting[0].shape[2]
        return self._stored.length + waiting

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self._forget()
        self.is_initialized = False
        if self.leads:
            self.shared.run = self.shared.method.new_run(self.shared.layers)

    def crop(self, tokens: int) -> None:
        """Drop the last tokens: a negative number of them, or a length."""
        length = tokens
        if tokens < 0:
            length = max(0, self.get_seq_length() + tokens)
        elif tokens == 0 and _compat.MAJOR >= 5:
            return
        if length >= self.get_seq_length():
            return
        self.stored.crop(length)
        if self.valid is not None:
            self.valid = self.valid[:, :length]
        if self.leads:
            self.run.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the surviving beams."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.get_seq_length():
            keys = self.stored.stand_ins()[0]
            each = torch.arange(keys.shape[0], device=keys.device)
            self._select(each.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self._select(indices)

    def _select(self, indices: Tensor) -> None:
        if not self.get_seq_length():
            return
        indices = indices.long().to(self.device)
        self.stored.select(indices)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, indices)
        if self.leads:
            self.run.select(indices)

    def _clear(self) -> None:
        method = self.shared.method
        self._stored = Stored(method.stored_key_bits, method.stored_value_bits)
        self._waiting: tuple[Tensor, Tensor] | None = None
        self.reads_planes = False


def generation_layer(
    cache: Any, index: int, method: Method, layers: int, number: int
) -> GenerationLayer:
    """Layer `index` of a cache, replaced by one for this method if it is not one yet.

    Args:
        cache: transformers' cache.
        index: of the layer in the cache.
        method: a `Generating` method.
        layers: attention layers of the model.
        number: of this one among them.

    Raises:
        NotImplementedError: a static, quantised or otherwise special cache.
        ValueError: the layer holds tokens that the method has not seen.
    """
    assert isinstance(method, Generating)
    layer = layer_of(cache, index)
    cache = getattr(cache, "self_attention_cache", cache)
    if isinstance(layer, GenerationLayer) and layer.shared.method == method:
        return layer
    if layer.get_seq_length():
        raise ValueError(
            f"past_key_values holds {layer.get_seq_length()} tokens that method {method.name!r} "
            "has not seen: start with an empty cache inside the sparsify block"
        )
    found = (one for one in cache.layers if isinstance(one, GenerationLayer))
    shared = next((one.shared for one in found if one.shared.method == method), None)
    if shared is None:
        shared = _Shared(method, layers, method.new_run(layers))
    mine = GenerationLayer(shared, leads=number == 0)
    cache.layers[index] = mine
    return mine
