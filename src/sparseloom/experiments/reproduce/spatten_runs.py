"""Simulations behind SpAtten's tables: each is run once per process, several at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Literal

from sparseloom import hardware
from sparseloom.hardware.report import Fidelity, Report
from sparseloom.hardware.spatten.area import FULL, Structure
from sparseloom.hardware.spatten.power import Activity
from sparseloom.trace import Selection, Trace, Workload
from sparseloom.trace.schema import Scope
from sparseloom.trace.spatten_benchmarks import (
    Benchmark,
    Settings,
    benchmark,
    benchmarks,
    spatten_selection,
)
from sparseloom.trace.traffic import Traffic, trace_traffic

PAPER = "spatten_hpca_2021"
SPATTEN, EIGHTH, E2E = PAPER, "spatten_eighth_hpca_2021", "spatten_e2e_hpca_2021"
NAMES = tuple(one.name for one in benchmarks())
BERT = tuple(name for name in NAMES if name.startswith("bert"))
GPT2 = tuple(name for name in NAMES if name.startswith("gpt2"))
SMALL, MEDIUM = "gpt2-small-wikitext2", "gpt2-medium-wikitext2"

# Generated tokens that stand for all 32: their rows fetch low bits as often (6.9 % against 7.0 %).
SAMPLE = (2, 10, 18, 26)

Variant = Literal["full", "dense", "dense, quantised", "tokens", "heads", "static", "all heads"]
"""What is left of a benchmark: all techniques; dense, of 32 bits or keys of 12 and values of 8;
tokens and values pruned at 32 bits; heads pruned, too; static bits, too; all but head pruning."""


@dataclass(frozen=True)
class Case:
    """One simulation.

    Args:
        name: the benchmark. Texts of GPT-2 differ in nothing that is public: all are the first.
        variant: what is left of it.
        machine, settings: a machine file and (setting, value) pairs that change it.
        fidelity: as in `Machine.simulate`.
        scope: attention alone, or the whole model.
        tokens: generated tokens to simulate; empty = all.
    """

    name: str
    variant: Variant = "full"
    machine: str = SPATTEN
    settings: tuple[tuple[str, object], ...] = ()
    fidelity: Fidelity = "cycle"
    scope: Scope = "attention"
    tokens: tuple[int, ...] = ()

    @property
    def canonical(self) -> Case:
        """The case that this one is equal to."""
        one = benchmark(self.name)
        first = {"gpt2-small": SMALL, "gpt2-medium": MEDIUM}.get(one.model, self.name)
        return self if first == self.name else replace(self, name=first)


_reports: dict[Case, Report] = {}
_locks: dict[Case, Lock] = {}
_guard = Lock()


def report(case: Case) -> Report:
    """The report of a case, simulated on first use."""
    case = case.canonical
    with _guard:
        lock = _locks.setdefault(case, Lock())
    with lock:
        if case not in _reports:
            machine = hardware.load(case.machine, **dict(case.settings))
            trace, selection = workload(case)
            _reports[case] = machine.simulate(trace, selection.name, fidelity=case.fidelity)
        return _reports[case]


def prepare(cases: Iterable[Case]) -> None:
    """Simulate cases on all cores: the compiled loop lets other threads run."""
    wanted = {case.canonical for case in cases} - _reports.keys()
    # The longest first, so that none is left alone at the end.
    order = sorted(wanted, key=lambda case: (case.name.startswith("gpt2-m"), case.name in GPT2))
    workers = min(len(os.sched_getaffinity(0)), len(order))
    if workers:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(report, reversed(order)):
                pass


def settings(one: Benchmark, variant: Variant) -> Settings:
    """The settings of a variant of a benchmark."""
    made = one.settings()
    full = made["spatten"]
    if variant == "full":
        return full
    if variant == "all heads":
        return full.model_copy(update={"heads": None, "head_keep": None})
    if variant == "dense":
        return Settings()
    if variant == "dense, quantised":
        return Settings(key_bits=12, value_bits=8)
    if variant == "static":
        if "spatten-static" in made:
            return made["spatten-static"]
        bits = None if full.key_bits is None else full.key_bits + (full.lsb_bits or 0)
        quiet = {"lsb_bits": None, "lsb_threshold": None, "refetched_heads": {}}
        return full.model_copy(update={"key_bits": bits, **quiet})
    kept = {"tokens", "token_keep", "reference_tokens", "value_keep", "rescales"}
    if variant == "heads":
        kept |= {"heads", "head_keep"}
    return Settings(**{key: getattr(full, key) for key in kept})


def workload(case: Case) -> tuple[Trace, Selection]:
    """The trace of a case and the selection in it."""
    case = case.canonical
    return _workload(case.name, case.variant, case.scope, case.tokens)


@cache
def _workload(
    name: str, variant: Variant, scope: Scope, tokens: tuple[int, ...]
) -> tuple[Trace, Selection]:
    one = benchmark(name)
    operators = one.trace(scope=scope).workload
    chosen = spatten_selection(operators, settings(one, variant), name=variant)
    if tokens:
        operators, chosen = _only(operators, chosen, frozenset(tokens))
    return Trace(operators, {chosen.name: chosen}), chosen


def _only(
    whole: Workload, selection: Selection, tokens: frozenset[int]
) -> tuple[Workload, Selection]:
    pairs = zip(whole.attention(), selection.calls, strict=True)
    calls = tuple(call for operator, call in pairs if operator.step in tokens)
    operators = tuple(operator for operator in whole.operators if operator.step in tokens)
    return replace(whole, operators=operators), replace(selection, calls=calls)


def operations(case: Case) -> float:
    """Executed operations: 2 · head_dim per kept score and per kept value, reruns not counted."""
    case = case.canonical
    return _operations(case.name, case.variant, case.tokens)


@cache
def _operations(name: str, variant: Variant, tokens: tuple[int, ...]) -> float:
    trace, selection = _workload(name, variant, "attention", tokens)
    total = 0.0
    for operator, call in zip(trace.workload.attention(), selection.calls, strict=True):
        padding = trace.workload.padding_of(operator)
        keys = call.kept_pairs(operator, padding).sum()
        values = call.value_pairs(operator, padding).sum()
        total += 2.0 * operator.head_dim * float(keys + values)
    return total


def traffic(case: Case) -> Traffic:
    """Bytes of keys and values."""
    case = case.canonical
    return _traffic(case.name, case.variant, case.tokens)


@cache
def _traffic(name: str, variant: Variant, tokens: tuple[int, ...]) -> Traffic:
    trace, selection = _workload(name, variant, "attention", tokens)
    return trace_traffic(trace, selection.name)


def tera_operations(case: Case) -> float:
    """Executed operations per second, in 10¹²."""
    return operations(case) / report(case).seconds / 1e12


def device(name: str, benchmark_name: str, scope: Scope) -> Report:
    """A processor on a benchmark, everything computed in fp32."""
    return report(Case(benchmark_name, "dense", name, fidelity="analytic", scope=scope))


def activity(found: Report, structure: Structure = FULL) -> Activity:
    """What the units of a run of the full machine did per cycle, from its counted actions."""
    line = f"{structure.line_bits}b"
    in_line = structure.multipliers // structure.head_dim
    done = found.actions
    total = Activity(
        scores=done["qk multiply 12b"] / structure.head_dim,
        values=done["pv multiply 12b"] / structure.head_dim,
        score_lines=done[f"qk sram_read {line}"],
        value_lines=done[f"pv sram_read {line}"],
        key_vectors_written=done[f"qk sram_write {line}"] * in_line,
        value_vectors_written=done[f"pv sram_write {line}"] * in_line,
        softmax_scores=done["softmax exp 32b"],
        topk_items=done["topk compare 12b"] / 2,
        atoms=done["dram dram_read 256b"],
        activates=done["dram dram_activate 0b"],
    )
    return total * (1 / found.cycles)


def limits(found: Report, count: int = 3) -> str:
    """The busiest units of a run, and what units waited for, as shares of its cycles."""
    total = max([1, *(sum(codes.values()) for codes in found.unit_cycles.values())])
    busy = sorted(
        ((codes.get("busy", 0) / total, unit) for unit, codes in found.unit_cycles.items()),
        reverse=True,
    )
    waits = sorted(((lost / total, cause) for cause, lost in found.stalls.items()), reverse=True)
    said = ", ".join(f"{unit.replace('_', ' ')} {share:.0%}" for share, unit in busy[:count])
    lost = ", ".join(f"{cause} {share:.0%}" for share, cause in waits[:2])
    return f"busy: {said}" + (f"; {lost} (summed over units)" if lost else "")
