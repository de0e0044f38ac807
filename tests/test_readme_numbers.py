"""The tables of the README say what the files in `results/` say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseloom.results import read_results

ROOT = Path(__file__).parents[1]
LABELS = {
    "dense": "dense",
    "oracle on the dynamic model": "oracle (exact top-k)",
    "dynamic": "dynamic, INT4, fine-grained",
    "dynamic, model untuned": "the same, model left as it was",
    "oracle 8×1 on the dynamic model": "oracle in 8×1 vectors",
    "dynamic 8×1": "dynamic, INT4, 8×1 vectors",
    "dynamic, half the keys": "dynamic, INT4, half as many keys",
    "random": "random keys",
    "window": "sliding window",
    "window growing": "growing window",
}


def line(row: dict[str, Any]) -> str:
    dense = row["contender"] == "dense"
    retained, oracle = row.get("retained_mass") or [], row.get("oracle_mass") or []
    worst = min((ours / best for ours, best in zip(retained, oracle, strict=True)), default=None)
    cells = [
        LABELS[row["contender"]],
        f"{row['density']:.1%}",
        f"{row['value']:.4f}",
        "–" if dense else f"{row['difference']:+.4f} (≤ {row['difference_upper95']:+.4f})",
        "–" if worst is None else f"{worst:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("contender", LABELS)
def test_every_line_of_the_table_is_in_the_results(contender: str) -> None:
    rows = [row.model_dump() for row in read_results(ROOT / "results/adaptation.json").rows]
    found = [row for row in rows if row["contender"] == contender]
    assert len(found) == 1
    assert line(found[0]) in (ROOT / "README.md").read_text("utf-8")


def test_what_the_study_was_made_for_holds() -> None:
    rows = {
        row["contender"]: row
        for row in (row.model_dump() for row in read_results(ROOT / "results/adaptation.json").rows)
    }
    dynamic = rows["dynamic"]
    assert dynamic["items"] >= 64
    assert dynamic["difference_upper95"] <= 0.02
    assert rows["dynamic, half the keys"]["difference_upper95"] <= 0.04
    assert rows["random"]["difference"] > rows["window"]["difference"]
    best = min(rows["window"]["value"], rows["window growing"]["value"])
    assert dynamic["value"] <= best - 0.05
    shares = zip(dynamic["retained_mass"], dynamic["oracle_mass"], strict=True)
    assert all(ours >= 0.9 * oracle for ours, oracle in shares)


def sentiment() -> list[dict[str, Any]]:
    rows = [row.model_dump() for row in read_results(ROOT / "results/sentiment.json").rows]
    return [row for row in rows if not row["contender"].startswith("dense, ")]  # a control


def line_of_sentiment(row: dict[str, Any]) -> str:
    retained, oracle = row.get("retained_mass") or [], row.get("oracle_mass") or []
    worst = min((ours / best for ours, best in zip(retained, oracle, strict=True)), default=None)
    loss, upper = 100 * row["loss"], 100 * row["loss_upper95"]
    cells = [
        row["contender"],
        f"{row['density']:.1%}",
        f"{row['items']:,}",
        f"{row['value']:.2%}",
        "–" if row["contender"] == "dense" else f"{loss:+.2f} (≤ {upper:+.2f})",
        "–" if worst is None else f"{worst:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def test_every_line_of_the_sentiment_table_is_in_the_results() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [row for row in sentiment() if line_of_sentiment(row) not in text] == []


def test_what_the_sentiment_study_was_made_for_holds() -> None:
    rows = {row["contender"]: row for row in sentiment()}
    main = [rows[f"dynamic {name}"] for name in ("90 %", "95 %", "90 %, (8,1)")]
    assert all(row["items"] >= 10_000 for row in main)
    assert main[0]["loss_upper95"] <= 0.005
    assert main[1]["loss_upper95"] <= 0.01
    assert main[2]["loss"] - main[0]["loss"] <= 0.003
    assert rows["random 90 %"]["loss_interval95"][0] > 0.03
    assert rows["window 99 %"]["loss"] - rows["dynamic 99 %"]["loss"] > 0.1
    assert rows["dynamic 90 %, INT2"]["loss"] > main[0]["loss"]


def test_the_paragraph_below_the_table_is_in_the_results() -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        return [row.model_dump() for row in read_results(ROOT / f"results/{name}.json").rows]

    text = (ROOT / "README.md").read_text("utf-8")
    demo = rows("demo")
    at_90 = [row for row in demo if row["method"] == "dynamic" and row["sparsity"] == 0.9]
    fine, vectors = sorted(at_90, key=lambda row: row["settings"]["block_size"])
    assert f"takes {demo[0]['model_ms']:.0f} ms dense (SDPA)" in text
    assert f"{fine['model_ms']:.0f} ms under the 90 %" in text
    assert f"{vectors['model_ms']:.0f} ms in 8×1" in text
    cycles = [row["cycles"]["dota_asplos_2022"] / 1e6 for row in (fine, demo[0])]
    assert f"{cycles[0]:.2f} M cycles against {cycles[1]:.2f} M dense" in text
    model = rows("stdlib_lm")[0]
    assert model["items"] > 200
    assert model["value"] <= 1.1
    assert f"needs {model['value']:.4f} bits per byte on the whole" in text
    trained = {
        row["model"]: row["value"] for row in rows("compressors") if row["settings"]["train_bytes"]
    }
    assert f"xz -9 needs {trained['xz -9']:.4f}" in text
    assert f"context mixture {trained['context mixture']:.4f}" in text


@pytest.mark.parametrize(
    ("text", "file"), [("README.md", "cpu_kernels"), ("docs/cpu.md", "cpu_kernels_avx2")]
)
def test_the_table_of_the_cpu_backend_is_in_the_results(text: str, file: str) -> None:
    words = ["benchmarks/cpu_kernels.py", "--table", "--out", f"results/{file}.json"]
    made = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = made.stdout.strip().splitlines()
    assert len(lines) > 6
    shown = (ROOT / text).read_text("utf-8")
    for line_of_table in lines:
        assert line_of_table in shown


def test_the_sentence_on_avx2_is_in_its_table() -> None:
    table = (ROOT / "docs/cpu.md").read_text("utf-8").splitlines()

    def cells(start: str) -> str:
        (found,) = (line for line in table if line.startswith(f"| {start}"))
        first, second, third = found.strip("| ").split(" | ")[1:]
        return f"{first}, {second} and {third}"

    text = (ROOT / "README.md").read_text("utf-8")
    given, whole = cells("8×1 vectors, mask given"), cells("8×1, predicted, selected")
    assert f"8×1 vectors are {given} faster, predicted and selected {whole} (" in text
