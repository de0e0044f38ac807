"""SpAtten (HPCA 2021), sections V-A and V-B: low bits, average widths, DRAM and computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from sparseloom.experiments.reproduce import Study
from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.experiments.reproduce.spatten_files import (
    SMALL,
    SMALL_DENSE,
    Statistics,
    published,
    statistics,
)
from sparseloom.experiments.reproduce.spatten_runs import Case, operations, traffic
from sparseloom.experiments.reproduce.spatten_speed import assumed
from sparseloom.trace.spatten_benchmarks import benchmark, benchmarks

if TYPE_CHECKING:
    from sparseloom.report.html import Section

PAPER = "spatten_hpca_2021"
GENERATION = Study(
    "spatten_generation.json",
    None,
    "python -m sparseloom.experiments.spatten_generation",
)
ENCODER = Study("spatten_encoder.json", None, "python -m sparseloom.experiments.spatten_encoder")
LENGTHS = Study(
    "benchmark_lengths.json", None, "python -m sparseloom.experiments.lengths --data DATA"
)
TEXTS = ("wikitext2", "ptb")
"""Texts of GPT-2's benchmarks that can be had; of GLUE and SQuAD those whose length is stored."""

_add = partial(row, PAPER)
_LOW, _BITS, _DRAM, _WORK = 5.9, 7.8, 10.0, 2.1
_ONE = "one benchmark; the published number is an average over benchmarks"
_SMALL = "gpt2-small-wikitext2"
_PROFILE = "together, as the trace, newest 32"
_PROMPT, _STEPS = 480, 16
_RECORDED = (
    f"the built-in byte model, {_PROMPT} bytes of held-out text and {_STEPS} generated, pruned and "
    "quantised as the trace of GPT-2 small"
)


def bits(study: Sequence[Row]) -> list[Row]:
    """Section V-A: rows that fetch low bits, and the average width of what is fetched."""
    rows: list[Row] = []
    for name, found in _measured().items():
        add = partial(_add, "bits", assumptions=_given(name), basis="scenario")
        rows += [
            add(f"{name}: rows that fetch low bits, %", _LOW, 100 * found.low_rows / found.rows),
            add(f"{name}: average width of keys, bits", "not published", found.average_key_bits),
            add(f"{name}: average width, bits", _BITS, found.average_bits),
        ]
    for one in _contenders(study):
        key_bits = one["settings"]["key_bits"]
        if not key_bits or not key_bits[1]:
            continue
        label = f"{one['model']}, {one['contender']}"
        note = f"{one['value']:.3f} {one['metric']}, {one['difference']:+.3f} over dense"
        add = partial(_add, "bits", assumptions=(_setting(one),), basis="scenario", note=note)
        width = key_bits[0] * (1 + one["key_low_share"] / one["key_high_share"])
        rows += [
            add(f"{label}: rows that fetch low bits, %", _LOW, 100 * one["low_rows"]),
            add(f"{label}: average width of keys, bits", "not published", width),
        ]
    return rows


def reductions(study: Sequence[Row]) -> list[Row]:
    """Section V-B: how much less is fetched and computed, in the authors' traces and in ours."""
    rows = _replayed()
    for name, found in _measured().items():
        add = partial(_add, "reductions", assumptions=_given(name), basis="scenario")
        rows += [
            add(f"{name}: DRAM access, all heads", _DRAM, found.dram()),
            add(f"{name}: DRAM access without low bits", "not published", found.dram(low=False)),
            add(f"{name}: computation", _WORK, found.computation),
        ]
    medium = benchmark("gpt2-medium-wikitext2").trace()
    found = statistics(medium.workload, medium.selection("spatten-static"))
    add = partial(_add, "reductions", assumptions=_given("gpt2-medium"), basis="scenario")
    rows += [
        add("profile of the medium trace: DRAM access, all heads", _DRAM, found.dram()),
        add("profile of the medium trace: DRAM access, heads alive", _DRAM,
            found.dram(present=True)),
        add("profile of the medium trace: computation", _WORK, found.computation),
    ]  # fmt: skip
    for one in _contenders(study):
        if not str(one["contender"]).startswith("together"):
            continue
        rows.append(
            _add(
                "reductions", f"{one['model']}, {one['contender']}: DRAM access", _DRAM,
                one["dram_reduction"], basis="scenario", assumptions=(_setting(one),),
                note=f"{one['value']:.3f} {one['metric']}, {one['difference']:+.3f} over dense",
            )
        )  # fmt: skip
    for one in study:
        if one.get("record") != "spatten_encoder" or one["batch"] != 1 or one["macs"] == 1:
            continue
        left = f"{one['tokens_alive']:.0%} of the tokens and {one['heads_alive']:.1%} of the heads"
        rows.append(
            _add(
                "reductions", f"{one['model']}, {left}: computation, whole model", _WORK,
                1 / one["macs"], basis="scenario",
                assumptions=(f"{one['model']} on documents of {one['length']} tokens",
                             "the published number is of attention alone"),
            )
        )  # fmt: skip
    return rows


def by_benchmark(study: Sequence[Row]) -> list[Row]:
    """Section V-B: DRAM access and computation of each benchmark whose data can be had."""
    lengths = {one["benchmark"]: one for one in study if one.get("record") == "benchmark_length"}
    chosen = [
        one for one in benchmarks() if one.task in lengths or (one.new_tokens and one.task in TEXTS)
    ]
    rows: list[Row] = []
    for one in chosen:
        case, dense = Case(one.name), Case(one.name, "dense")
        moved, whole = traffic(case), traffic(dense)
        read = lengths.get(one.task)
        note = None if read is None else f"{read['inputs']} inputs: {read['split']}"
        add = partial(
            _add, "by-benchmark", basis="scenario", assumptions=assumed(one.name), note=note
        )
        mean = "{:g} on average of 30"
        rows += [
            add(f"{one.name}: DRAM access, useful bytes", mean.format(_DRAM),
                whole.useful / moved.useful),
            add(f"{one.name}: DRAM access, fetched bytes", mean.format(_DRAM),
                whole.fetched / moved.fetched),
            add(f"{one.name}: computation", mean.format(_WORK),
                operations(dense) / operations(case)),
        ]  # fmt: skip
    return rows


def bits_picture(study: list[Row]) -> list[Section]:
    """DRAM access of our runs against what they lose."""
    from sparseloom.report.bar_figures import lines
    from sparseloom.report.html import Section

    curves: dict[str, list[tuple[float, float]]] = {}
    for one in _contenders(study):
        if str(one["contender"]).startswith(("together", "keys 8+4,")):
            curves.setdefault(str(one["model"]), []).append(
                (one["dram_reduction"], one["difference"])
            )
    if not curves:
        return []
    figure = lines(
        curves, x_title="bytes of dense fp32 over those read", y_title="bits per token over dense"
    )
    text = (
        "All techniques together, in generation after a dense prompt; the paper reports 10× "
        "without loss, on models and ratios that it does not print."
    )
    return [Section("Bytes read against quality", text, (figure,))]


# ------------------------------------------------------------------ private


def _replayed() -> list[Row]:
    """Our workload of a published trace beside the trace itself, where it is at hand."""
    rows: list[Row] = []
    ours = benchmark(_SMALL).trace()
    for file, selection in ((SMALL, "spatten"), (SMALL_DENSE, "dense")):
        theirs = published(file)
        if theirs is None:
            rows.append(
                _add(
                    "reductions", f"{file}: what it counts", "the authors' file", "not at hand",
                    basis="identity", note="set SPARSELOOM_DATA to where spatten_traces lies",
                )
            )  # fmt: skip
            continue
        mine = statistics(ours.workload, ours.selection(selection))
        quantities: dict[str, tuple[float, float]] = {
            "keys read": (theirs.keys, mine.keys),
            "values read": (theirs.values, mine.values),
            "rows that fetch low bits": (theirs.low_rows, mine.low_rows),
            "keys read over all": (theirs.keys / theirs.length, mine.keys / mine.length),
            "values read over all": (theirs.values / theirs.length, mine.values / mine.length),
            "DRAM access, all heads": (theirs.dram(), mine.dram()),
            "DRAM access without low bits": (theirs.dram(low=False), mine.dram(low=False)),
            "computation": (theirs.computation, mine.computation),
        }
        if selection == "dense":
            quantities = {name: quantities[name] for name in ("keys read", "values read")}
        rows += [
            _add("reductions", f"{file}: {name}", their, our, basis="identity", tolerance=1e-12,
                 note="the authors' file beside the workload that we make of its settings")
            for name, (their, our) in quantities.items()
        ]  # fmt: skip
    return rows


@cache
def _measured() -> dict[str, Statistics]:
    """The authors' trace, or ours of its settings, and a run of our own."""
    theirs = published(SMALL)
    if theirs is None:
        trace = benchmark(_SMALL).trace()
        theirs = statistics(trace.workload, trace.selection("spatten"))
    return {"trace of GPT-2 small": theirs, "built-in model, recorded": _recorded()}


def _recorded() -> Statistics:
    """A run of the built-in model under the profile of the small trace, as its trace counts it."""
    from sparseloom.experiments.spatten_generation import built_in, contenders
    from sparseloom.integrations import record

    text = built_in(1, _PROMPT, 1)
    layers = text.model.model.config.num_hidden_layers
    method = next(one.method for one in contenders(layers) if one.name == _PROFILE)
    inputs: dict[str, Any] = {"input_ids": text.ids[:, :_PROMPT]}
    trace = record(text.model.model, method, inputs, new_tokens=_STEPS)
    return statistics(trace.workload, trace.selection())


def _given(name: str) -> tuple[str, ...]:
    if name.startswith("built-in"):
        each = "query heads that share keys fetch them each, as the machine does"
        return (_RECORDED, each, "keys and values against dense fp32")
    return (_ONE, *assumed("gpt2"), "keys and values against dense fp32")


def _contenders(study: Sequence[Row]) -> list[Row]:
    return [one for one in study if generated_with_spatten(one)]


def generated_with_spatten(one: Mapping[str, Any]) -> bool:
    """Whether a stored row is a run of this method in generation, not of a later one."""
    return one.get("record") == "generation" and one["settings"]["method"] == "spatten"


def _setting(one: Row) -> str:
    return (
        f"{one['model']} on {one['text']}: {one['windows']} windows, prompt of {one['prompt']}, "
        f"{one['steps']} steps"
    )
