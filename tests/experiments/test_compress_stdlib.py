from __future__ import annotations

from pathlib import Path

import pytest

from sparseloom.experiments import compressors
from sparseloom.results import read_results
from sparseloom.tasks.stdlib import StdlibCorpus


def test_the_study_scores_both_compressors_with_and_without_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = b"\0import os\n\ndef main(path):\n    return os.stat(path)\n"
    small = StdlibCorpus(text * 9, text + text[:30], ("a.py",), False, ("a.py",))
    monkeypatch.setattr("sparseloom.tasks.language_modelling.load_stdlib", lambda: small)
    out = tmp_path / "compressors.json"
    monkeypatch.setattr("sys.argv", ["compressors", "--results", str(out), "--table-bits", "10"])
    compressors.main()
    rows = read_results(out).model_dump()["rows"]
    values = {(row["model"], row["settings"]["train_bytes"] > 0): row["value"] for row in rows}
    assert len(values) == 4
    assert values["context mixture", True] < values["context mixture", False]
    assert values["xz -9", True] < values["xz -9", False]
    assert all(row["items"] == len(small.held_out) for row in rows)
    assert rows[0]["note"].startswith("not comparable")
