"""Regions of every layer and head for inputs of several lengths, as stored beside a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseloom.kernels.regions import RegionPlan, plan_regions
from sparseloom.regions import HeadRegions, decode_heads, encode_heads

_PLANS = 512  # kept at a time: of each layer one for every length of input

LayerRegions = tuple[HeadRegions, ...]


class RegionTable(nn.Module):
    """Regions by length of input, layer and head, and the plans made of them.

    An input uses the regions of the smallest length that holds it, clipped to its own.  Plans are
    made when they are first needed and kept with the table.

    Buffers: `words`, the 64-bit words of all heads in order; `counts`, words of each head;
    `lengths`, ascending; `density`, what the regions were chosen for.
    """

    words: Tensor
    counts: Tensor
    lengths: Tensor
    density: Tensor

    def __init__(self, words: int, lengths: int, layers: int, heads: int) -> None:
        super().__init__()
        self.register_buffer("words", torch.zeros(words, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(lengths, layers, heads, dtype=torch.int64))
        self.register_buffer("lengths", torch.zeros(lengths, dtype=torch.int64))
        self.register_buffer("density", torch.zeros((), dtype=torch.float64))
        self._heads: dict[tuple[int, int], LayerRegions] = {}
        self._plans: dict[tuple[Any, ...], RegionPlan] = {}
        self._known: tuple[int, ...] = ()

    @classmethod
    def of(cls, regions: Mapping[int, Sequence[LayerRegions]], density: float) -> RegionTable:
        """A table of regions by length, layer and head.

        Raises:
            ValueError: no lengths, lengths that differ in layers or heads, or a head without a
                region or with more than hardware holds (`regions.encode_heads`).
        """
        if not regions:
            raise ValueError("regions must hold at least one length, got none")
        shapes = {tuple(len(heads) for heads in layers) for layers in regions.values()}
        if len(shapes) > 1 or len(set(next(iter(shapes)))) != 1:
            raise ValueError(f"regions must have the same heads in all layers, got {shapes}")
        lengths = sorted(regions)
        every = [head for n in lengths for layer in regions[n] for head in layer]
        words = encode_heads(every)
        layers = len(regions[lengths[0]])
        made = cls(len(words), len(lengths), layers, len(every) // (len(lengths) * layers))
        made.words.copy_(torch.from_numpy(words.view(np.int64)))
        counts = torch.tensor([len(head) for head in every])
        made.counts.copy_(counts.view(made.counts.shape))
        made.lengths.copy_(torch.tensor(lengths))
        made.density.fill_(density)
        return made

    @property
    def layers(self) -> int:
        """Layers."""
        return self.counts.shape[1]

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.counts.shape[2]

    def length_for(self, kv_len: int) -> int:
        """The length whose regions an input of `kv_len` tokens uses.

        Raises:
            ValueError: the input is longer than all of them.
        """
        known = self._known = self._known or tuple(self.lengths.tolist())
        for length in known:
            if kv_len <= length:
                return length
        raise ValueError(
            f"kv_len must be at most {known[-1]}, the longest input that static has regions for, "
            f"got {kv_len}"
        )

    def regions(self, kv_len: int, layer: int) -> LayerRegions:
        """The regions of a layer's heads for inputs of `kv_len` tokens.

        Raises:
            ValueError: a longer input, or another layer, than there are regions for.
        """
        if layer >= self.layers:
            raise ValueError(
                f"layer must be below {self.layers}, the layers that static has regions for, "
                f"got {layer}"
            )
        if not self._heads:
            words = self.words.cpu().numpy().view(np.uint64)
            every = iter(decode_heads(words))
            for length in self.lengths.tolist():
                for number in range(self.layers):
                    self._heads[length, number] = tuple(next(every) for _ in range(self.heads))
        return self._heads[self.length_for(kv_len), layer]

    def encoded(self, kv_len: int, layer: int) -> np.ndarray:
        """The words of a layer's heads, uint64 (words,)."""
        return encode_heads(self.regions(kv_len, layer))

    def plan(self, kv_len: int, layer: int, *, is_causal: bool, device: torch.device) -> RegionPlan:
        """The plan of a layer for whole inputs of `kv_len` tokens, made once."""
        key = kv_len, layer, is_causal, device
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= _PLANS:
                self._plans.pop(next(iter(self._plans)))
            regions = self.regions(kv_len, layer)
            found = plan_regions(regions, kv_len, kv_len, is_causal=is_causal).to(device)
            self._plans[key] = found
        return found

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch has it; what was decoded from the earlier buffers is forgotten."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_heads": {}, "_plans": {}, "_known": ()}

    def _forget(self) -> None:
        self._heads, self._plans, self._known = {}, {}, ()
