"""Every test here needs the compiled library, and many run once per tier."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sparseloom.kernels.cpu import native


@pytest.fixture(autouse=True)
def needs_library() -> None:
    """Skips with the reason where the library is missing, and fails where it is required."""
    reason = native.missing_reason()
    if reason is not None:
        absent = pytest.fail if os.environ.get("SPARSELOOM_REQUIRE_CPU") else pytest.skip
        absent(f"no C++ backend: {reason}")


@pytest.fixture(params=native.TIERS)
def tier(request: pytest.FixtureRequest, needs_library: None) -> Iterator[str]:
    """Each tier that this processor can run, active for the length of the test."""
    if request.param not in native.available_tiers():
        pytest.skip(f"this processor has no {request.param}")
    with native.use_tier(request.param):
        yield request.param
