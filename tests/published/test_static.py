"""Dai et al. (DAC 2023): the abstract beside our design, and the page that quotes it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparseloom.experiments import static_cost
from sparseloom.experiments.reproduce import Study, Table, find_tables, is_stored, stored_rows
from sparseloom.experiments.reproduce import reproduce as make
from sparseloom.experiments.reproduce import static_learned as learned
from sparseloom.experiments.reproduce import static_machine as machine
from sparseloom.experiments.reproduce import static_systems as systems
from sparseloom.experiments.reproduce.static_templates import encoder, templates
from sparseloom.regions import encode_heads
from sparseloom.results import read_results, results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs/reproducing_static.md"


@cache
def stored() -> dict[tuple[str, str], dict[str, Any]]:
    rows = [row.model_dump() for row in read_results(RESULTS / "static.json").rows]
    found = {(row["table"], row["quantity"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line(row: dict[str, Any]) -> str:
    """A row as the page prints it."""
    difference = "–" if row["difference"] is None else f"{row['difference']:+.0%}"
    cells = [row["table"], row["quantity"], shown(row["published"]), shown(row["ours"])]
    return "| " + " | ".join([*cells, difference, row["basis"]]) + " |"


def test_the_page_says_what_is_stored() -> None:
    text = PAGE.read_text("utf-8")
    lines = [one for one in text.splitlines() if one.startswith("| ") and one.count("|") == 7]
    lines = [one for one in lines if not one.startswith("| table")]
    assert len(lines) > 60
    known = {line(row) for row in stored().values()}
    assert [one for one in lines if one not in known] == []
    quoted = {one.split("|")[1].strip() for one in lines}
    assert {"headline", "area", "templates", "density", "length", "scope", "systems"} <= quoted


def test_rows_say_what_they_rest_on() -> None:
    names = [table.name for table in find_tables("static")]
    assert find_tables("static") == find_tables("dai_2023") == find_tables("static_dac_2023")
    assert {table for table, _ in stored()} == set(names)
    for row in stored().values():
        assert row["paper"] == "static_dac_2023"
        assert row["assumptions"], row["quantity"]
        assert row["within"] is not False, row["quantity"]
        # What a machine was fitted with is never called a prediction.
        assert row["basis"] != "predicted" or "learned" in row["table"] + row["quantity"]
    # Scope stands beside every figure of the machine.
    for (table, quantity), row in stored().items():
        if table in ("headline", "density", "length", "templates") and row["basis"] == "calibrated":
            counts = ("tiles of work over all", ": runs")
            assert "no DRAM" in quantity or quantity.endswith(counts), quantity


def test_stored_rows_are_those_of_today() -> None:
    for name in ("area", "density"):
        (table,) = find_tables("static", name)
        rows = {row["quantity"]: row["ours"] for row in make(table)}
        assert rows == pytest.approx(
            {q: row["ours"] for (t, q), row in stored().items() if t == name}
        )
    core = machine.gain("latency", 384)
    quantity = "change of energy (attention core, no DRAM, analytic, read as latency)"
    assert stored()["headline", quantity]["ours"] == pytest.approx(core.energy - 1)


def test_what_is_not_stored_is_named(tmp_path: Path) -> None:
    for name in ("accuracy", "seeds", "ablations", "learned"):
        (table,) = find_tables("static", name)
        assert is_stored(table, tmp_path)
        assert stored_rows(table, tmp_path) == []
        rows = make(table, results=tmp_path)
        assert rows
        assert all("python -m sparseloom.experiments" in row["ours"] for row in rows)


def test_a_table_without_optional_studies_still_needs_one(tmp_path: Path) -> None:
    table = Table("paper", "table", learned.accuracy, (Study("a.json"), Study("b.json")))
    assert not is_stored(table, tmp_path)
    with pytest.raises(FileNotFoundError, match="rests on a stored study"):
        stored_rows(table, tmp_path)


# -------------------------------------------------------------------- on made-up studies


def scored(label: str, method: str, density: float, loss: float, seed: int = 11) -> dict[str, Any]:
    return {
        "seed": seed,
        "task": "imdb-sentiment",
        "contender": label,
        "method": method,
        "settings": {"density": density},
        "density": density + 0.01,
        "tile_density": density,
        "dense_value": 0.8,
        "loss": loss,
        "loss_interval95": [loss - 0.008, loss + 0.008],
        "phase": "entropy",
    }


STUDY = [
    scored("static 0.4", "static", 0.4, 0.001),
    scored("static 0.25", "static", 0.25, 0.008),
    scored("static 0.15", "static", 0.15, 0.02),
    scored("window 0.4", "aligned", 0.4, 0.012),
    scored("bigbird 0.4", "aligned", 0.4, 0.03),
    scored("static 0.4, by mass", "static", 0.4, 0.024),
]


def by_quantity(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["quantity"]: row["ours"] for row in rows}


def test_accuracy_and_ablations() -> None:
    rows = by_quantity(learned.accuracy(STUDY))
    # 0.008 of 0.8 is the bound of 1 %.
    assert rows["imdb-sentiment: lowest density within 1 % of dense"] == 0.25
    assert rows["imdb-sentiment, learned, density 0.15: relative loss"] == pytest.approx(0.025)
    gap = "imdb-sentiment, density 0.4: best pattern's loss less the learned mask's"
    assert rows[gap] == pytest.approx(0.011 / 0.8)
    ablations = by_quantity(learned.ablations(STUDY))
    assert ablations == {"imdb-sentiment: static 0.4, by mass: relative loss": pytest.approx(0.03)}
    (first, *_) = learned.headline_rows(STUDY)
    assert first["ours"] == 0.25


def test_other_seeds_have_a_table_of_their_own() -> None:
    others = [
        scored("dense", "dense", 1, 0, seed=12),
        scored("static 0.4", "static", 0.4, 0.003, seed=12),
        scored("window 0.4", "aligned", 0.4, 0.004, seed=12),
    ]
    assert learned.accuracy([*STUDY, *others]) == learned.accuracy(STUDY)
    rows = {row["quantity"]: row for row in learned.seeds([*STUDY, *others])}
    of = "imdb-sentiment, {}: relative loss, {} of seeds 11, 12"
    assert {quantity: row["ours"] for quantity, row in rows.items()} == pytest.approx(
        {
            of.format("static 0.4", "mean"): 0.002 / 0.8,
            of.format("static 0.4", "largest"): 0.003 / 0.8,
            of.format("window 0.4", "mean"): 0.008 / 0.8,
            of.format("window 0.4", "largest"): 0.012 / 0.8,
        }
    )
    assert "12: 0.00375" in rows[of.format("static 0.4", "mean")]["note"]
    # Without a second seed the table names the commands that would fill it.
    assert all("--seed 1" in row["ours"] for row in learned.seeds(STUDY))


def test_learned_masks_on_the_machine() -> None:
    known = templates(128)
    words = encode_heads([known["local"], known["coarse"]])
    shape = encoder(128, layers=2, heads=2).model
    rows: list[dict[str, Any]] = [
        {**row, "task_name": "made up"}
        for row in static_cost.costs(shape, lambda length, layer: words, [128])
    ]
    assert len(rows) == 4
    assert len(results(rows).rows) == 4  # such rows can be stored
    headline = [
        row["quantity"] for row in learned.headline_rows(rows) if "made up" in row["quantity"]
    ]
    assert sum(": speed-up (" in quantity for quantity in headline) == 1
    assert sum(": change of latency (" in quantity for quantity in headline) == 1
    # Each task's longest inputs stand in the headline.
    other = [{**row, "task_name": "other", "length": 64} for row in rows]
    quantities = [row["quantity"] for row in learned.headline_rows([*rows, *other])]
    for where in ("made up, learned masks, 128 tokens", "other, learned masks, 64 tokens"):
        assert any(quantity.startswith(where) for quantity in quantities)
    for row in rows:
        # At 64 % of the array so few tokens gain no time.
        assert (row["cycles"] < row["dense_cycles"]) == (row["reading"] == "latency")
        assert row["energy_total_j"] < row["dense_energy_total_j"]
        assert row["scope"] == "attention core (QKᵀ, softmax, PV), without DRAM"
    # Two layers of a local and a coarse head of 128 tokens; counted by hand from their shapes.
    assert rows[0]["tile_density"] == pytest.approx((26 + 31) / 64)
    found = learned.learned(rows)
    assert {row["basis"] for row in found} == {"predicted"}
    assert {row["published"] for row in found} == {-0.589, 1.589, -0.566}
    wanted = rows[0]["cycles"] / rows[0]["dense_cycles"]
    (ours,) = (row["ours"] for row in systems._learned_cost(rows) if "analytic" in row["quantity"])
    assert ours == pytest.approx(wanted)


def test_models_without_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="folders must name at least one model with regions"):
        static_cost.run_study(static_cost.Study(), Path())


def test_three_systems_side_by_side() -> None:
    for system in systems.MACHINES:
        sparse, dense = systems.reports(system, 0.25)
        assert 0.2 < sparse.cycles / dense.cycles < 0.35
        assert sparse.total_energy < 0.5 * dense.total_energy
    dynamic = {**scored("dynamic 90 %", "dynamic", 0.1, 0.002)}
    dynamic.pop("phase")
    cascade = {**scored("tokens 65%", "spatten", 0.5, 0.03), "task": "sst-2"}
    cascade.pop("phase")
    untuned = {**cascade, "contender": "tokens 65%, not fine-tuned", "loss": 0.0}
    rows = by_quantity([*systems._equal_loss([*STUDY, dynamic, cascade, untuned])])
    assert rows == {
        "within 1% of dense, static (imdb-sentiment): lowest density": 0.25,
        "within 1% of dense, dynamic (imdb-sentiment): lowest density": 0.1,
        "within 1% of dense, cascade (sst-2): lowest density": "none of those tried",
    }
    near = by_quantity([*systems._equal_density_loss([*STUDY, dynamic, cascade])])
    assert near["nearest to density 0.4, cascade (sst-2, 0.5): relative loss"] == pytest.approx(
        0.0375
    )
    assert len(near) == 9
    # Every task has its own nearest one.
    bytewise = {**dynamic, "task": "stdlib", "loss": 0.004}
    near = by_quantity([*systems._equal_density_loss([*STUDY, dynamic, bytewise])])
    for task, loss in (("imdb-sentiment", 0.0025), ("stdlib", 0.005)):
        quantity = f"nearest to density 0.4, dynamic ({task}, 0.1): relative loss"
        assert near[quantity] == pytest.approx(loss)
    times = [
        {"op": "attention", "method": "static:density=0.4", "contender": "static 0.4",
         "q_len": 512, "dtype": "bfloat16", "speedup": 2.0},
        {"record": "spatten_encoder", "method": "spatten", "batch": 1, "length": 512,
         "speedup": 1.5},
    ]  # fmt: skip
    timed = by_quantity([*systems._times(times)])
    assert timed["static: measured speed-up (static 0.4, attention, bfloat16, 512 tokens)"] == 2.0
    assert "not stored" in timed["dynamic: measured speed-up (dynamic_end_to_end.json)"]


def test_ablations_of_another_seed_are_named_by_it() -> None:
    first = next(row for row in STUDY if row.get("method") == "static" and "phase" in row)
    label = f"{first['contender']}, by mass"
    rows = learned.ablations([*STUDY, {**first, "contender": label, "seed": 12}])
    assert f"{first['task']}: {label} (seed 12): relative loss" in {r["quantity"] for r in rows}
    assert all("(seed" not in row["quantity"] for row in learned.ablations(STUDY))
