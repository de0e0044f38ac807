"""SpAtten's hardware tables: structure of every row, and the rows that rest on arithmetic alone.

Only short simulations run here; `sparseloom reproduce spatten-hw` runs them all, and
`results/spatten_hw.json` holds what it found.
"""

from __future__ import annotations

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

COLA = "bert-base-cola"


def test_both_names_give_the_same_tables() -> None:
    found = find_tables("spatten-hw")
    assert found == find_tables("spatten_hpca_2021")
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
    for name in (COLA, runs.SMALL, runs.MEDIUM):
        useful = [runs.traffic(runs.Case(name, variant)).useful for variant in order]
        work = [runs.operations(runs.Case(name, variant)) for variant in order]
        assert useful == sorted(useful, reverse=True)
        assert work == sorted(work, reverse=True)
    assert runs.traffic(runs.Case(runs.SMALL, "full")).useful < useful[0] / 20
    everything = runs.operations(runs.Case(runs.MEDIUM, "all heads"))
    assert work[2] < everything < work[1] * 1.0001


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
