"""What one workload takes on DOTA, ELSA and a V100: the numbers behind every comparison here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from sparseloom import hardware
from sparseloom.experiments.reproduce.dota_benchmarks import (
    ELSA_RETENTION,
    SIGMA,
    Benchmark,
    benchmark_trace,
)
from sparseloom.hardware.report import Report
from sparseloom.trace import Trace, Workload

DOTA, ELSA = "dota_asplos_2022", "elsa_isca_2021"
GPUS = {"unfused": "v100", "fused": "v100_fused"}
ACCELERATORS = 3
"""DOTA accelerators beside one GPU: 12 Lanes and 12.3 TOPS, about its peak; 12 units of ELSA."""
GPU_BATCH = 16
"""Sequences that the GPU runs at a time, as in the kernel measurements of Liu et al. (2022)."""
PARTS = ("linear", "detection", "attention", "other")

Numbers = dict[str, Any]


def attention_alone(trace: Trace) -> Trace:
    """The trace without its other operators."""
    workload = trace.workload
    return replace(
        trace, workload=replace(workload, operators=workload.attention(), scope="attention")
    )


def measure(
    trace: Trace, case: str, *, elsa: str | None = None, fidelity: str = "cycle", times: float = 1.0
) -> Numbers:
    """Seconds and joules of one sequence on one DOTA accelerator, one Lane, and one ELSA unit.

    Args:
        trace: of the whole model, one sequence.
        case: the selection that DOTA runs.
        elsa: the selection that ELSA runs; None: ELSA has no part.
        fidelity: of both machines.
        times: what to multiply with, where the trace is a part of the model.

    Returns:
        `seconds` by part at that fidelity (cycle by cycle detection runs beside attention and is
        counted there), `closed` in closed form, `lane_seconds` and `elsa_seconds` of attention
        with detection, `attention_joules`, `stalls` by cause.
    """
    found = hardware.load(DOTA).simulate(trace, case, fidelity=fidelity)
    alone = attention_alone(trace)
    lane = hardware.load(DOTA, lanes=1, **_one_lane()).simulate(alone, case, fidelity=fidelity)
    closed = hardware.load(DOTA).simulate(trace, case)
    energy = hardware.load(DOTA).simulate(alone, case).total_energy
    made: Numbers = {
        "fidelity": found.fidelity,
        "seconds": {part: times * _seconds(found, part) for part in PARTS},
        "closed": {part: times * _seconds(closed, part) for part in PARTS},
        "lane_seconds": times * (_seconds(lane, "detection") + _seconds(lane, "attention")),
        "attention_joules": times * energy,
        "stalls": found.stalls,
    }
    if elsa is not None:
        made["elsa_seconds"] = times * elsa_seconds(alone, elsa, fidelity)
    return made


def elsa_seconds(trace: Trace, selection: str, fidelity: str) -> float:
    """Seconds of attention on one ELSA unit that computes what a selection keeps."""
    unit = hardware.load(ELSA, **{"search.evidence": "selection"})
    return unit.simulate(trace, selection, fidelity=fidelity).seconds


def _one_lane() -> dict[str, float]:
    """A Lane of its own has its share of the memory's bandwidth."""
    config = hardware.load(DOTA).config.model_dump()
    return {"dram.gbytes_per_second": config["dram"]["gbytes_per_second"] / config["lanes"]}


def _seconds(report: Report, part: str) -> float:
    return report.components.get(part, 0.0) / (report.clock_ghz * 1e9)


@cache
def benchmark_numbers(
    benchmark: Benchmark, case: str, share: float, fidelity: str, projection: float = SIGMA
) -> Numbers:
    """`measure` of a published benchmark: one layer of one sequence, times how many there are.

    Masks are drawn at random; ELSA keeps a fifth of the pairs.
    """
    shares = {"ELSA": ELSA_RETENTION} | ({} if case == "F" else {case: share})
    trace = benchmark_trace(benchmark, shares, layers=1, batch=1, drawn=True, projection=projection)
    times = benchmark.layers * benchmark.sequences
    return measure(trace, case, elsa="ELSA", fidelity=fidelity, times=times)


@cache
def gpu_numbers(benchmark: Benchmark, kind: str) -> Numbers:
    """Seconds and joules per sequence of a published benchmark on the GPU."""
    trace = benchmark_trace(benchmark, {}, batch=GPU_BATCH * benchmark.sequences)
    return gpu_of(trace.workload, kind, GPU_BATCH)


def gpu_of(workload: Workload, kind: str, batch: int) -> Numbers:
    """Seconds and joules per sequence of a workload of `batch` sequences on the GPU."""
    found = hardware.load(GPUS[kind]).simulate(Trace(workload, {}), "dense")
    attention = _seconds(found, "attention") / batch
    watts = found.total_energy / found.seconds
    return {
        "seconds": found.seconds / batch,
        "attention_seconds": attention,
        "attention_joules": watts * attention,
    }


def attention_of(numbers: Numbers) -> float:
    """Seconds of detection and attention."""
    return numbers["seconds"]["detection"] + numbers["seconds"]["attention"]
