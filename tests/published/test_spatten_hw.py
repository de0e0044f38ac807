"""SpAtten's hardware tables: structure of every row, and the rows that rest on arithmetic alone.

Only short simulations run here; `sparseloom reproduce spatten-hw` runs them all, and
`results/spatten_hw.json` holds what it found.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparseloom.experiments.reproduce import find_tables
from sparseloom.experiments.reproduce import spatten_runs as runs
from sparseloom.experiments.reproduce.spatten_area import area_rows, power_rows
from sparseloom.experiments.reproduce.spatten_power import parts
from sparseloom.experiments.reproduce.spatten_published import (
    E2E_HEADLINE,
    FIGURE_14,
    FIGURE_15,
    HEADLINE,
    means,
)
from sparseloom.experiments.reproduce.spatten_speed import headline
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.results import read_results

COLA = "bert-base-cola"
TOKEN: dict[str, tuple[int, ...]] = {COLA: (), runs.SMALL: (18,)}
ROOT = Path(__file__).parents[2]
# Rows that docs/reproducing_spatten.md quotes.
QUOTED: dict[str, tuple[str, ...]] = {
    "headline": (
        "reduction of tokens and values, all 30 (arithmetic mean)",
        "reduction of tokens and values, GPT-2 (geometric mean)",
        "reduction of heads, all 30 (arithmetic mean)",
        "reduction of computation, all 30 (arithmetic mean)",
        "reduction of DRAM access, fetched bytes, all 30 (arithmetic mean)",
        "reduction of DRAM access, fetched bytes, all 30 (geometric mean)",
    ),
    "table2": (
        "power of logic (W), tables alone, one bank per SRAM, simulated activity",
        "power of SRAM (W), tables alone, one bank per SRAM, simulated activity",
        "power of SRAM (W), tables alone, banks of 512 bits, simulated activity",
        "power of DRAM (W), tables alone, one bank per SRAM, simulated activity",
    ),
    "fig13": (
        "area (mm²), tables alone, one bank per SRAM",
        "area (mm²), tables alone, banks of 512 bits",
        "area (mm²), one factor per module, one bank per SRAM",
    ),
    "table3": (
        "SpAtten-1/8 over A3, throughput, one unit for both",
        "SpAtten-1/8 simulated, GOP/s (two operations per MAC)",
        "SpAtten-1/8 simulated, GOP/J (two operations per MAC), tables alone",
        "power (W), factors of the full machine, one bank per SRAM, published activity, "
        "24 KiB each",
        "area (mm²), factors of the full machine, one bank per SRAM, 24 KiB each",
    ),
    "table4": (
        "SpAtten-e2e, fully connected, ms",
        "SpAtten-e2e, attention, ms",
        "TITAN Xp, attention, ms",
        "whole, TITAN Xp over SpAtten-e2e",
    ),
    "fig14": (
        "geometric mean over all 30: speed-up over titan_xp",
        "geometric mean over 22 of BERT: speed-up over titan_xp",
        "geometric mean over 8 of GPT-2: speed-up over titan_xp",
        "bert-base-cola: speed-up over titan_xp",
        "bert-base-squad1: speed-up over titan_xp",
        "geometric mean over 22 of BERT: speed-up over xeon_e5_2640v4",
        "geometric mean over 8 of GPT-2: energy saving over titan_xp",
        "geometric mean over 22 of BERT: energy saving over titan_xp",
    ),
    "fig15": (
        "geometric mean: 12-bit weights over titan_xp",
        "geometric mean: 8-bit weights over titan_xp",
        "geometric mean: 8-bit weights over xeon_e5_2640v4",
    ),
    "fig18": (
        "bert: SpAtten, TFLOPS",
        "bert: SpAtten, operations per byte",
        "gpt2: SpAtten, TFLOPS",
        "gpt2: SpAtten, operations per byte",
    ),
    "fig19": (
        "throughput at 1 lanes over 16, ranked per layer",
        "throughput at 4 lanes over 16, ranked per layer",
        "throughput at 32 lanes over 16, ranked per layer",
        "throughput at 32 lanes over 16, ranked per row",
        "throughput at 196 KB of SRAM over 392",
        "throughput at 784 KB of SRAM over 392",
    ),
    "fig20": (
        "datapath: over TITAN Xp",
        "+ token and value pruning: over the step before",
        "+ head pruning: over the step before",
        "+ top-k engine of 16: over the step before",
        "+ static quantisation: over the step before",
        "+ progressive quantisation: over the step before",
        "pruning and top-k engine together",
        "quantisation together",
        "everything: over TITAN Xp",
    ),
}


@cache
def stored() -> dict[tuple[str, str], dict[str, Any]]:
    rows = [row.model_dump() for row in read_results(ROOT / "results/spatten_hw.json").rows]
    return {(row["table"], row["quantity"]): row for row in rows}


def line(row: dict[str, Any]) -> str:
    """A row as the page prints it."""
    numbers = [row["published"], row["ours"]]
    shown = [f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in numbers]
    cells = [row["table"], row["quantity"], *shown]
    return "| " + " | ".join([*cells, f"{row['difference']:+.0%}", row["basis"]]) + " |"


def test_names_of_the_paper_and_of_its_parts() -> None:
    found = find_tables("spatten-hw")
    both = find_tables("spatten_hpca_2021")
    assert both == find_tables("spatten") == [*find_tables("spatten-algorithm"), *found]
    assert len({table.name for table in both}) == len(both)
    names = {"headline", "table2", "fig13", "table3", "table4", "fig14", "fig15", "fig18"}
    assert names | {"fig19", "fig20"} <= {table.name for table in found}
    assert all(table.title for table in found)


def test_published_bars_have_the_published_means() -> None:
    assert set(FIGURE_14) == set(runs.NAMES)
    assert set(FIGURE_15) == set(runs.GPT2)
    assert means(FIGURE_14) == pytest.approx(HEADLINE, rel=0.01)
    assert means(FIGURE_15) == pytest.approx(E2E_HEADLINE, rel=0.03)
    # Figure 20 ends where figure 14's GPT-2 bars have their mean.
    assert means(FIGURE_14, "gpt2")[0] == pytest.approx(209.0, abs=0.2)


def test_operations_of_dense_gpt2() -> None:
    dense = runs.operations(runs.Case(runs.MEDIUM, "dense"))
    assert dense == 4 * 24 * 16 * 64 * sum(range(993, 1025))
    assert runs.traffic(runs.Case(runs.MEDIUM, "dense")).fetched == dense / 2 * 4
    assert runs.operations(runs.Case(runs.MEDIUM, "static")) < 0.4 * dense


def test_variants_leave_less_and_less() -> None:
    order: tuple[runs.Variant, ...] = ("dense", "tokens", "heads", "static", "full")
    for name in (COLA, runs.SMALL):
        cases = [runs.Case(name, variant, tokens=TOKEN[name]) for variant in order]
        useful = [runs.traffic(case).useful for case in cases]
        work = [runs.operations(case) for case in cases]
        assert useful == sorted(useful, reverse=True)
        assert work == sorted(work, reverse=True)
        assert work[0] > work[1]
        assert useful[2] > useful[3]
    assert useful[-1] < useful[0] / 20
    assert useful[3] > useful[4]


def test_sampled_tokens_fetch_low_bits_as_often_as_all() -> None:
    for name in (runs.SMALL, runs.MEDIUM):
        shares: list[float] = []
        for tokens in ((), runs.SAMPLE):
            _, selection = runs.workload(runs.Case(name, tokens=tokens))
            low = [call.lsb_refetch for call in selection.calls if call.lsb_refetch is not None]
            shares.append(sum(int(x.sum()) for x in low) / sum(x.size for x in low))
        assert shares[1] == pytest.approx(shares[0], abs=0.005)


def test_texts_of_gpt2_are_simulated_once() -> None:
    one, other = runs.Case("gpt2-small-wikitext2"), runs.Case("gpt2-small-ptb")
    assert one != other
    assert one.canonical == other.canonical
    assert runs.Case(COLA).canonical == runs.Case(COLA)


def test_a_simulated_benchmark() -> None:
    found = runs.report(runs.Case(COLA))
    assert found is runs.report(runs.Case(COLA))
    done = runs.activity(found)
    executed = runs.operations(runs.Case(COLA))
    assert 2 * 64 * (done.scores + done.values) * found.cycles == pytest.approx(executed)
    assert done.atoms * 32 * found.cycles == pytest.approx(found.dram_bytes)
    power = parts(EnergyModel(), done)
    assert list(power) == ["logic", "SRAM", "DRAM"]
    assert min(power.values()) > 0
    assert runs.limits(found).startswith("busy: ")


def test_rows_without_a_simulation() -> None:
    rows = [*headline(), *area_rows(), *power_rows()]
    assert all(row["basis"] in ("calibrated", "scenario") for row in rows)
    assert all(row["assumptions"] for row in rows if row["basis"] == "scenario")
    calibrated = [row["difference"] for row in rows if row["basis"] == "calibrated"]
    assert calibrated
    assert calibrated == pytest.approx([0.0] * len(calibrated), abs=1e-9)


def test_stored_rows_say_what_they_rest_on() -> None:
    rows = stored()
    assert {table for table, _ in rows} == {table.name for table in find_tables("spatten-hw")}
    for row in rows.values():
        assert row["basis"] in ("identity", "calibrated", "predicted", "scenario")
        assert row["assumptions"] or row["basis"] != "scenario", row["quantity"]
        if row["basis"] == "identity" and row["tolerance"] is not None:
            assert row["within"], row["quantity"]
        if row["basis"] == "calibrated" and row["difference"] is not None:
            assert abs(row["difference"]) < 0.005, row["quantity"]
    assert all(("fig14", f"{name}: attention on SpAtten, ms") in rows for name in runs.NAMES)


def test_the_page_says_what_is_stored() -> None:
    page = (ROOT / "docs/reproducing_spatten.md").read_text("utf-8")
    text = page.split("\n## The algorithm\n")[0]
    for table, quantities in QUOTED.items():
        for quantity in quantities:
            assert line(stored()[table, quantity]) in text
    # Nothing else stands in the table, and every large difference has its section.
    assert text.count("\n| ") == 1 + sum(map(len, QUOTED.values()))
    far = {r["table"] for r in stored().values() if abs(r["difference"] or 0) > 0.25}
    assert all(f"\n### {table}\n" in text for table in far)


def test_stored_cycles_are_those_of_today() -> None:
    name = f"{COLA}: attention on SpAtten, ms"
    ours = runs.report(runs.Case(COLA)).seconds * 1e3
    assert ours == pytest.approx(stored()["fig14", name]["ours"], rel=0.05)
