"""Actions and blocks refuse what no energy model could cost."""

from __future__ import annotations

import pytest

from sparseloom.hardware.actions import Action, Block


def test_what_simulators_count_is_checked() -> None:
    assert Action("qk", "multiply", 3, 12).kind == "int"
    with pytest.raises(ValueError, match=r"op of an action must be one of multiply.*got 'fly'"):
        Action("qk", "fly", 1)
    with pytest.raises(ValueError, match=r"op of a block must be one of .*got 'sram_read'"):
        Block("qk", "sram_read", 1)
    with pytest.raises(ValueError, match="count of an action must be at least 0, got -1"):
        Action("qk", "add", -1, 12)
    with pytest.raises(ValueError, match="units of a block must be at least 0, got nan"):
        Block("qk", "add", float("nan"), 12)
