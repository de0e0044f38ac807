"""Static structured sparse attention: masks of dense regions, chosen once for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt64
from torch import Tensor

from sparseloom.kernels.regions import region_attention, tile_mask
from sparseloom.mask import SparseMask
from sparseloom.methods.attender import refuse_cache
from sparseloom.methods.base import Attender, AttentionInputs, AttentionShape, Selector
from sparseloom.methods.learned import Learned, MethodShape, load_weights, read_sizes
from sparseloom.methods.prefix import drop_keys
from sparseloom.methods.region_candidates import allowed_tiles
from sparseloom.methods.region_search import (
    FORCE,
    Budget,
    By,
    SearchSettings,
    forced_within,
    search,
)
from sparseloom.methods.region_table import RegionTable
from sparseloom.methods.settings import check_choice
from sparseloom.methods.tile_statistics import TileStatistics
from sparseloom.quantize import fake_quantize
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, Mode, band, computed_tiles, owners


@dataclass(frozen=True)
class StaticSparse(Selector, Attender, Learned):
    """After Dai et al. (DAC 2023): fixed masks of dense regions, skipped outside, reduced inside.

    The paper's abstract says as much; region design, selection and weights are ours.  Every head
    of every layer has up to 8 regions (16 with coarse ones) on tiles of 16 queries × 32 keys:
    bands, stripes, rows and blocks of positions.  Inside a FULL region scores are exact; in a
    COARSE one, segments of 2, 4 or 8 keys stand as their mean, weighted by their number.  Layers
    without coarse regions run as any mask does, the others through `sparseloom.kernels.regions`.

    `fit` chooses the regions for a model as it is; `sl.adapt` fine-tunes it before and after.
    Masks are clipped to the input at hand; an input longer than those calibrated is refused.

    Args:
        density: tiles of work over the tiles in which any pair is allowed, over all layers and
            heads.  Regions belong to one density: choose anew for another.
        by: what tiles are valued by: `"saliency"`, what the answer hangs on, or `"mass"`, where
            attention goes.
        coarse: whether regions may be coarse.
        budget: one `"global"` budget for all heads, or equal ones for every `"head"`.
        force: what every head keeps: the tiles on the `"diagonal"`, or `"all"`: the first query
            tile (not in causal models) and the first key tile as well.
        bits: width of the codes that queries, keys and values are rounded to, in training and
            after, with one scale per token; none leaves them.
        regions: the regions of all layers and heads.
    """

    name: ClassVar[str] = "static"

    density: float = 0.4
    by: By = "saliency"
    coarse: bool = True
    budget: Budget = "global"
    force: Literal["all", "diagonal"] = "all"
    bits: int | None = None
    regions: RegionTable | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("force", self.force, ("all", "diagonal"))
        if self.bits is not None and not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be in [2, 16] or none, got {self.bits}")
        self.search  # noqa: B018  (checks the other settings)

    # ------------------------------------------------------------------ choosing

    @property
    def search(self) -> SearchSettings:
        """How regions are chosen."""
        force = FORCE if self.force == "all" else FORCE[:1]
        return SearchSettings(
            self.density, by=self.by, coarse=self.coarse, budget=self.budget, force=force
        )

    @classmethod
    def fit(
        cls,
        model: Any,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        density: float = 0.4,
        **more: Any,
    ) -> StaticSparse:
        """A method with regions for `model`, which stays as it is.

        Args:
            model: a supported Hugging Face model.
            batches: keyword arguments of the model's forward; with `labels` the margin of the
                right class counts, without them that of the class that the model finds.
            density: see the class.
            more: `lengths` and `objective` of `sparseloom.training.select_regions`, and the other
                settings of the class.

        Raises:
            ValueError: as `select_regions`.
        """
        # The one method that has to run a model; what runs models lies above this module.
        from sparseloom.training.static import select_regions

        running = {key: more.pop(key) for key in ("lengths", "objective") if key in more}
        return select_regions(model, cls(density=density, **more), batches, **running)

    def chosen(self, statistics: Iterable[TileStatistics]) -> StaticSparse:
        """With regions for the lengths that there are statistics of.

        Raises:
            ValueError: there are none, or the budget does not hold what is forced.
        """
        found = {one.length: search(one, self.search).regions for one in statistics}
        return dataclasses.replace(self, regions=RegionTable.of(found, self.density))

    # ------------------------------------------------------------------ weights

    @property
    def module(self) -> RegionTable | None:
        """The regions."""
        return self.regions

    def initialise(self, shape: MethodShape, *, seed: int = 0) -> StaticSparse:
        """With the same regions in every head: what is forced, and the widest band beside it.

        Where nothing was calibrated this is all that can be said; `seed` has no part in it.

        Raises:
            ValueError: the model names no longest input, or the density does not hold what is
                forced.
        """
        del seed
        length, causal = shape.max_length, shape.is_causal
        if length < 1:
            raise ValueError("max_length of the model is not known: use fit instead")
        regions = forced_within(self.search, length, is_causal=causal)
        most = self.density * allowed_tiles(length, is_causal=causal)
        for width in range(16, 2 * length + 32, 16):
            wider = (*regions[1:], band(-(width // 32) * 16, width, causal=causal))
            if computed_tiles(wider, length, length) > most:
                break
            regions = (wider[-1], *wider[:-1])
        heads = (regions,) * shape.heads
        table = RegionTable.of({length: (heads,) * shape.layers}, self.density)
        return dataclasses.replace(self, regions=table)

    def sizes(self) -> dict[str, int | bool]:
        """Layers, heads, lengths and words of the table."""
        if self.regions is None:
            raise ValueError("static has no regions whose sizes could be asked for")
        lengths, layers, heads = self.regions.counts.shape
        words = len(self.regions.words)
        return {"layers": layers, "heads": heads, "lengths": lengths, "words": words}

    def restore(
        self, sizes: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> StaticSparse:
        """With stored regions."""
        found = read_sizes(sizes, ("layers", "heads", "lengths", "words"), kind="static")
        table = RegionTable(found["words"], found["lengths"], found["layers"], found["heads"])
        load_weights(table, state, kind="static")
        return dataclasses.replace(self, regions=table)

    # ------------------------------------------------------------------ running

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether there is more than one key tile."""
        return q_len > 0 and kv_len > TILE_KEYS

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The tiles that the regions own, shared by the batch; pooled ones are among them."""
        q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        if q_len == kv_len:
            return self._plan(inputs).tiles
        shift = kv_len - q_len
        regions = self._table().regions(kv_len, inputs.layer)
        tiles = np.stack([owners(head, kv_len, kv_len) >= 0 for head in regions])
        if shift % TILE_QUERIES == 0:
            return tile_mask(tiles[:, shift // TILE_QUERIES :], q_len, kv_len).to(
                inputs.query.device
            )
        rows = np.arange(shift, kv_len) // TILE_QUERIES  # queries that begin inside a tile
        keep = torch.from_numpy(tiles[:, rows])[None]
        mask = SparseMask.from_block_bool(
            keep, block_size=(1, TILE_KEYS), q_len=q_len, kv_len=kv_len
        )
        return mask.to(inputs.query.device)

    def replaces(self, inputs: AttentionInputs) -> bool:
        """Whether some region of the layer is coarse, or codes are rounded."""
        if not self.worthwhile(inputs.query.shape[2], inputs.key.shape[2]):
            return False
        regions = self._table().regions(inputs.key.shape[2], inputs.layer)
        coarse = any(region.mode is not Mode.FULL for head in regions for region in head)
        return coarse or self.bits is not None

    def attend(
        self, inputs: AttentionInputs, *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch heads q_len value_dim"]:
        """One softmax over all regions of a row; attention dropout drops whole keys."""
        refuse_cache(self.name, inputs, "coarse regions stand for means over whole inputs")
        if inputs.value is None:
            raise ValueError("inputs.value is missing: the call was recorded without values")
        query, key, value = inputs.query, inputs.key, drop_keys(inputs.value, dropout_p)
        if self.bits is not None:
            query, key, value = (
                fake_quantize(x, self.bits, granularity="row") for x in (query, key, value)
            )
        out = region_attention(
            query,
            key,
            value,
            self._plan(inputs),
            key_padding=inputs.key_padding,
            scale=inputs.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(out, Tensor)
        return out

    def macs(self, shape: AttentionShape) -> int:
        """Whole tiles of work, 2 · 16 · 32 · head_dim each, of the mean head of all layers."""
        table = self._table()
        every = [self._tiles(shape.kv_len, layer) for layer in range(table.layers)]
        one = sum(every) * _tile_macs(shape) // (table.layers * table.heads)
        return shape.batch * shape.heads * one

    def call_macs(self, inputs: AttentionInputs) -> int:
        """Whole tiles of work of the call's layer, alignment to tiles and padding included."""
        tiles = self._tiles(inputs.key.shape[2], inputs.layer)
        groups = inputs.query.shape[1] // self._table().heads
        return inputs.query.shape[0] * groups * tiles * _tile_macs(inputs.shape)

    def tile_density(self, kv_len: int, *, is_causal: bool) -> float:
        """Tiles of work over allowed tiles, at one length: what the machine computes."""
        table = self._table()
        tiles = sum(self._tiles(kv_len, layer) for layer in range(table.layers))
        allowed = allowed_tiles(kv_len, is_causal=is_causal)
        return tiles / (table.layers * table.heads * allowed)

    def encoded(self, inputs: AttentionInputs) -> UInt64[np.ndarray, " words"]:
        """The 64-bit words of the regions of the call's heads, for traces."""
        return self._table().encoded(inputs.key.shape[2], inputs.layer)

    # ------------------------------------------------------------------ private

    def _table(self) -> RegionTable:
        if self.regions is None:
            raise ValueError(
                "static has no regions yet: choose them with StaticSparse.fit or sl.adapt, or "
                "load them"
            )
        if abs(float(self.regions.density) - self.density) > 1e-9:
            raise ValueError(
                f"density must be {float(self.regions.density):g}, what the regions were chosen "
                f"for, got {self.density:g}: choose them anew with StaticSparse.fit"
            )
        return self.regions

    def _plan(self, inputs: AttentionInputs) -> Any:
        kv_len, device = inputs.key.shape[2], inputs.query.device
        return self._table().plan(kv_len, inputs.layer, is_causal=inputs.is_causal, device=device)

    def _tiles(self, kv_len: int, layer: int) -> int:
        regions = self._table().regions(kv_len, layer)
        return sum(computed_tiles(head, kv_len, kv_len) for head in regions)


def _tile_macs(shape: AttentionShape) -> int:
    return 2 * TILE_QUERIES * TILE_KEYS * shape.head_dim
