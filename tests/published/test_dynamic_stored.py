"""Dynamic Sparse Attention's tables that rest on stored runs, and the page that quotes them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparseloom.experiments import lra_baselines
from sparseloom.experiments.reproduce import Request, Study, Table, find_tables, is_stored
from sparseloom.experiments.reproduce import dynamic_kernels as kernels
from sparseloom.experiments.reproduce import dynamic_lra as lra
from sparseloom.experiments.reproduce import dynamic_quality as quality
from sparseloom.experiments.reproduce import reproduce as make
from sparseloom.methods import ARENA, parse_method
from sparseloom.results import read_results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs/reproducing_dynamic.md"


@cache
def stored() -> dict[tuple[str, str], dict[str, Any]]:
    rows = [row.model_dump() for row in read_results(RESULTS / "dynamic.json").rows]
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
    text = PAGE.read_text("utf-8")
    table = text.split("| table | quantity |")[1].split("\n\n")[0]
    return table.splitlines()[2:]


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
    assert {one.split("|")[1].strip() for one in lines} == {table for table, _ in stored()}


def test_every_large_difference_has_its_paragraph() -> None:
    text = PAGE.read_text("utf-8")
    far = {row["table"] for row in stored().values() if abs(row["difference"] or 0) > 0.25}
    assert far
    assert all(re.search(rf"^### {table}$", text, re.MULTILINE) for table in far)


def test_rows_say_what_they_rest_on() -> None:
    known = {table.name for table in find_tables("dynamic")}
    for row in stored().values():
        assert row["paper"] == "dsa_tc_2022"
        assert row["table"] in known
        assert row["assumptions"] or row["basis"] == "identity", row["quantity"]
        assert row["within"] is not False, row["quantity"]
        if row["basis"] == "calibrated" and row["difference"] is not None:
            assert abs(row["difference"]) < 0.005


@pytest.mark.parametrize(
    "name", ["table1", "table3", "fig11", "break-even", "table4", "fig12", "fig13"]
)
def test_stored_rows_are_those_of_the_runs_behind_them(name: str) -> None:
    (table,) = find_tables("dynamic", name)
    if not is_stored(table, RESULTS):
        pytest.skip(f"the runs behind {name} are not stored")
    rows = {row["quantity"]: row["ours"] for row in make(table, results=RESULTS)}
    ours = {q: row["ours"] for (of, q), row in stored().items() if of == name}
    assert ours == pytest.approx(rows)


# ------------------------------------------------------------------ on made-up studies


def contender(name: str, method: str, loss: float = 0.01, **more: Any) -> dict[str, Any]:
    settings = {"projection": 0.25, "bits": 4, "block_size": [1, 1], **more.pop("settings", {})}
    row = {
        "model": "lra-text small",
        "task": "lra-text",
        "contender": name,
        "start": "checkpoint",
        "method": method,
        "settings": settings if method == "dynamic" else {},
        "sparsity": 0.9,
        "metric": "accuracy",
        "value": 0.65 - loss,
        "value_interval95": [0.6, 0.7],
        "items": 1000,
        "loss": loss,
        "loss_interval95": [loss - 0.01, loss + 0.02],
        "prediction_accuracy": [0.7, 0.8],
        "study": {
            "length": 512,
            "warmup_steps": 60,
            "joint_steps": 40,
            "recipe": {"steps": 1000, "batch_size": 16},
        },
        "note": "",
    }
    return row | more


STUDY = [
    contender("dense", "dense", 0.0, sparsity=None, prediction_accuracy=None),
    contender("dynamic 90 %", "dynamic"),
    contender("dynamic 99 %", "dynamic", 0.03, sparsity=0.99),
    contender("dynamic 90 %, 2 bits", "dynamic", 0.02, settings={"bits": 2}),
    contender("dynamic 90 %, sigma 0.1", "dynamic", 0.015, settings={"projection": 0.1}),
    contender("dynamic 90 %, (8,1)", "dynamic", 0.012, settings={"block_size": [8, 1]}),
    contender("random 90 %", "random", 0.05, prediction_accuracy=[0.1, 0.1]),
    contender("local 99 %", "window", 0.1, sparsity=0.99),
    contender("dense, first 6 tokens", "dense", 0.11, sparsity=None),
    contender("performer", "performer", 0.04, start="scratch"),
    contender("window", "window", 0.06, start="scratch"),
]


def by_quantity(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["quantity"]: row for row in rows}


def test_figure_3_takes_the_right_contenders() -> None:
    rows = by_quantity(quality.fig3(STUDY))
    assert rows["lra-text, DSA-90: points over dense"]["ours"] == pytest.approx(-1.0)
    assert rows["lra-text, DSA-99: accuracy, %"]["published"] == 64.04
    assert rows["lra-text, DSA-99: accuracy, %"]["ours"] == pytest.approx(62.0)
    assert rows["lra-text, local 99 %: points over dense"]["published"] == "-11.88 on Text"
    assert rows["lra-text, dense, as few tokens: accuracy, %"]["ours"] == pytest.approx(54.0)
    assert not any("DSA-95" in quantity for quantity in rows)
    note = rows["lra-text, DSA-90: points over dense"]["note"]
    assert note == "1000 test items, 95 % interval -3.00 to +0.00"
    assert len(quality.sparsity_picture(STUDY)) == 1


def test_table_2_and_figure_6_and_the_accuracy_of_vectors() -> None:
    table = by_quantity(quality.table2(STUDY))
    assert table["lra-text, σ = 0.1: accuracy, %"]["published"] == 65.32
    assert table["lra-text, INT2 (σ = 0.25): accuracy, %"]["ours"] == pytest.approx(63.0)
    assert table["lra-text, random mask: accuracy, %"]["published"] == 60.42
    other = [{**one, "task": "imdb-sentiment"} for one in STUDY]
    published = {row["published"] for row in quality.table2(other)}
    assert published == {"not published"}
    figure = by_quantity(quality.fig6(STUDY))
    assert figure["lra-text, INT2, layer 1: keys shared with the oracle"]["ours"] == 0.8
    assert figure["lra-text, random, layer 0: keys shared with the oracle"]["ours"] == 0.1
    change = by_quantity(quality.accuracy_change(STUDY))
    assert change["lra-text, 1×8 at 90%: points over dense"]["published"] == "-0.1 on Text"
    assert change["lra-text, 1×8 at 90%: points over dense"]["ours"] == pytest.approx(-1.2)


def test_published_table_of_long_range_arena() -> None:
    rows = by_quantity(lra.lra(STUDY))
    assert rows["lra-text, performer: accuracy, %"]["published"] == 65.40
    assert rows["lra-text, window: accuracy, %"]["published"] == 52.98
    assert len(rows) == 2
    means = {name: sum(scores) / 3 for name, scores in lra.PUBLISHED.items()}
    assert means["dense"] == pytest.approx(54.72, abs=0.01)
    assert means["reformer"] == pytest.approx(49.19, abs=0.01)


def test_every_baseline_has_its_published_row() -> None:
    for text in (*ARENA.values(), *lra_baselines.SMALL.values()):
        tag = parse_method(text).name
        rows = lra.lra([contender("any", tag, start="scratch")])
        assert isinstance(rows[0]["published"], float), tag


def test_cost_of_fine_tuning() -> None:
    from_scratch = contender("dynamic 90 %", "dynamic", start="scratch")
    rows = by_quantity(lra.finetuning([from_scratch | {"study": {}}, *STUDY]))
    share = "steps of the predictor and of joint training over steps from scratch"
    assert rows[f"lra-text: {share}"]["ours"] == pytest.approx(0.1)
    assert rows["lra-text: tokens of adaptation, millions"]["ours"] == pytest.approx(0.8192)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([(0.5, 0.5), (0.9, 1.5)], 0.7),
        ([(0.5, 1.5), (0.9, 3.0)], 0.5),
        ([(0.5, 0.5), (0.9, 0.9)], None),
        ([(0.5, 1.1), (0.7, 0.9), (0.8, 1.1)], 0.75),
    ],
)
def test_break_even(gains: list[tuple[float, float]], expected: float | None) -> None:
    found = kernels.crossing(gains)
    assert found == (None if expected is None else pytest.approx(expected))


# ------------------------------------------------------------------ studies


def test_a_study_is_run_stored_and_read(tmp_path: Path) -> None:
    asked: list[Request] = []

    def run(request: Request) -> list[dict[str, Any]]:
        asked.append(request)
        return [{"record": "made", "value": 3}]

    studies = (Study("made.json", run), Study("absent.json", command="another command"))
    table = Table("paper", "table", lambda rows: rows, studies)
    with pytest.raises(FileNotFoundError, match=r"made\.json and .*absent\.json are not there"):
        make(table, results=tmp_path)
    assert not is_stored(table, tmp_path)
    rows = make(table, run=True, request=Request(size="paper"), results=tmp_path, command="test")
    assert rows == make(table, results=tmp_path) == [{"record": "made", "value": 3}]
    assert [request.size for request in asked] == ["paper"]
    elsewhere = Table("paper", "table", lambda rows: rows, studies[1:])
    with pytest.raises(ValueError, match="another command writes"):
        make(elsewhere, run=True, results=tmp_path)


def test_a_study_of_a_card_is_run_on_a_card_alone(tmp_path: Path) -> None:
    def run(request: Request) -> list[dict[str, Any]]:
        return [{"record": "made", "name": request.device}]

    studies = (Study("cpu.json", run), Study("gpu.json", run, optional=True, device="cuda"))
    table = Table("paper", "table", lambda rows: rows, studies)
    assert make(table, run=True, results=tmp_path) == [{"record": "made", "name": "cpu"}]
    assert not (tmp_path / "gpu.json").exists()
    on_card = Request(device="cuda")
    both = make(table, run=True, request=on_card, results=tmp_path)
    assert [row["name"] for row in both] == ["cpu", "cuda"]
    plain = Table("paper", "table", lambda rows: rows, studies[:1])
    with pytest.raises(ValueError, match="paper table has no run on cuda"):
        make(plain, run=True, request=on_card, results=tmp_path)


@pytest.mark.parametrize("name", ["table3", "fig11", "break-even", "table4", "fig12", "fig13"])
def test_rows_of_a_card_stand_beside_those_of_the_cpu(name: str) -> None:
    (table,) = find_tables("dynamic", name)
    assert {study.device for study in table.studies} == {"cpu", "cuda"}
    stored_file = RESULTS / table.studies[0].file
    cpu = [row.model_dump(exclude_unset=True) for row in read_results(stored_file).rows]
    # As a card four times as fast would have it, in FP16 where the CPU has bfloat16.
    card = [
        row
        | {"hardware": "a card", "device": "cuda", "ms": row["ms"] / 4}
        | ({"dtype": "float16"} if row["dtype"] == "bfloat16" else {})
        for row in cpu
    ]
    rows, alone = table.function([*cpu, *card]), table.function(cpu)
    assert rows[: len(alone)] == alone
    on_card = rows[len(alone) :]
    assert len(on_card) == len(alone)
    for ours, theirs in zip(alone, on_card, strict=True):
        assert theirs["quantity"] == ours["quantity"].replace("bfloat16", "float16") + ", on a card"
        assert theirs["published"] == ours["published"]
        assert theirs["ours"] == pytest.approx(ours["ours"])
        assert any("a card" in line for line in theirs["assumptions"])
    if table.pictures is not None:
        assert len(table.pictures([*cpu, *card])) == len(table.pictures(cpu))
