"""SpAtten (HPCA 2021): roofline (figure 18), design space (figure 19), waterfall (figure 20)."""

from __future__ import annotations

from functools import partial
from statistics import fmean, geometric_mean

from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.experiments.reproduce.spatten_runs import (
    BERT,
    GPT2,
    MEDIUM,
    PAPER,
    SAMPLE,
    SMALL,
    Case,
    Variant,
    device,
    limits,
    operations,
    prepare,
    report,
    tera_operations,
    traffic,
    workload,
)
from sparseloom.experiments.reproduce.spatten_speed import GPT2_RATIOS, assumed, thirty

_add = partial(row, PAPER)
_COUNT = "operations are those of kept scores and values; reruns, softmax and top-k do not count"
_INTENSITY = "bytes are keys, values and queries in, 12-bit outputs out; atoms are counted whole"
_OUTPUT_BITS = 12
_SAMPLE = f"generated tokens {', '.join(map(str, SAMPLE))} of 32 stand for all"
_APPLICATION = (
    "the application of figure 19 is unpublished: GPT-2-Small on WikiText-2 stands for it"
)
_EMIT = "an engine of p lanes also writes min(p, 8) results per cycle"
_TITAN = "the TITAN Xp is a model fitted to one published time, GPT-2-Medium's"
_UNPACKED = "heads of 6-bit keys are not packed in pairs, which 196 KB could not hold"
_STATIC = "static keys: 10 bits (small), 12 bits (medium); values 6 and 8 bits"
_SERIAL = "without the engine, both selections run on one comparator pair"


def fig18() -> list[Row]:
    """Figure 18: operations per second and per byte of BERT's 22 and GPT-2's 8 benchmarks."""
    prepare(thirty())
    rows: list[Row] = []
    for family, names, points in (
        ("bert", BERT, (1.61, 83.0, 14.0, 0.02)),
        ("gpt2", GPT2, (0.43, 2.1, 0.5, 0.01)),
    ):
        add = partial(_add, "fig18")
        given = (*assumed(family), _COUNT, "means are arithmetic, over benchmarks")
        reached = [tera_operations(Case(name)) for name in names]
        slow = "TITAN Xp, TFLOPS, dense"
        gpu = [
            operations(Case(name, "dense")) / device("titan_xp", name, "attention").seconds / 1e12
            for name in names
        ]
        longest = max(names, key=lambda name: report(Case(name)).seconds)
        rows += [
            add(f"{family}: SpAtten, TFLOPS", points[0], fmean(reached), basis="scenario",
                assumptions=given,
                note=f"{min(reached):.2f} to {max(reached):.2f}; {longest}: "
                f"{limits(report(Case(longest)))}"),
            add(f"{family}: SpAtten, operations per byte", points[1],
                fmean(_intensity(Case(name)) for name in names), basis="scenario",
                assumptions=(*given, _INTENSITY)),
            add(f"{family}: dense fp32, operations per byte", points[2],
                fmean(_intensity(Case(name, "dense")) for name in names),
                basis="identity" if family == "gpt2" else "scenario",
                tolerance=0.01 if family == "gpt2" else None,
                assumptions=() if family == "gpt2" else (assumed(family)[0],),
                note="outputs in fp32 here"),
            add(f"{family}: {slow}", points[3], fmean(gpu), basis="scenario",
                assumptions=(*assumed(family)[:1], _TITAN)),
        ]  # fmt: skip
    return rows


def _intensity(case: Case) -> float:
    trace, selection = workload(case)
    moved = float(traffic(case).fetched)
    for operator, call in zip(trace.workload.attention(), selection.calls, strict=True):
        rows = float(operator.batch * operator.heads * operator.q_len)
        if call.key_counts is not None:
            rows = float((call.key_counts > 0).sum())
        bits = (call.query_bits or 32) + (_OUTPUT_BITS if call.query_bits else 32)
        moved += rows * operator.head_dim * bits / 8
    return operations(case) / moved


def traces() -> list[Row]:
    """Four traces of GPT-2: operations, bytes, cycles at both fidelities, and what limits them."""
    chosen: tuple[tuple[str, Variant, float | str], ...] = (
        (SMALL, "full", "not published"),
        (SMALL, "dense, quantised", "not published"),
        (MEDIUM, "static", "not published"),
        (MEDIUM, "dense, quantised", 2 * 2 * 24 * 16 * 64 * sum(range(993, 1025)) / 1e9),
    )
    prepare(Case(name, variant) for name, variant, _ in chosen)
    rows: list[Row] = []
    for name, variant, giga in chosen:
        case = Case(name, variant)
        quick = report(Case(name, variant, fidelity="analytic"))
        found, label = report(case), f"{name}, {variant}"
        bound = operations(case) / (2 * 2 * 512) / 1e6
        add = partial(_add, "traces")
        rows += [
            add(f"{label}: GFLOP executed", giga, operations(case) / 1e9,
                basis="scenario" if isinstance(giga, str) else "identity",
                tolerance=None if isinstance(giga, str) else 1e-6, assumptions=(GPT2_RATIOS,)),
            add(f"{label}: MB from DRAM", "not published", found.dram_bytes / 1e6,
                basis="scenario", assumptions=(GPT2_RATIOS,)),
            add(f"{label}: million cycles, cycle by cycle", "not published", found.cycles / 1e6,
                basis="scenario", assumptions=(GPT2_RATIOS,),
                note=f"{label}: {limits(found)}"),
            add(f"{label}: million cycles, closed form", "not published", quick.cycles / 1e6,
                basis="scenario", assumptions=(GPT2_RATIOS,),
                note=f"{label}, both arrays busy in every cycle: {bound:.2f}"),
        ]  # fmt: skip
    rows.append(
        _add(
            "traces", "gpt2-medium, dense fp32: GB of keys and values",
            operations(Case(MEDIUM, "dense")) / 2 * 4 / 1e9,
            traffic(Case(MEDIUM, "dense")).fetched / 1e9,
            basis="identity", tolerance=1e-6,
        )
    )  # fmt: skip
    return rows


_LANES = {1: 168, 2: 299, 4: 485, 8: 653, 16: 776, 32: 771}
_SRAM_KB = {196: 776, 392: 785, 784: 775}


def _lanes(lanes: int, rule: str) -> Case:
    given = (
        ("topk.lanes", lanes), ("topk.emit_per_cycle", min(lanes, 8)),
        ("topk.token_selection", rule),
    )  # fmt: skip
    return Case(SMALL, settings=given, tokens=SAMPLE)


def _lines(kilobytes: int) -> Case:
    # 256 lines each are 2 x 196,608 B, which the paper calls 392 KB.
    lines = 256 * kilobytes // 392
    sizes = (("key_sram.lines", lines), ("value_sram.lines", lines))
    # The tables of area and energy have no bank this wide of every capacity; only time counts here.
    given = (*sizes, ("energy.sram_kib", 192.0), ("layout.pack_6bit_keys", 1))
    return Case(SMALL, settings=given, tokens=SAMPLE)


def fig19() -> list[Row]:
    """Figure 19: throughput over the lanes of the top-k engines, and over the K and V SRAM."""
    rules = {
        "layer": "tokens are ranked where a layer keeps fewer",
        "row": "tokens are ranked anew before every row",
    }
    cases = [_lanes(lanes, rule) for lanes in _LANES for rule in rules]
    prepare([*cases, *map(_lines, _SRAM_KB)])
    rows: list[Row] = []
    for rule, said in rules.items():
        ours = {lanes: 1e3 * tera_operations(_lanes(lanes, rule)) for lanes in _LANES}
        for lanes, published in _LANES.items():
            given = (_APPLICATION, said, _EMIT, _SAMPLE, _COUNT)
            note = f"{lanes} lanes, ranked per {rule}: {limits(report(_lanes(lanes, rule)))}"
            rows += [
                _add("fig19", f"GFLOPS, {lanes} lanes, ranked per {rule}", published, ours[lanes],
                     basis="scenario", assumptions=given, note=note),
                _add("fig19", f"throughput at {lanes} lanes over 16, ranked per {rule}",
                     published / _LANES[16], ours[lanes] / ours[16], basis="scenario",
                     assumptions=given),
            ]  # fmt: skip
    whole = 1e3 * tera_operations(_lines(392))
    for kilobytes, published in _SRAM_KB.items():
        ours = 1e3 * tera_operations(_lines(kilobytes))
        given = (_APPLICATION, _SAMPLE, _COUNT, _UNPACKED)
        note = f"{kilobytes} KB of SRAM: {limits(report(_lines(kilobytes)))}"
        rows += [
            _add("fig19", f"GFLOPS, {kilobytes} KB of K and V SRAM", published, ours,
                 basis="scenario", assumptions=given, note=note),
            _add("fig19", f"throughput at {kilobytes} KB of SRAM over 392", published / 785,
                 ours / whole, basis="scenario", assumptions=given),
        ]  # fmt: skip
    return rows


_SERIAL_TOPK = (("topk.lanes", 1), ("topk.emit_per_cycle", 1))
# Step: what is left of the workload, the machine, and the speed-up over the step before.
_STEPS: tuple[tuple[str, Variant, tuple[tuple[str, object], ...], float], ...] = (
    ("datapath", "dense", (), 22.1),
    ("+ token and value pruning", "tokens", _SERIAL_TOPK, 1.1),
    ("+ head pruning", "heads", _SERIAL_TOPK, 1.1),
    ("+ top-k engine of 16", "heads", (), 3.0),
    ("+ static quantisation", "static", (), 1.6),
    ("+ progressive quantisation", "full", (), 1.7),
)


def fig20() -> list[Row]:
    """Figure 20: where the speed-up over a TITAN Xp comes from, on GPT-2's eight benchmarks."""
    prepare(_step(i, name) for i in range(len(_STEPS)) for name in (MEDIUM, SMALL))
    rows: list[Row] = []
    gpu = [report(_titan(name)).seconds for name in (SMALL, MEDIUM)]
    times = [[report(_step(i, name)).seconds for name in (SMALL, MEDIUM)] for i in range(6)]

    def over(slow: list[float], fast: list[float]) -> float:
        return geometric_mean(a / b for a, b in zip(slow, fast, strict=True))

    given = (GPT2_RATIOS, _SAMPLE, _STATIC)
    for i, (label, _, settings, published) in enumerate(_STEPS):
        serial = (_SERIAL,) if settings else ()
        base = gpu if i == 0 else times[i - 1]
        said = (f"{name}: {limits(report(_step(i, name)))}" for name in (SMALL, MEDIUM))
        note = f"{label}: {'; '.join(said)}"
        rows.append(
            _add(
                "fig20", f"{label}: over the step before" if i else "datapath: over TITAN Xp",
                published, over(base, times[i]), basis="scenario",
                assumptions=(*given, *serial, *(() if i else (_TITAN,))), note=note,
            )
        )  # fmt: skip
    for label, i, j, published in (
        ("pruning and top-k engine together", 0, 3, 3.4),
        ("quantisation together", 3, 5, 2.8),
    ):
        rows.append(
            _add("fig20", label, published, over(times[i], times[j]), basis="scenario",
                 assumptions=given)
        )  # fmt: skip
    for label, i, published in (("with the top-k engine", 3, 74.2), ("everything", 5, 209.0)):
        rows.append(
            _add("fig20", f"{label}: over TITAN Xp", published, over(gpu, times[i]),
                 basis="scenario", assumptions=(*given, _TITAN))
        )  # fmt: skip
    return rows


def _step(i: int, name: str) -> Case:
    _, variant, settings, _ = _STEPS[i]
    return Case(name, variant, settings=settings, tokens=SAMPLE)


def _titan(name: str) -> Case:
    return Case(name, "dense", "titan_xp", fidelity="analytic", tokens=SAMPLE)
