"""The page on DOTA quotes stored rows, and they cover what the paper claims."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparseloom.experiments.reproduce import find_tables
from sparseloom.experiments.reproduce.dota_speed import ATTENTION, END_TO_END, OVER_ELSA
from sparseloom.results import read_results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


@cache
def stored() -> dict[tuple[str, str], dict[str, Any]]:
    rows = [row.model_dump() for row in read_results(RESULTS / "dota.json").rows]
    return {(row["table"], row["quantity"]): row for row in rows}


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line(row: dict[str, Any]) -> str:
    """A row as the page prints it."""
    difference = "–" if row["difference"] is None else f"{row['difference']:+.0%}"
    cells = [row["table"], row["quantity"], shown(row["published"]), shown(row["ours"])]
    return "| " + " | ".join([*cells, difference, row["basis"]]) + " |"


def quoted() -> list[str]:
    """Lines of the page's table of results."""
    text = (ROOT / "docs/reproducing_dota.md").read_text("utf-8")
    return text.split("| table | quantity |")[1].split("\n\n")[0].splitlines()[2:]


def test_the_page_says_what_is_stored() -> None:
    lines = quoted()
    assert len(lines) > 40
    wrong = [
        one
        for one in lines
        for table, quantity in [[cell.strip() for cell in one.split("|")[1:3]]]
        if (table, quantity) not in stored() or one != line(stored()[table, quantity])
    ]
    assert not wrong
    # The module sums and the closed form are regressions of ours, and not the page's subject.
    named = {one.split("|")[1].strip() for one in lines}
    assert named == {table for table, _ in stored()} - {"closed-form", "trends"}


def test_every_table_is_stored() -> None:
    assert {table for table, _ in stored()} == {table.name for table in find_tables("dota")}


@pytest.mark.parametrize("case", ["C", "A"])
def test_headlines_have_both_means_and_are_no_evidence(case: str) -> None:
    headlines = {
        ("fig17a", f"DOTA-{case}: attention over V100, unfused"): ATTENTION[case],
        ("fig17a", f"DOTA-{case}: attention over ELSA"): OVER_ELSA[case],
        ("fig17b", f"DOTA-{case}: end to end over V100, unfused"): END_TO_END[case],
    }
    for (table, quantity), published in headlines.items():
        for mean in ("arithmetic", "geometric"):
            row = stored()[table, f"{quantity} ({mean} mean of five)"]
            assert row["published"] == published
            assert row["basis"] == "scenario"
            assert row["within"] is None
            assert row["note"]
            assert any("our default, chosen with the published" in a for a in row["assumptions"])


def test_only_recorded_masks_are_evidence() -> None:
    ratios = {key: row for key, row in stored().items() if key[0] in ("fig17a", "scheduler")}
    predicted = [key for key, row in ratios.items() if row["basis"] == "predicted"]
    assert predicted
    for key in predicted:
        assert any("recorded from one input" in text for text in stored()[key]["assumptions"])
    names = {"SQuAD", "Image", "Text", "Retrieval", "LM"}
    assert not any(key[1].rsplit(": ", 1)[-1] in names for key in predicted)


def test_the_scheduler_saves_loads_on_real_masks() -> None:
    rows = {key[1]: row["ours"] for key, row in stored().items() if key[0] == "scheduler"}
    cases = {quantity.split(":")[0] for quantity in rows}
    assert len(cases) >= 2
    for case in cases:
        ratios = [
            rows[f"{case}: out of order, T = {n}: loads over row by row"] for n in range(1, 9)
        ]
        assert ratios[0] == 1
        assert ratios == sorted(ratios, reverse=True)
        least = rows[f"{case}: out of order, T = 4: least possible loads over row by row"]
        assert least <= ratios[3] <= 1.01 * least
        # Queries side by side keep the same keys far more often than by chance.
        assert ratios[3] < rows[f"{case}: out of order, T = 4: the same were keys random"]
        assert ratios[3] < rows[f"{case}: in order, T = 4: loads over row by row"]
