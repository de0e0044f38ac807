"""One published number beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseloom.results import Basis

Row = dict[str, Any]


def row(
    paper: str,
    table: str,
    quantity: str,
    published: float | str,
    ours: float | str,
    *,
    basis: Basis,
    tolerance: float | None = None,
    assumptions: Sequence[str] = (),
    note: str | None = None,
) -> Row:
    """A row of the results schema (`reproduce`).

    Args:
        paper, table, quantity: what is compared.
        published: a number, or words where the paper gives no number.
        ours: what we get; words where there is nothing yet.
        basis: "identity" (the same arithmetic), "calibrated" (fitted to this number),
            "predicted" (neither), "scenario" (needs an unpublished assumption, named here).
        tolerance: the largest |difference| that counts as agreement; None = only reported.
        assumptions, note: what the comparison rests on.

    `difference` is (ours − published) / published, where there is a number.
    """
    difference = None
    if not isinstance(published, str) and not isinstance(ours, str):
        difference = ours / published - 1 if published else float(ours != published)
    within = None if tolerance is None or difference is None else abs(difference) <= tolerance
    return {
        "paper": paper,
        "table": table,
        "quantity": quantity,
        "published": published,
        "ours": ours,
        "difference": difference,
        "tolerance": tolerance,
        "within": within,
        "basis": basis,
        "assumptions": list(assumptions),
        "note": note,
    }
