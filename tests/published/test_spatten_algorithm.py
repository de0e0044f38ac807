"""SpAtten's algorithm beside the paper: rows that are arithmetic, and what the others rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparseloom.experiments.reproduce import find_tables, stored_rows
from sparseloom.experiments.reproduce import spatten_reductions as reductions
from sparseloom.experiments.reproduce.spatten_curves import HEADS, QUALITY, TOKENS, fig21
from sparseloom.experiments.reproduce.spatten_files import SMALL, SMALL_DENSE, published, statistics
from sparseloom.experiments.reproduce.spatten_probabilities import EDGES, WIDTHS, fig7, measured
from sparseloom.models import load_model
from sparseloom.results import read_results, results
from sparseloom.trace.spatten_benchmarks import benchmark

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


# Rows that docs/reproducing_spatten.md quotes.
QUOTED: dict[str, tuple[str, ...]] = {
    "fig7": (
        "rows of 8–16 keys, keys and queries of 4 bits, largest probability 0–0.2: "
        "mean error per key, %",
        "rows of 8–16 keys, keys and queries of 4 bits, largest probability 0.8–1: "
        "mean error per key, %",
        "rows of 256–512 keys, keys and queries of 4 bits, largest probability 0–0.2: "
        "mean error per key, %",
        "rows of 256–512 keys, keys and queries of 4 bits, largest probability 0.8–1: "
        "mean error per key, %",
        "rows of 256–512 keys, high plane of 8+4: rows that fetch low bits, %",
        "rows of 256–512 keys, high plane of 8+4: their share of the summed error, %",
    ),
    "bits": (
        "trace of GPT-2 small: rows that fetch low bits, %",
        "trace of GPT-2 small: average width, bits",
        "stdlib, keys 6+4: rows that fetch low bits, %",
        "stdlib, keys 6+4: average width of keys, bits",
        "stories260K, keys 8+4: rows that fetch low bits, %",
        "stories260K, keys 8+4: average width of keys, bits",
    ),
    "reductions": (
        f"{SMALL}: keys read",
        f"{SMALL}: rows that fetch low bits",
        f"{SMALL}: DRAM access, all heads",
        f"{SMALL}: DRAM access without low bits",
        f"{SMALL}: computation",
        "trace of GPT-2 small: DRAM access, all heads",
        "trace of GPT-2 small: computation",
        "profile of the medium trace: DRAM access, all heads",
        "profile of the medium trace: DRAM access, heads alive",
        "built-in model, recorded: DRAM access, all heads",
        "built-in model, recorded: computation",
        "stdlib, together, as the trace, newest 32: DRAM access",
        "stories260K, together, tokens 65 %, newest 32: DRAM access",
        "minilm, 65% of the tokens and 100.0% of the heads: computation, whole model",
    ),
    "by-benchmark": (
        "bert-base-cola: DRAM access, fetched bytes",
        "bert-base-cola: computation",
        "bert-base-squad1: DRAM access, fetched bytes",
        "bert-base-squad1: computation",
        "gpt2-small-ptb: DRAM access, fetched bytes",
        "gpt2-small-ptb: computation",
        "gpt2-medium-ptb: DRAM access, fetched bytes",
        "gpt2-medium-ptb: computation",
    ),
    "fig21": (
        "stdlib, tokens 80%, newest 32: perplexity, change in %",
        "stdlib, tokens 50%, newest 32: perplexity, change in %",
        "stories260K, tokens 80%, newest 32: perplexity, change in %",
        "stories260K, tokens 50%, newest 32: perplexity, change in %",
        "stories260K, tokens as in the trace, newest 32: perplexity, change in %",
        "stories260K, heads 90 %: perplexity, change in %",
        "minilm, sts-b, tokens 80%: points over dense",
        "minilm, sts-b, tokens 65%: points over dense",
        "minilm, sts-b, tokens 50%: points over dense",
        "minilm, sts-b, tokens 80%, not fine-tuned: points over dense",
        "minilm, sts-b, heads 90%: points over dense",
        "minilm, sts-b, heads 80%: points over dense",
        "minilm, sts-b, heads 65%: points over dense",
        "minilm, sts-b, heads 50%: points over dense",
        "minilm, sts-b, heads 50%, not fine-tuned: points over dense",
        "minilm, sts-b-pairs, tokens 65%, heads 90%: points over dense",
        "minilm, sst-2, tokens 65%, heads 90%: points over dense",
        "minilm, cola, tokens 65%, heads 90%: points over dense",
    ),
}


def line(row: dict[str, Any]) -> str:
    """A row as the page prints it."""
    numbers = [row["published"], row["ours"]]
    shown = [x if isinstance(x, str) else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in numbers]
    difference = "–" if row["difference"] is None else f"{row['difference']:+.0%}"
    return (
        "| " + " | ".join([row["table"], row["quantity"], *shown, difference, row["basis"]]) + " |"
    )


def stored() -> dict[tuple[str, str], dict[str, Any]]:
    rows = read_results(RESULTS / "spatten_algorithm.json").rows
    return {(row["table"], row["quantity"]): row for row in (one.model_dump() for one in rows)}


def rows_of(name: str) -> list[dict[str, Any]]:
    (table,) = find_tables("spatten-algorithm", name)
    return table.function(stored_rows(table, RESULTS))


def test_errors_fall_where_one_probability_dominates() -> None:
    """Figure 7: on short rows 4-bit keys move flat rows by per cents, dominated ones hardly."""
    for rows in measured().values():
        for width in WIDTHS:
            flat, peaked = (rows.mean_error(width, rows.within(i)) for i in (0, len(EDGES) - 2))
            assert 0 < peaked < flat / 3
        wide = [float(rows.error[f"high plane of {bits}+4"].mean()) for bits in (4, 6, 8)]
        assert wide[0] > 3 * wide[1] > 9 * wide[2]
    short = measured()["rows of 8–16 keys"]
    assert 0.01 < short.mean_error("keys and queries of 4 bits", short.within(0)) < 0.08
    made = fig7()
    assert all(0 <= row["ours"] <= 100 for row in made)
    assert len({row["quantity"] for row in made}) == len(made)


@pytest.mark.parametrize(("file", "selection"), [(SMALL, "spatten"), (SMALL_DENSE, "dense")])
def test_the_published_traces_are_replayed_exactly(file: str, selection: str) -> None:
    theirs = published(file)
    if theirs is None:
        pytest.skip("SPARSELOOM_DATA has no spatten_traces: they are not part of the project")
    trace = benchmark("gpt2-small-wikitext2").trace()
    ours = statistics(trace.workload, trace.selection(selection))
    for name in ("keys", "values", "low", "rows", "low_rows", "length", "present", "operations"):
        assert getattr(ours, name) == getattr(theirs, name), name
    if selection == "spatten":
        assert theirs.moved == ours.moved
        assert (theirs.rows, theirs.low_rows) == (4608, 323)
        identities = reductions._replayed()
        assert {row["basis"] for row in identities} == {"identity"}
        assert len(identities) == 10
        assert all(row["within"] for row in identities)


def test_statistics_name_their_denominators() -> None:
    """All heads and low bits: 28.87 and 8.96; heads that are alive: 8.3; without low bits: 32.2."""
    small, medium = (benchmark(f"gpt2-{size}-ptb").trace() for size in ("small", "medium"))
    one = statistics(small.workload, small.selection("spatten"))
    two = statistics(medium.workload, medium.selection("spatten-static"))
    assert one.dram() == pytest.approx(28.87, abs=0.005)
    assert one.dram(low=False) == pytest.approx(32.22, abs=0.005)
    assert one.dram(present=True) == one.dram()
    assert one.average_key_bits == pytest.approx(6.84, abs=0.005)
    assert one.average_bits == pytest.approx(6.70, abs=0.005)
    assert one.computation == pytest.approx(1.190 / 0.197, rel=2e-3)
    assert two.dram() == pytest.approx(8.96, abs=0.005)
    assert two.dram(present=True) == pytest.approx(8.3, abs=0.05)
    assert (two.average_key_bits, two.low_rows) == (12, 0)
    prompted = benchmark("gpt2-small-ptb").trace(prompt=True)
    assert statistics(prompted.workload, prompted.selection("spatten")) == one


def test_a_run_of_the_built_in_model_is_counted() -> None:
    found = reductions._recorded()
    config = load_model("stdlib").model.config
    assert found.rows == 16 * config.num_hidden_layers * config.num_attention_heads
    assert (found.key_bits, found.low_bits, found.value_bits) == (6, 4, 6)
    # 8 % of the keys were asked for at the end, and a fifth of the values of those.
    assert found.values <= found.keys / 5
    assert found.dram() > 20


def test_each_benchmark_with_data_has_its_rows() -> None:
    made = rows_of("by-benchmark")
    names = {row["quantity"].split(":")[0] for row in made}
    assert len(names) == 2 * 10 + 2 * 2
    assert not {name for name in names if name.endswith(("qqp", "wikitext103", "1bw"))}
    assert len(made) == 3 * len(names)
    assert all(row["ours"] > 2 for row in made)


def quality(contender: str, kind: str, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "minilm", "task": "sts-b", "contender": contender, "kind": kind, "loss": loss,
        "loss_interval95": [loss - 0.01, loss + 0.02], "items": 10, "fine_tuned": True, **more,
    }  # fmt: skip


def test_pruned_encoders_stand_beside_the_figure() -> None:
    made = fig21([
        quality("tokens 25%", "tokens", 0.03, tokens_alive=0.25, heads_alive=1.0),
        quality("heads 50%", "heads", 0.1, tokens_alive=1.0, heads_alive=0.4),
        quality("dense", "control", 0.0),
    ])  # fmt: skip
    assert [row["ours"] for row in made] == [-3.0, -10.0]
    assert made[0]["published"] == f"about {TOKENS[4.0]:+.1f} % of accuracy at 4.0× " + (
        "(GPT-2-Small on PTB)"
    )
    assert made[1]["published"] == f"beyond the figure at {1 / 0.4:.1f}×"
    assert max(HEADS) < 2.5
    assert "95 % interval -5.00 to -2.00" in made[0]["note"]
    first = quality("tokens 25%", "tokens", 0.03, tokens_alive=0.25, heads_alive=1.0)
    assert [row["ours"] for row in fig21([first, {**first, "loss": 0.01}])] == [-1.0]


def test_a_study_that_is_missing_is_named() -> None:
    made = fig21([])
    assert [row["ours"] for row in made] == ["not run here yet"]
    assert QUALITY.command in made[0]["note"]
    assert results(made, command="test").rows
    other = {"record": "generation", "settings": {"method": "h2o", "version": 1}}
    assert len(fig21([other])) == 1
    assert not reductions.bits_picture([other])
    generated = [row for row in rows_of("fig21") if "perplexity" in row["quantity"]]
    assert len(generated) == 20
    assert all(row["ours"] > 0 for row in generated)


def test_the_page_says_what_is_stored() -> None:
    found = stored()
    page = (ROOT / "docs/reproducing_spatten.md").read_text("utf-8")
    text = page.split("\n## The algorithm\n")[1]
    for table, quantities in QUOTED.items():
        for quantity in quantities:
            assert line(found[table, quantity]) in text
    assert text.count("\n| ") == 1 + sum(map(len, QUOTED.values()))


def test_stored_rows_are_those_of_today() -> None:
    found = stored()
    assert {table for table, _ in found} == {one.name for one in find_tables("spatten-algorithm")}
    for row in found.values():
        assert row["assumptions"] or row["basis"] == "identity" or "not run" in str(row["ours"])
        assert row["within"] or row["basis"] != "identity"
    for row in [*rows_of("bits"), *rows_of("by-benchmark")]:
        assert row["ours"] == pytest.approx(found[row["table"], row["quantity"]]["ours"], rel=1e-6)


def test_pictures() -> None:
    pytest.importorskip("plotly")
    for table in find_tables("spatten-algorithm"):
        if table.pictures is not None:
            sections = table.pictures(stored_rows(table, RESULTS) if table.studies else [])
            assert sections
            drawn: list[Any] = [figure for section in sections for figure in section.figures]
            assert all(len(figure.data) > 1 for figure in drawn)


def test_a_file_that_is_not_at_hand_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "published", lambda name: None)
    rows = reductions._replayed()
    assert [row["ours"] for row in rows] == ["not at hand"] * 2
    assert all("SPARSELOOM_DATA" in row["note"] for row in rows)
