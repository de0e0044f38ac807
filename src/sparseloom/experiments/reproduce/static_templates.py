"""Head templates of our model of Dai et al. (DAC 2023): shapes that heads of an encoder take.

The shapes, their mix and the constants of the energy table were fitted together to the published
headline. They are what the closed form is tested against, and no evidence for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparseloom.regions import (
    HeadRegions,
    Mode,
    band,
    block,
    encode_heads,
    owners,
    rows,
    stripe,
)
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

MIX: Mapping[str, int] = {
    "local": 46, "stripe": 22, "sep": 24, "block": 26, "coarse": 22, "dense": 4,
}  # fmt: skip
"""Heads of each template among the 144 of BERT-base."""

LAYERS, HEADS, HEAD_DIM = 12, 12, 64
_QUESTION = 64  # tokens of the packed question: four query tiles, two key tiles


def templates(length: int) -> dict[str, HeadRegions]:
    """The templates for so many tokens; the first query tile, that of [CLS], sees every key.

    local: a tile to either side of the diagonal and the first column. stripe: two columns and the
    diagonal. sep: the columns of [CLS] and [SEP] and the diagonal. block: the question among
    itself, the passage two tiles to either side within itself, and the first column. coarse: local,
    and everything else by means of four keys. dense: one region.
    """
    first = rows(0, 1, length)
    column, diagonal, near = stripe(0, 32), band(0, 16), band(-32, 80)
    return {
        "local": (first, near, column),
        "stripe": (first, stripe(0, 64), diagonal),
        "sep": (first, column, stripe(64, 32), diagonal),
        "block": (
            first,
            block(0, 4, 0, _QUESTION),
            # The band of the passage, cut off at the question.
            block(4, 6, _QUESTION, 96),
            block(6, 8, _QUESTION, 128),
            band(-64, 144, r0=8),
            column,
        ),
        "coarse": (first, near, column, stripe(0, length, mode=Mode.COARSE, segment=4)),
        "dense": (stripe(0, length),),
    }


def encoder(length: int, *, layers: int = LAYERS, heads: int = HEADS) -> Workload:
    """BERT-base, or so many layers and heads of its size, on one sequence."""
    shape = ModelShape(
        layers=layers,
        hidden_size=heads * HEAD_DIM,
        heads=heads,
        kv_heads=heads,
        head_dim=HEAD_DIM,
        intermediate_size=4 * heads * HEAD_DIM,
    )
    operators = transformer_operators(shape, q_len=length, head=False)
    return Workload(shape, operators, name=f"encoder of {length} tokens")


def selection(name: str, layers: Sequence[Sequence[HeadRegions]], length: int) -> Selection:
    """The regions of every layer's heads as a selection, with the masks of their tiles."""
    calls = [
        AttentionCall(mask=tile_mask(heads, length), regions=encode_heads(heads))
        for heads in layers
    ]
    return Selection(name, tuple(calls))


def tile_mask(heads: Sequence[HeadRegions], length: int, *, is_causal: bool = False) -> MaskArrays:
    """The tiles of 16 queries by 32 keys that the regions of some heads own."""
    owned = np.stack([owners(regions, length, length) >= 0 for regions in heads])
    counts = np.concatenate([[0], np.cumsum(owned.sum(axis=2, dtype=np.int64).reshape(-1))])
    tiles = owned.shape[1]
    at = np.arange(len(heads))[:, None] * tiles + np.arange(tiles + 1)
    indices = np.nonzero(owned)[2].astype(np.int32)
    offsets = counts[at][None].astype(np.int64)
    return MaskArrays(indices, offsets, (16, 32), length, length, is_causal)


def template_trace(length: int) -> Trace:
    """One layer of one head: every template is a selection, as a mask alone beside its regions."""
    selections: dict[str, Selection] = {}
    for name, regions in templates(length).items():
        one = selection(name, [[regions]], length)
        selections[name] = one
        if name != "coarse":
            alone = AttentionCall(mask=one.calls[0].mask)
            selections[f"{name}, mask alone"] = Selection(f"{name}, mask alone", (alone,))
    return Trace(encoder(length, layers=1, heads=1), selections)


def mix_trace(length: int) -> Trace:
    """BERT-base with the mix of templates on its 144 heads, as the selection "mix"."""
    known = templates(length)
    every = [known[name] for name, count in MIX.items() for _ in range(count)]
    layers = [every[i : i + HEADS] for i in range(0, len(every), HEADS)]
    return Trace(encoder(length), {"mix": selection("mix", layers, length)})
