"""Static regions of a call: kept on disk, checked against the operator, absent from old traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparseloom.experiments.reproduce.static_templates import encoder, selection, templates
from sparseloom.regions import decode_heads
from sparseloom.trace import AttentionCall, Selection, Trace, TraceError

LENGTH = 128


def call(*names: str) -> AttentionCall:
    known = templates(LENGTH)
    return selection("s", [[known[name] for name in names]], LENGTH).calls[0]


def trace(one: AttentionCall) -> Trace:
    return Trace(encoder(LENGTH, layers=1, heads=2), {"s": Selection("s", (one,))})


def test_regions_come_back_from_disk(tmp_path: Path) -> None:
    saved = trace(call("coarse", "block"))
    saved.save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert loaded == saved
    words = loaded.selection("s").calls[0].regions
    assert words is not None
    assert words.dtype == np.uint64
    known = templates(LENGTH)
    assert decode_heads(words) == (known["coarse"], known["block"])


def test_traces_without_regions_still_load(tmp_path: Path) -> None:
    plain = trace(replace(call("local"), regions=None))
    plain.save(tmp_path / "t")
    assert Trace.load(tmp_path / "t").selection("s").calls[0].regions is None
    assert plain != trace(call("local"))


def test_regions_must_fit_the_call() -> None:
    with pytest.raises(TraceError, match="regions need the mask that they compile to"):
        trace(replace(call("local"), mask=None))
    with pytest.raises(TraceError, match="regions must divide 2 heads evenly, got 3"):
        trace(replace(call("local"), regions=call("local", "sep", "sep").regions))
    words = call("local").regions
    assert words is not None
    with pytest.raises(TraceError, match="regions: word 0 must be marked as the first"):
        trace(replace(call("local"), regions=words[1:]))
