"""The Python blocks of the README and of docs/ run, file by file, as a reader would run them.

A block whose fence has a title that begins with "not run" is left out; each of those is listed
here, so that none slips away unnoticed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NOT_RUN: dict[str, int] = {}
FENCE = re.compile(r"^```python(?P<attributes>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, bool]]:
    """(first line, code, whether it runs) of every Python block."""
    text = page.read_text("utf-8")
    return [
        (
            text.count("\n", 0, match.start("code")),
            match["code"],
            'title="not run' not in match["attributes"],
        )
        for match in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for line, code, runs in blocks(page):
        if runs:
            # Leading newlines make a traceback point at the page's own line.
            # This file's own future imports stay out of it.
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
            ran += 1
    assert ran > 0
    assert "Traceback" not in capsys.readouterr().out


def test_blocks_that_do_not_run_are_listed() -> None:
    found = {name_of(page): sum(not runs for *_, runs in blocks(page)) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES
                      if page.is_relative_to(ROOT / "docs")}  # fmt: skip


def test_links_between_pages_lead_somewhere() -> None:
    broken = [
        f"{name_of(page)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_commands_in_the_docs_exist() -> None:
    from sparseloom.cli.app import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    shown = {
        word
        for page in PAGES
        for block in re.findall(
            r"^```\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
        for word in re.findall(r"^(?:\$ )?sparseloom (\w+)", block, re.MULTILINE)
    }
    assert shown
    assert shown <= known


def test_the_table_of_predictors_is_in_the_results() -> None:
    from sparseloom.experiments.predictors import table
    from sparseloom.results import read_results

    file = ROOT / "results/predictors.json"
    if not file.exists():
        pytest.skip("results/predictors.json: the study has not been run")
    text = (ROOT / "docs/methods.md").read_text("utf-8")
    for line in table([row.model_dump() for row in read_results(file).rows]):
        assert line in text


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
