"""The public names: all there, all loaded lazily, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import sparseloom

HEAVY = ("torch", "transformers", "numba", "plotly", "pyarrow", "pydantic", "accelerate")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sparseloom.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(sparseloom, name)
    assert (value.__doc__ or "").strip()


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparseloom.nothing


def test_the_docs_use_public_names() -> None:
    """Snippets of a page share one interpreter, where what another one imported is there, too."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    used = {name for page in pages for name in re.findall(r"\bsl\.(\w+)", page.read_text("utf-8"))}
    assert used
    assert used - {"__version__"} <= set(sparseloom.__all__)


def test_dir_and_all_agree() -> None:
    names = sorted(sparseloom.__all__, key=lambda name: (not name.isupper(), name))  # as Ruff does
    assert sparseloom.__all__ == names
    assert set(sparseloom.__all__) <= set(dir(sparseloom))


def test_names_for_type_checkers_are_the_lazy_names() -> None:
    tree = ast.parse(Path(sparseloom.__file__).read_text("utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(guarded)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(sparseloom.__all__)


def test_import_loads_nothing_heavy() -> None:
    assert not loaded_after("import sparseloom").intersection(HEAVY)


def test_command_line_loads_nothing_heavy() -> None:
    assert not loaded_after("import sparseloom.cli.app").intersection(HEAVY)


@pytest.mark.parametrize("module", ["sparseloom.hardware", "sparseloom.trace"])
def test_accelerators_do_not_need_torch(module: str) -> None:
    assert not loaded_after(f"import {module}").intersection({"torch", "transformers"})


def test_package_is_marked_as_typed() -> None:
    assert files("sparseloom").joinpath("py.typed").is_file()


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert version("sparseloom") == sparseloom.__version__
