"""The one shape of machine-readable results."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.results import (
    ResultsFile,
    json_schema,
    machine_facts,
    module_command,
    read_results,
    results,
    shipped_schema,
    validate_results,
    versions,
    write_results,
)

ROWS: dict[str, dict[str, Any]] = {
    "CompareRow": {"model": "m", "task": "t", "method": "d", "metric": "bpb", "value": 1.2},
    "BenchRow": {
        "op": "attention", "path": "given", "q_len": 8, "kv_len": 8, "heads": 2, "head_dim": 4,
        "dtype": "float32", "causal": True, "ms": 0.5, "block_size": [1, 1],
    },
    "SimulateRow": {
        "machine": "m", "trace": "t", "selection": "s", "scope": "model", "fidelity": "analytic",
        "cycles": 1, "latency_cycles": 1, "seconds": 1e-9, "energy_j": {"dram": 1.0},
        "energy_table": "e", "utilisation": {"rmmu": 1.0}, "stalls": {}, "config_hash": "0",
        "assumptions": [],
    },
    "ReproduceRow": {
        "paper": "p", "table": "t", "quantity": "q", "published": "small", "ours": 0.1,
        "basis": "scenario",
    },
    "RecordRow": {"record": "backend", "name": "flex", "usable": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_row_is_told_by_its_key(kind: str) -> None:
    found = results([{**ROWS[kind], "extra": [1, None]}], command="c")
    assert type(found.rows[0]).__name__ == kind
    assert json.loads(found.to_json())["rows"] == [{**ROWS[kind], "extra": [1, None]}]


def test_the_head_says_where_and_when(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", [ROWS["RecordRow"]], command="sparseloom info --json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert list(data) == ["schema", "command", "date", "machine", "versions", "rows"]
    assert data["schema"] == "sparseloom/results/1"
    assert data["command"] == "sparseloom info --json"
    assert data["date"].endswith("+00:00")
    assert set(data["machine"]) == {"cpu", "threads", "isa", "gpu"}
    assert data["versions"]["python"] == platform.python_version()
    assert {"sparseloom", "numpy"} <= set(data["versions"])


def test_facts_are_plausible() -> None:
    facts = machine_facts()
    assert facts.cpu
    assert facts.threads >= 1
    assert facts.isa
    assert all(versions().values())


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "no kind": ({"zzz": 1}, "rows.0: a row needs one of the keys paper, op, machine, task, record"),
    "not finite": ({"record": "x", "a": float("nan")}, r"rows.0.record.a.*finite.*nan"),
    "nested infinity": ({"record": "x", "a": {"b": [float("inf")]}}, "finite"),
    "not JSON": ({"record": "x", "a": object()}, "not a valid JSON value"),
    "wrong type": ({**ROWS["CompareRow"], "value": "good"}, "rows.0.task.value"),
    "missing": ({"op": "attention"}, "rows.0.op.path: Field required"),
    "unknown basis": ({**ROWS["ReproduceRow"], "basis": "guess"}, "rows.0.paper.basis"),
    "float cycles": ({**ROWS["SimulateRow"], "cycles": 1.5}, "rows.0.machine.cycles"),
    "text number": ({**ROWS["BenchRow"], "ms": "1"}, "rows.0.op.ms"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_fit_write_nothing(tmp_path: Path, case: str) -> None:
    row, message = BAD[case]
    (tmp_path / "r.json").write_text("old")
    with pytest.raises(ValueError, match=message) as caught:
        write_results(tmp_path / "r.json", [row])
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "old"


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.json").write_text("old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_results(tmp_path / "r.json", [ROWS["RecordRow"]])
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "old"


def good() -> dict[str, Any]:
    return json.loads(results([ROWS["RecordRow"]], command="c").to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "sparseloom/results/2"}, "schema"),
        ({"colour": "red"}, "colour"),
        ({"date": "yesterday"}, "date"),
        ({"machine": {"cpu": "x"}}, "machine.threads"),
        ({"rows": {}}, "rows"),
        ({"versions": {"python": 3}}, "versions.python"),
    ],
)
def test_heads_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    validate_results(good())
    with pytest.raises(ValueError, match=f"results: {message}"):
        validate_results(good() | change)


def test_reading_back(tmp_path: Path) -> None:
    written = write_results(tmp_path / "sub" / "r.json", list(ROWS.values()))
    assert read_results(tmp_path / "sub" / "r.json") == written
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json: "):
        read_results(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"list\.json: an object is expected, got list"):
        read_results(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "none.json")


def test_array_scalars_and_tuples_become_plain() -> None:
    row = {"record": "x", "a": np.float32(0.5), "b": (np.int64(2), [np.bool_(True)])}
    plain = json.loads(results([row]).to_json())["rows"][0]
    assert plain == {"record": "x", "a": 0.5, "b": [2, [True]]}


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.text(min_size=1).filter(lambda key: key not in {"paper", "op", "machine", "task"})


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(KEYS, PLAIN | st.text() | st.lists(PLAIN, max_size=3), max_size=4))
def test_any_extra_that_json_holds_survives(extra: dict[str, Any]) -> None:
    row = {**extra, "record": "x"}
    found = results([row], command="c")
    assert json.loads(found.to_json())["rows"] == [row]
    assert validate_results(json.loads(found.to_json())) == found


def test_the_shipped_schema_is_that_of_the_models() -> None:
    # Regenerate: json.dumps(json_schema(), indent=1) + "\n" into src/sparseloom/results.schema.json
    assert shipped_schema() == json_schema()
    assert shipped_schema()["title"] == "sparseloom/results/1"
    rows = shipped_schema()["properties"]["rows"]["items"]["anyOf"]
    assert {option["$ref"].rpartition("/")[2] for option in rows} == set(ROWS)


def test_models_can_be_built_by_hand() -> None:
    file = ResultsFile(
        command="c", date="2026-01-01T00:00:00+00:00", machine=machine_facts(), versions={}, rows=[]
    )
    assert validate_results(json.loads(file.to_json())).rows == []


def test_the_command_of_a_module_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/study.py", "--name", "two words", "--n", "3"])
    wanted = "python -m sparseloom.experiments.study --name 'two words' --n 3"
    assert module_command("sparseloom.experiments.study") == wanted
