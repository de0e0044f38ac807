"""What the environment says about the library."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseloom.kernels.cpu import native


@pytest.fixture(autouse=True)
def needs_library() -> None:
    """These tests are also for machines without the library."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is looked up anew, and as before after the test."""
    monkeypatch.setattr(native, "_found", functools.cache(native._found.__wrapped__))


@pytest.fixture
def built(fresh: None) -> Iterator[None]:
    """The same, and its tier is as before after the test."""
    if (reason := native.missing_reason()) is not None:
        pytest.skip(f"no C++ backend: {reason}")
    library, before = native.library(), native.library().active_tier()
    native._found.cache_clear()
    yield
    library.set_active_tier(before)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing.so", "SPARSELOOM_CPU_LIBRARY must be the path of a library, got '{path}'"),
        ("text.txt", "SPARSELOOM_CPU_LIBRARY must be an extension module, got '{path}'"),
        ("broken.so", "it does not load ({path}: "),
    ],
)
def test_a_file_that_is_no_library_is_named(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("text.txt", "broken.so"):
        (tmp_path / file).write_text("no library")
    path = tmp_path / name
    monkeypatch.setenv("SPARSELOOM_CPU_LIBRARY", str(path))
    assert reason.format(path=path) in str(native.missing_reason())
    with pytest.raises(ImportError, match="the C\\+\\+ backend is missing: ") as caught:
        native.library()
    assert str(native.missing_reason()) in str(caught.value)


@pytest.mark.usefixtures("built")
def test_another_build_is_loaded_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library().__file__
    assert path is not None
    native._found.cache_clear()
    monkeypatch.setenv("SPARSELOOM_CPU_LIBRARY", path)
    assert native.library().__file__ == path


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("name", native.TIERS)
def test_a_named_tier_is_active_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = native.available_tiers()
    native._found.cache_clear()
    monkeypatch.setenv("SPARSELOOM_CPU_TIER", name)
    if name in tiers:
        assert native.active_tier() == name
    else:
        with pytest.raises(ValueError, match="SPARSELOOM_CPU_TIER must be at most"):
            native.active_tier()


@pytest.mark.usefixtures("built")
def test_a_tier_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELOOM_CPU_TIER", "avx3")
    with pytest.raises(ValueError, match="unknown SPARSELOOM_CPU_TIER 'avx3'; did you mean 'avx"):
        native.missing_reason()
