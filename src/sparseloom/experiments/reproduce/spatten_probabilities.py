"""SpAtten (HPCA 2021), figure 7: rows that one probability dominates hardly feel quantised keys.

The rows are those of the built-in byte model on held-out text.  What the paper takes the mean over
is not printed, nor how long its rows are; an error per key falls with their number.  So rows of a
short sentence's length stand beside long ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.kernels.common import fold_groups, unfold_groups
from sparseloom.kernels.planes import PlaneCache
from sparseloom.quantize import quantize

if TYPE_CHECKING:
    from sparseloom.methods import AttentionInputs
    from sparseloom.report.html import Section

PAPER = "spatten_hpca_2021"
LENGTH, TEXTS = 512, 2
LOW_BITS = 4
THRESHOLD = 0.1
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Keys of a row, first and last.
ROWS = {"rows of 8–16 keys": (8, 16), "rows of 256–512 keys": (256, 512)}


@dataclass(frozen=True, slots=True)
class Width:
    """Bits of the keys, whether they are a high plane with four more bits below, and queries'."""

    bits: int
    plane: bool = True
    queries: bool = False


WIDTHS = {
    "keys and queries of 4 bits": Width(4, plane=False, queries=True),
    "keys of 4 bits": Width(4, plane=False),
    "high plane of 4+4": Width(4),
    "high plane of 6+4": Width(6),
    "high plane of 8+4": Width(8),
}
_add = partial(row, PAPER, "fig7", basis="scenario")
_MODEL = f"the built-in byte model stands in: causal, {LENGTH} bytes of {TEXTS} held-out texts"
_PUBLISHED = {0: "a cloud of 2–8 % around 0.2, trend near 6 %", 4: "near 0 % at 1"}


@dataclass(frozen=True, eq=False)
class Rows:
    """Query rows of one kind, all layers, heads and texts.

    Attributes:
        largest: largest probability of each row, with exact keys.
        error: mean |change| of its probabilities, by width of the keys.
        high: largest probability of each row that the keys of a width give.
    """

    largest: Float[Tensor, " rows"]
    error: dict[str, Float[Tensor, " rows"]]
    high: dict[str, Float[Tensor, " rows"]]

    def mean_error(self, width: str, chosen: Bool[Tensor, " rows"]) -> float:
        """Mean over some rows; NaN for none."""
        return float(self.error[width][chosen].mean())

    def within(self, i: int) -> Bool[Tensor, " rows"]:
        """Rows whose largest probability lies between two edges."""
        top = self.largest <= EDGES[i + 1] if i + 2 == len(EDGES) else self.largest < EDGES[i + 1]
        return (self.largest >= EDGES[i]) & top


@cache
@torch.no_grad()
def measured() -> dict[str, Rows]:
    """Rows by kind; runs the model, which takes seconds."""
    from sparseloom.experiments.compare import capture
    from sparseloom.models import load_model
    from sparseloom.tasks.language_modelling import StdlibBitsPerByte

    loaded = load_model("stdlib")
    task = StdlibBitsPerByte(context=LENGTH)
    task.load()
    calls = [
        call for inputs in task.inputs(loaded, limit=TEXTS) for call in capture(loaded, inputs)
    ]
    parts = {kind: [_errors(call, *span) for call in calls] for kind, span in ROWS.items()}
    return {
        kind: Rows(
            torch.cat([one.largest for one in found]),
            {width: torch.cat([one.error[width] for one in found]) for width in WIDTHS},
            {width: torch.cat([one.high[width] for one in found]) for width in WIDTHS},
        )
        for kind, found in parts.items()
    }


def fig7() -> list[Row]:
    """Figure 7: error of the probabilities against the largest one, keys quantised."""
    rows: list[Row] = []
    for kind, found in measured().items():
        for width, kept in WIDTHS.items():
            for i, (low, high) in enumerate(pairwise(EDGES)):
                chosen = found.within(i)
                if not bool(chosen.any()):
                    continue
                rows.append(
                    _add(
                        f"{kind}, {width}, largest probability {low:g}–{high:g}: "
                        "mean error per key, %",
                        _PUBLISHED.get(i, "falls in between")
                        if kept.bits == 4
                        else "not published",
                        100 * found.mean_error(width, chosen),
                        assumptions=(_MODEL,),
                        note=f"{int(chosen.sum())} of {len(chosen)} rows",
                    )
                )
            if kept.plane:
                rows += _refetched(kind, width, found)
    return rows


def fig7_picture(study: list[Row]) -> list[Section]:
    """Mean error by largest probability, one line per width."""
    from sparseloom.report.bar_figures import lines
    from sparseloom.report.html import Section

    del study
    sections: list[Section] = []
    for kind, found in measured().items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for width in WIDTHS:
            for i, (low, high) in enumerate(pairwise(EDGES)):
                chosen = found.within(i)
                if bool(chosen.any()):
                    error = 100 * found.mean_error(width, chosen)
                    curves.setdefault(width, []).append(((low + high) / 2, error))
        figure = lines(
            curves, x_title="largest probability of the row", y_title="mean error per key, %"
        )
        text = (
            f"Keys of the built-in byte model, quantised, {kind}: where one key dominates, its row "
            "hardly changes."
        )
        sections.append(Section(f"Error of quantised keys, {kind}", text, (figure,)))
    return sections


def _refetched(kind: str, width: str, found: Rows) -> list[Row]:
    """What the rule of §III-D does with these rows: flat ones fetch their low bits."""
    flat = found.high[width] < THRESHOLD
    error = found.error[width]
    given = (
        _MODEL,
        f"rows fetch their low bits where the largest probability is below {THRESHOLD}",
    )
    return [
        _add(f"{kind}, {width}: rows that fetch low bits, %", "5.9 on average",
             100 * float(flat.float().mean()), assumptions=given),
        _add(f"{kind}, {width}: their share of the summed error, %", "not published",
             100 * float(error[flat].sum() / error.sum()), assumptions=given),
    ]  # fmt: skip


def _errors(call: AttentionInputs, first: int, last: int) -> Rows:
    """The rows of one call that see `first` to `last` keys."""
    exact = _probabilities(call, call.key.float())
    seen = torch.arange(1, exact.shape[-1] + 1)
    chosen = (seen >= first) & (seen <= last)
    error: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    for width, kept in WIDTHS.items():
        low = LOW_BITS if kept.plane else 0
        planes = PlaneCache.from_tensors(
            call.key.float(), call.key.float(), msb_bits=kept.bits, lsb_bits=low
        )
        keys = planes.high_keys(planes.key_msb) * planes.key_scale
        ours = _probabilities(call, keys, kept.bits if kept.queries else None)
        change = (ours - exact).abs().sum(-1) / seen
        error[width] = change[..., chosen].flatten()
        high[width] = ours[..., chosen, :].amax(-1).flatten()
    return Rows(exact[..., chosen, :].amax(-1).flatten(), error, high)


def _probabilities(
    call: AttentionInputs,
    key: Float[Tensor, "batch kv_heads length head_dim"],
    query_bits: int | None = None,
) -> Float[Tensor, "batch heads length length"]:
    """Causal attention probabilities with these keys."""
    heads, query = call.query.shape[1], call.query.float()
    if query_bits is not None:
        query = quantize(query, query_bits, granularity="matrix", clip="max").dequantize()
    scores = unfold_groups(fold_groups(query, key.shape[1]) @ key.mT, heads) * call.scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)
