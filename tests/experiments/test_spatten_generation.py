"""The study of generation: its rows on a few bytes, what is not made again, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseloom.experiments import spatten_generation as study
from sparseloom.methods import H2O, Quest, SpAtten
from sparseloom.results import read_results

ROOT = Path(__file__).parents[2]


def test_rows_and_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [
        study.Contender(study.DENSE, SpAtten(token_keep=None, head_keep=None)),
        study.Contender("H2O", H2O(heavy_keep=8, recent_keep=8)),
        study.Contender("Quest", Quest(token_keep=32, dense_layers=0, minimum_pages=1)),
    ]
    monkeypatch.setattr(study, "contenders", lambda layers: few)
    text = study.built_in(2, 64, 4)
    dense, h2o, quest = rows = study.run_study([text], tmp_path / "a")
    assert (dense["read_share"], dense["difference"], dense["index_share"]) == (1.0, 0.0, 0.0)
    assert h2o["read_share"] == pytest.approx(17 / 66)  # steps of 65, 66 and 67 tokens
    assert quest["index_share"] == pytest.approx(5 / 66)  # two rows for each of five pages
    assert h2o["key_high_share"] + h2o["value_share"] == pytest.approx(h2o["read_share"])
    parts = ("key_high_share", "value_share", "index_share")
    assert sum(quest[part] for part in parts) == pytest.approx(quest["read_share"])

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(study, "score", never)
    assert study.run_study([text], tmp_path / "a") == rows
    older = [{**row, "settings": dict(row["settings"])} for row in rows]
    del older[1]["settings"]["heavy_keep"]  # not the default, so another method
    with pytest.raises(AssertionError):
        study.run_study([text], tmp_path / "b", older)
    del older[2]["settings"]["page_size"]
    assert study.run_study([text], tmp_path / "b", [*older, rows[1]]) == rows
    few[1] = study.Contender("H2O", H2O(heavy_keep=9, recent_keep=8))
    with pytest.raises(AssertionError):
        study.run_study([text], tmp_path / "a", rows)


def test_the_table_of_the_docs_is_in_the_results() -> None:
    rows = [row.model_dump() for row in read_results(ROOT / "results/spatten_generation.json").rows]
    names = [row["contender"] for row in rows if row.get("metric") == "bits per byte"]
    text = (ROOT / "docs/methods.md").read_text("utf-8")
    lines = study.table(rows, names)
    shown: list[str] = []
    for after in text.split(lines[0])[1:]:  # other tables of the page have rows of these names
        shown += after.split("\n\n")[0].splitlines()[2:]
    assert len(shown) >= 35
    assert set(shown) <= set(lines[2:])
