"""`sparseloom simulate`: sources, machines side by side, files, and how it says no."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseloom.cli import boundary
from sparseloom.results import validate_results

Run = Callable[..., tuple[int, str, str]]
COLA = "benchmark:bert-base-cola"
HEADER = (
    "iteration_id,layer_id,head_id,embedding_length_D,sentence_length_L,key_fetch_num,"
    "quant_key_bit,quant_query_bit,auto_requant_thres,if_requant,auto_requant_incre,"
    "value_fetch_num,quant_value_bit,if_accumulate_importance,if_rescale_previous_importance,"
    "if_topk,topk"
)
LINE = "0,0,{head},64,40,20,8,8,0.1,False,4,10,8,True,False,False,0"
CSV = "\n".join([HEADER, *(LINE.format(head=head) for head in range(2))]) + "\n"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELOOM_DEBUG", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        code = boundary.run([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


def rows_of(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    validate_results(found)
    return found["rows"]


# ---------------------------------------------------------------------------- it works


def test_benchmarks_are_listed(run: Run) -> None:
    code, out, _ = run("simulate", "spatten_hpca_2021", "benchmark:list", "--json")
    rows = rows_of(out)
    assert code == 0
    assert len(rows) == 30
    assert rows[0]["name"] == COLA
    code, out, _ = run("simulate", "spatten_hpca_2021", "benchmark:list")
    assert (code, len(out.splitlines())) == (0, 31)


def test_machines_stand_side_by_side(run: Run) -> None:
    words = ["simulate", "spatten_hpca_2021", COLA, "--machine", "titan_xp"]
    code, out, _ = run(*words, "--json")
    rows = rows_of(out)
    assert code == 0
    assert [(row["selection"], row["machine"]) for row in rows] == [
        (name, machine)
        for name in ("dense", "spatten")
        for machine in ("spatten_hpca_2021", "titan_xp")
    ]
    assert {row["trace"] for row in rows} == {COLA}
    assert rows[0]["roof"]["operations"] == pytest.approx(2 * 1024 * 1e9)
    code, out, _ = run(*words)
    assert code == 0
    assert f"{rows[0]['seconds'] / rows[1]['seconds']:.3g}× as fast" in out
    assert "titan_xp:\n- operators run dense" in out


def test_one_machine_is_compared_with_its_own_change(run: Run) -> None:
    code, out, _ = run(
        "simulate", "dota_asplos_2022", COLA, "--selection", "dense", "--set", "clock_ghz=0.5",
        "--machine", "dota_asplos_2022",
    )  # fmt: skip
    assert code == 0
    assert "2× as fast" in out


def test_others_follow_to_a_fidelity_where_they_can(run: Run) -> None:
    words = ["--selection", "spatten", "--fidelity", "cycle", "--seed", 5, "--json"]
    code, out, _ = run(
        "simulate", "a3_hpca_2020", COLA, "--machine", "titan_xp",
        "--machine", "spatten_hpca_2021", *words,
    )  # fmt: skip
    assert code == 0
    rows = rows_of(out)
    assert [row["fidelity"] for row in rows] == ["cycle", "analytic", "cycle"]
    assert [row.get("seed") for row in rows] == [None, None, 5]


def test_a_csv_file_is_a_trace(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text(CSV)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    code, out, _ = run("simulate", "spatten_hpca_2021", "plain.csv", "packed.csv.gz", "--json")
    assert code == 0
    rows = rows_of(out)
    assert [row["trace"] for row in rows] == ["plain.csv"] * 2 + ["packed.csv.gz"] * 2
    assert rows[1]["cycles"] == rows[3]["cycles"] < rows[0]["cycles"]


def test_scope_of_a_benchmark(run: Run) -> None:
    words = ["simulate", "dota_asplos_2022", COLA, "--selection", "dense", "--json"]
    scopes = [rows_of(run(*words, "--scope", scope)[1])[0] for scope in ("attention", "model")]
    assert [row["scope"] for row in scopes] == ["attention", "model"]
    assert scopes[0]["cycles"] < scopes[1]["cycles"]


def test_scope_leaves_other_operators_out(tmp_path: Path) -> None:
    from sparseloom.trace.sources import open_trace
    from sparseloom.trace.spatten_benchmarks import benchmark

    whole = benchmark("bert-base-cola").trace(scope="model")
    whole.save(tmp_path / "whole")
    assert open_trace(str(tmp_path / "whole")) == whole
    alone = open_trace(str(tmp_path / "whole"), "attention")
    assert alone.workload.operators == whole.workload.attention()
    assert alone.workload.scope == "attention"


def test_files_of_a_cycle_run(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "simulate", "spatten_hpca_2021", COLA, "--fidelity", "cycle", "--selection", "spatten",
        "--timeline", "lines.json.gz", "--html", "page.html", "--out", "rows.json",
        "--window", "100:300",
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-3:] == ["rows.json", "lines.json.gz", "page.html"]
    data = json.loads(gzip.decompress((tmp_path / "lines.json.gz").read_bytes()))
    assert data["otherData"]["window_cycles"] == "100:300"
    assert "Cycles 100 to 300" in (tmp_path / "page.html").read_text("utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lines.json.gz", "page.html", "rows.json"]


def test_all_accelerators_in_one_table(run: Run, tmp_path: Path) -> None:
    words = ["simulate", "all", COLA, "--html", "page.html", "--out", "rows.json"]
    code, out, err = run(*words)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["accelerator", "configuration"]
    for name in ("SpAtten", "DOTA", "A3", "MnnFast", "dense"):
        assert any(line.startswith(name) for line in lines)
    assert "accuracy of keys of its own choice, conservative search is not known" in out
    assert "40 nm by Stillmaker & Baas at nominal voltages (2017)" in out
    rows = rows_of((tmp_path / "rows.json").read_text("utf-8"))
    assert {row["configuration"] for row in rows} == {"one size", "as published"}
    assert {row["scope"] for row in rows} == {"attention"}
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "Times as fast as the dense baseline" in page
    assert page.count("<tr") == len(rows) + 1
    code, out, _ = run("simulate", "all", COLA, "--selection", "dense", "--json")
    assert code == 0
    assert {row["selection"] for row in rows_of(out)} == {"dense"}


def test_simulate_never_loads_torch() -> None:
    code = (
        "import sys; from sparseloom.cli import boundary; "
        f"code = boundary.run(['simulate', 'spatten_hpca_2021', '{COLA}']); "
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------- it says no

MACHINE = "schema: sparseloom/machine/1\nextends: dota_asplos_2022\n"
FILES: dict[str, bytes] = {
    "key.yaml": f"{MACHINE}lanez: 4\n".encode(),
    "twice.yaml": f"{MACHINE}lanes: 4\nlanes: 8\n".encode(),
    "type.yaml": f"{MACHINE}lanes: four\n".encode(),
    "unit.yaml": f"{MACHINE}clock_mhz: 800\n".encode(),
    "size.yaml": f"{MACHINE}lanes: 0\n".encode(),
    "list.yaml": b"- lanes\n",
    "tabs.yaml": b"lanes:\n\t- 4\n",
    "kind.yaml": f"{MACHINE}kind: tpu\n".encode(),
    "base.yaml": b"extends: dota_asplos_2021\n",
    "lines.yaml": b"extends: spatten_hpca_2021\nkey_sram:\n  lines: 1\n",
    "good.csv": CSV.encode(),
    "column.csv": CSV.replace("if_topk,topk", "if_topk").encode(),
    "cell.csv": CSV.replace("20,8,8", "many,8,8", 1).encode(),
    "cut.csv.gz": gzip.compress(CSV.encode() * 50)[:60],
    "more.csv": CSV.replace("40,20,", "40,50,", 1).encode(),
}
BAD = {
    "unknown key": (["key.yaml", COLA], "key.yaml: unknown key 'lanez'"),
    "duplicate key": (["twice.yaml", COLA], "twice.yaml: line 4: key 'lanes' appears twice"),
    "wrong type": (["type.yaml", COLA], "type.yaml: lanes: Input should be a valid integer"),
    "wrong unit": (["unit.yaml", COLA], "unit.yaml: unknown key 'clock_mhz'"),
    "impossible size": (["size.yaml", COLA], "size.yaml: lanes: Input should be greater than"),
    "no mapping": (["list.yaml", COLA], "list.yaml: the top level must be a mapping"),
    "no YAML": (["tabs.yaml", COLA], "tabs.yaml: cannot be read"),
    "unknown kind": (["kind.yaml", COLA], "kind.yaml: kind must be one of dota, "),
    "unknown base": (["base.yaml", COLA], "did you mean 'dota_asplos_2022'"),
    "too few lines": (["lines.yaml", COLA], "lines.yaml: key_sram.lines: Input should be"),
    "missing column": (["dota_asplos_2022", "column.csv"], "column.csv: not a SpAtten"),
    "wrong cell": (["dota_asplos_2022", "cell.csv"], "cell.csv, line 2: key_fetch_num must be"),
    "truncated gzip": (["dota_asplos_2022", "cut.csv.gz"], "cut.csv.gz: cannot be read as a"),
    "more keys than tokens": (["dota_asplos_2022", "more.csv"], "more.csv: step 0, layer 0"),
    "unknown benchmark": (["dota_asplos_2022", "benchmark:bert"], "benchmark must be one of"),
    "scope not there": (
        ["dota_asplos_2022", "good.csv", "--scope", "model"],
        "good.csv: scope must be attention",
    ),
    "scope": (["dota_asplos_2022", COLA, "--scope", "all"], "--scope"),
    "head too wide": (
        ["spatten_hpca_2021", COLA, "--set", "scores.multipliers=32"],
        "values.multipliers must equal",
    ),
    "window of nothing": (["spatten_hpca_2021", COLA, "--window", "0:9"], "name one of them"),
    "window backwards": (
        ["spatten_hpca_2021", COLA, "--window", "9:3", "--html", "a.html"],
        "--window must be START:END in whole cycles, START first, got '9:3'",
    ),
    "window without events": (
        ["dota_asplos_2022", COLA, "--window", "0:9", "--html", "a.html"],
        "dota_asplos_2022 logs no events at fidelity 'analytic' (it does at cycle), got window 0:9",
    ),
    "fidelity not there": (
        ["mnnfast_isca_2019", COLA, "--fidelity", "cycle", "--html", "a.html", "--out", "a.json"],
        "mnnfast_isca_2019 has fidelity analytic, got 'cycle'",
    ),
    "timeline of two machines": (
        ["dota_asplos_2022", COLA, "--machine", "titan_xp", "--selection", "dense",
         "--timeline", "a.json"],
        "--timeline shows one run, got 2",
    ),
    "all with settings": (["all", COLA, "--set", "lanes=2"], "--set has no place with all: all"),
    "all with a machine": (["all", COLA, "--machine", "v100"], "--machine has no place with all"),
    "all with a timeline": (["all", COLA, "--timeline", "a.json"], "a timeline shows one machine"),
    "all of a model": (["all", COLA, "--scope", "model"], "not every accelerator runs more"),
    "less than equal": (["all", COLA, "--within", "-1"], "--within must be at least 0, got -1"),
    "within of one": (["dota_asplos_2022", COLA, "--within", "1"], "--within says which"),
    "second machine unknown": (
        ["dota_asplos_2022", COLA, "--machine", "tpu", "--html", "a.html"],
        "unknown machine 'tpu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, run: Run, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    words, expected = BAD[case]
    code, out, err = run("simulate", *words)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert expected in err
    assert out == ""
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
