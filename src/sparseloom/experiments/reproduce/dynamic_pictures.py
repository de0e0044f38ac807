"""Dynamic Sparse Attention, figures 1, 4 and 5: attention, oracle masks and predicted masks.

The paper's pictures are of its own models.  Ours are of the built-in byte model with the predictor
that is shipped with it, on two stretches of held-out text; of each layer, the head whose patterns
differ most between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, DynamicSparse, Oracle
from sparseloom.methods.quality import overlap, retained_mass

if TYPE_CHECKING:
    from sparseloom.report.html import Section

PAPER = "dsa_tc_2022"
LENGTH = 512
SPARSITY = 0.9
_PICTURE = "a picture without numbers"
_MODEL = "the built-in byte model stands in: causal, 512 bytes of held-out text, 90 % sparse"


@dataclass(frozen=True, eq=False)
class Head:
    """One head of one layer on both inputs."""

    layer: int
    head: int
    calls: tuple[AttentionInputs, AttentionInputs]
    oracle: tuple[SparseMask, SparseMask]
    predicted: tuple[SparseMask, SparseMask]

    @property
    def label(self) -> str:
        """Layer and head, from 0."""
        return f"layer {self.layer}, head {self.head}"

    def probabilities(self, which: int) -> Float[Tensor, "q_len kv_len"]:
        """Attention probabilities on input 0 or 1."""
        call = self.calls[which]
        group = call.query.shape[1] // call.key.shape[1]
        scores = call.query[0, self.head] @ call.key[0, self.head // group].T * call.scale
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)


@cache
def heads() -> tuple[Head, ...]:
    """The pictured heads; runs the model twice, which takes seconds."""
    from sparseloom.experiments.compare import capture, saved_method
    from sparseloom.models import load_model
    from sparseloom.tasks.language_modelling import StdlibBitsPerByte

    loaded = load_model("stdlib")
    task = StdlibBitsPerByte(context=LENGTH)
    task.load()
    method = saved_method(loaded)
    assert isinstance(method, DynamicSparse)
    method = replace(method, sparsity=SPARSITY, minimum_keys=1)
    oracle = Oracle(sparsity=SPARSITY, minimum_keys=1)
    first, second = (capture(loaded, inputs) for inputs in task.inputs(loaded, limit=2))
    found: list[Head] = []
    with torch.no_grad():
        for calls in zip(first, second, strict=True):
            exact = (oracle.select(calls[0]), oracle.select(calls[1]))
            predicted = (method.select(calls[0]), method.select(calls[1]))
            shared = overlap(exact[0], exact[1], is_causal=True)[0]
            found.append(Head(calls[0].layer, int(shared.argmin()), calls, exact, predicted))
    return tuple(found)


def fig1() -> list[Row]:
    """Figure 1: maps of real attention, and how few of its weights matter."""
    rows: list[Row] = []
    for head in heads():
        for threshold, published in ((0.001, "75–95 % (table 1)"), (0.01, "94–97 % (table 1)")):
            shares: list[float] = []
            for which in (0, 1):
                probabilities = head.probabilities(which)
                allowed = torch.ones_like(probabilities, dtype=torch.bool).tril()
                shares.append(float((probabilities[allowed] < threshold).float().mean()))
            rows.append(
                _row("fig1", f"{head.label}: weights below {threshold}", published, sum(shares) / 2)
            )
    return rows


def fig4() -> list[Row]:
    """Figure 4: oracle masks of real heads, which differ from input to input."""
    note = "keys that the masks of two inputs share at the same places; 0.1 if they were random"
    rows: list[Row] = []
    for head in heads():
        shared = overlap(head.oracle[0], head.oracle[1], is_causal=True)[0, head.head]
        rows.append(
            _row("fig4", f"{head.label}: overlap of two inputs", _PICTURE, float(shared), note)
        )
    return rows


def fig5() -> list[Row]:
    """Figure 5: predicted masks beside the oracle's."""
    rows: list[Row] = []
    for head in heads():
        shares: list[float] = []
        masses: list[float] = []
        for which in (0, 1):
            call, exact, ours = head.calls[which], head.oracle[which], head.predicted[which]
            shares.append(float(overlap(ours, exact, is_causal=True)[0, head.head]))
            kept = [
                retained_mass(call.query, call.key, mask, scale=call.scale, is_causal=True)
                for mask in (ours, exact)
            ]
            masses.append(float(kept[0][0, head.head] / kept[1][0, head.head]))
        rows += [
            _row("fig5", f"{head.label}: keys shared with the oracle", _PICTURE, sum(shares) / 2),
            _row("fig5", f"{head.label}: mass over the oracle's", _PICTURE, sum(masses) / 2),
        ]
    return rows


def picture(table: str) -> list[Section]:
    """The pictures of "fig1", "fig4" or "fig5"."""
    from sparseloom.report.figures import mask_figure
    from sparseloom.report.head_figures import head_grid
    from sparseloom.report.html import Section

    inputs = ("one text", "another text")
    names = [head.label for head in heads()]
    if table == "fig1":
        maps = [[head.probabilities(i).numpy() for head in heads()] for i in (0, 1)]
        figure = head_grid(maps, rows=inputs, columns=names, probabilities=True)
        text = (
            "Attention probabilities of 512 queries (down) on 512 keys (across), on a logarithmic "
            "scale: yellow is 1, dark 0.0001 and less.  The same heads read two texts."
        )
        return [Section("Attention of real heads", text, (figure,))]
    if table == "fig4":
        maps = [
            [head.oracle[i].to_bool()[0, head.head].numpy() for head in heads()] for i in (0, 1)
        ]
        figure = head_grid(maps, rows=inputs, columns=names, probabilities=False)
        text = "The tenth of the keys that matters most to each query, on the same two texts."
        return [Section("Oracle masks at 90 %", text, (figure,))]
    figures = tuple(
        mask_figure(head.oracle[0], head.predicted[0], head=head.head, name=head.label, zoom=96)
        for head in heads()
    )
    text = (
        "The oracle's mask, the mask predicted from the layer's input in INT4, and both pair by "
        "pair for the last tokens: dark where they agree."
    )
    return [Section("Oracle and predicted masks at 90 %", text, figures)]


def _row(table: str, quantity: str, published: str, ours: float, note: str | None = None) -> Row:
    return row(
        PAPER,
        table,
        quantity,
        published,
        ours,
        basis="scenario",
        assumptions=(_MODEL,),
        note=note,
    )
