"""Time and memory of a set of calls, on the CPU or on the current CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from sparseloom.experiments.timing import Timing, interleave

Device = Literal["cpu", "cuda"]


def timed(
    runs: Mapping[str, Callable[[], object]], *, device: Device, repeats: int
) -> dict[str, Timing]:
    """Interleaved times; on a card of captured graphs, where a call can be one.

    Raises:
        SparseloomError: no CUDA device.
    """
    if device == "cpu":
        return interleave(runs, repeats=repeats)
    from sparseloom.experiments.gpu import clock
    from sparseloom.experiments.gpu.card import check_card

    check_card()
    watch = clock.CudaClock()
    ready = {name: watch.prepare(run) for name, run in runs.items()}
    return clock.interleave(ready, watch, repeats=repeats)


def hardware(device: Device) -> str:
    """What was timed, for the stored rows."""
    from sparseloom.results import machine_facts

    facts = machine_facts()
    return f"{facts.gpu}" if device == "cuda" else f"{facts.cpu}, {facts.threads} threads"
