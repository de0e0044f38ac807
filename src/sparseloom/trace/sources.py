"""A trace from what a user types: a folder, a CSV file of the SpAtten authors, a benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparseloom.trace.errors import TraceError
from sparseloom.trace.schema import Scope
from sparseloom.trace.trace import Trace

BENCHMARK = "benchmark:"


def open_trace(given: str, scope: Scope | None = None) -> Trace:
    """A trace by what was given.

    Args:
        given: the folder of a trace, a SpAtten CSV file (plain or gzip), or `benchmark:NAME`.
        scope: "attention" leaves all other operators out; "model" needs them; None takes what
            there is, of a benchmark attention.

    Raises:
        TraceError: one line that names the file and what is wrong with it.
    """
    if given.startswith(BENCHMARK):
        from sparseloom.trace.spatten_benchmarks import benchmark

        return benchmark(given.removeprefix(BENCHMARK)).trace(scope=scope or "attention")
    path = Path(given)
    trace = Trace.from_spatten_csv(path) if path.is_file() else Trace.load(path)
    if scope is None or scope == trace.workload.scope:
        return trace
    if scope == "model":
        raise TraceError(
            f"{given}: scope must be attention, the trace lists nothing else, got model"
        )
    attention = replace(trace.workload, operators=trace.workload.attention(), scope="attention")
    return replace(trace, workload=attention)
