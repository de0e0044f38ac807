"""Dai et al. (DAC 2023): what our machine of static regions gives on head templates.

Templates, their mix and the energies were fitted to the published headline together. Rows that need
them are calibrated and no evidence; rows of other sizes follow from the same fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from sparseloom import hardware
from sparseloom.experiments.reproduce import static_learned
from sparseloom.experiments.reproduce.rows import Row, row
from sparseloom.experiments.reproduce.static_templates import (
    encoder,
    mix_trace,
    template_trace,
)
from sparseloom.experiments.reproduce.static_templates import (
    templates as head_templates,
)
from sparseloom.hardware.static_dense import StaticDense
from sparseloom.hardware.static_dense.assumptions import scope_text
from sparseloom.trace import AttentionCall, MaskArrays, Selection, Trace

PAPER = "static_dac_2023"
READINGS = {
    "latency": "dense_static_dac_2023",
    "speed-up": "dense_static_speedup_dac_2023",
}
"""How "58.9 % performance improvement" is read → the machine."""
LENGTH = 384  # of the question-answering inputs that the authors' other work measures
LENGTHS = (128, 256, 384, 512, 1024, 2048)
_ROOMY = {"buffers.weight_kib": 160, "buffers.probability_kib": 32}
DESIGN = "region design, templates, their mix and the energies are ours, fitted to the headline"
_NONE = "not published"
_CORE = "attention core, no DRAM"


class Gain(NamedTuple):
    """Cycles and energy over those of the dense base, and tiles of work over all tiles."""

    cycles: float
    energy: float
    tiles: float
    scope: str


@cache
def _machine(reading: str, **overrides: Any) -> StaticDense:
    machine = hardware.load(READINGS[reading], **overrides)
    assert isinstance(machine, StaticDense)
    return machine


@cache
def _mix(length: int) -> Trace:
    return mix_trace(length)


@cache
def gain(reading: str, length: int, fidelity: str = "analytic", **overrides: Any) -> Gain:
    """The mix of templates on BERT-base over the dense base."""
    machine = _machine(reading, **overrides)
    mix, dense = (
        machine.simulate(_mix(length), name, fidelity=fidelity) for name in ("mix", "dense")
    )
    return Gain(
        mix.cycles / dense.cycles,
        mix.total_energy / dense.total_energy,
        mix.utilisation["tiles"],
        scope_text(machine.settings),
    )


def headline(study: Sequence[Row]) -> list[Row]:
    """The abstract's four numbers: energy, performance in both readings, area, accuracy.

    `study` holds rows of quality and of learned masks, where they are stored.
    """
    found: list[Row] = []
    for reading in READINGS:
        for fidelity in ("analytic", "cycle"):
            got = gain(reading, LENGTH, fidelity)
            about = f"{_CORE}, {fidelity}, read as {reading}"
            fitted = fidelity == "analytic"
            if reading == "latency":
                found.append(_fit(f"change of latency ({about})", -0.589, got.cycles - 1, fitted))
            else:
                found.append(_fit(f"speed-up ({about})", 1.589, 1 / got.cycles, fitted))
            found.append(_fit(f"change of energy ({about})", -0.566, got.energy - 1, fitted))
    found[0]["note"] = "the conference programme, earlier: 55 % energy, 5 % area, no performance"
    return [*found, _overhead("headline"), *static_learned.headline_rows(study)]


def area() -> list[Row]:
    """The extension's area over the base: descriptor RAM, sequencer, pooling, tags, compaction."""
    machine = _machine("latency")
    parts = machine.area()
    basis, found = _AREA, [_overhead("area")]
    for name, size in parts.items():
        if name != "base":
            quantity = f"{name.replace('_', ' ')}, µm² (area)"
            found.append(_ours("area", quantity, size * 1e6, "scenario", basis))
    words = machine.descriptor_bytes
    found.append(_ours("area", "descriptor RAM, bytes (two copies)", words, "scenario", basis))
    return found


_AREA = "bits at 0.10 µm², gates at 0.06 µm², 40 % for wires; base: 0.153 mm² at 5 nm"


def _overhead(table: str) -> Row:
    return row(
        PAPER,
        table,
        "extension over the base PE (area)",
        0.026,
        _machine("latency").area_overhead(),
        basis="scenario",
        assumptions=(_AREA, "the published base and node are not public"),
        note="an order of magnitude, not a layout",
    )


def templates() -> list[Row]:
    """Head templates at 384 tokens: share of tiles, runs, and cycles over dense."""
    machine, trace = _machine("latency"), template_trace(LENGTH)
    alone = Trace(encoder(LENGTH, layers=1, heads=1))
    found: list[Row] = []
    for fidelity in machine.fidelities:
        dense = machine.simulate(alone, "dense", fidelity=fidelity)
        about = f"{_CORE}, {fidelity}"
        found.append(_own("templates", f"dense head: cycles ({about})", dense.cycles))
        microjoules = dense.total_energy * 1e6
        found.append(_own("templates", f"dense head: energy, µJ ({about})", microjoules))
        for name in head_templates(LENGTH):
            got = machine.simulate(trace, name, fidelity=fidelity)
            facts = got.stages[0].facts
            if fidelity == "analytic":
                share = float(facts["tiles"]) / float(facts["grid"])
                found.append(_own("templates", f"{name}: tiles of work over all", share))
                found.append(_own("templates", f"{name}: runs", float(facts["runs"])))
            over = got.cycles / dense.cycles
            found.append(_own("templates", f"{name}: cycles over dense ({about})", over))
    return found


def density() -> list[Row]:
    """Uniform density at 384 tokens, two runs in every query tile: speed-up and energy."""
    found: list[Row] = []
    for share in (0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.60):
        trace = _uniform(share)
        for reading in READINGS:
            machine = _machine(reading)
            got, dense = (machine.simulate(trace, name) for name in ("uniform", "dense"))
            about = f"{_CORE}, analytic, read as {reading}"
            at = f"density {share:g}"
            found.append(_own("density", f"{at}: speed-up ({about})", dense.cycles / got.cycles))
            change = got.total_energy / dense.total_energy - 1
            found.append(_own("density", f"{at}: change of energy ({about})", change))
    return found


def length() -> list[Row]:
    """The same mix of templates at 128 to 2048 tokens: speed-up, energy, and tiles of work."""
    found: list[Row] = []
    for tokens in LENGTHS:
        at = f"{tokens} tokens"
        for reading in READINGS:
            got = gain(reading, tokens)
            about = f"{_CORE}, analytic, read as {reading}"
            found.append(_own("length", f"{at}: speed-up ({about})", 1 / got.cycles))
            found.append(_own("length", f"{at}: change of energy ({about})", got.energy - 1))
        if tokens in (512, 1024):
            wide = gain("latency", tokens, **_ROOMY)
            about = f"{_CORE}, analytic, read as latency, buffers for all keys"
            found.append(_own("length", f"{at}: speed-up ({about})", 1 / wide.cycles))
        share = gain("latency", tokens).tiles
        found.append(_own("length", f"{at}: tiles of work over all", share))
    return found


def scope() -> list[Row]:
    """What is charged decides: core, with projections, whole model; without and with DRAM."""
    found: list[Row] = []
    for work in ("core", "mha", "model"):
        for dram in (False, True):
            got = gain("latency", LENGTH, **{"scope.work": work, "scope.dram": dram})
            about = f"{got.scope}, analytic, read as latency"
            found.append(_own("scope", f"speed-up ({about})", 1 / got.cycles))
            found.append(_own("scope", f"change of energy ({about})", got.energy - 1))
    # Only energy: bytes that come as fast as they are wanted.
    for picojoules in (10.0, 30.0):
        options = {"scope.dram": True, "scope.dram_pj_per_byte": picojoules}
        got = gain("latency", LENGTH, **options)
        about = f"{got.scope}, analytic, read as latency"
        found.append(_own("scope", f"change of energy ({about})", got.energy - 1))
    return [*found, *_shares()]


def _shares() -> Iterator[Row]:
    """Arithmetic of an encoder layer: how much of it the published saving would have to be."""
    hidden = 768
    for tokens in (384, 512, 1024, 4096):
        core = 2 * tokens**2 * hidden
        yield _ours(
            "scope",
            f"{tokens} tokens: attention core over an encoder layer, multiply-accumulates",
            core / (core + 12 * tokens * hidden**2),
            "identity",
            "width 768, feed-forward of four times that",
        )
    for name, products in (("a layer", 12), ("attention with projections", 4)):
        # core / (core + rest) = saving, core = 2 n² D, rest = products · n · D².
        least = 0.566 / (1 - 0.566) * products * hidden / 2
        yield _ours(
            "scope",
            f"fewest tokens at which 56.6 % of {name} can be saved, if its core cost nothing",
            float(np.ceil(least)),
            "identity",
            "by multiply-accumulates, width 768",
        )


def _uniform(share: float) -> Trace:
    """One head whose query tiles keep two runs each, of this share of the tiles together."""
    rows, columns = LENGTH // 16, LENGTH // 32
    tiles = round(share * rows * columns)
    keep = np.zeros((rows, columns), np.bool_)
    for t in range(rows):
        count = tiles // rows + (t < tiles % rows)
        keep[t, : count - 1] = keep[t, count] = True
    whole = keep.repeat(16, axis=0).repeat(32, axis=1)[None, None]
    call = AttentionCall(MaskArrays.from_bool(whole, block_size=(16, 32)))
    workload = encoder(LENGTH, layers=1, heads=1)
    return Trace(workload, {"uniform": Selection("uniform", (call,))})


def _fit(quantity: str, published: float, ours: float, fitted: bool) -> Row:
    """A row of the fit; the closed form was fitted, the steps follow from it and are reported."""
    return row(
        PAPER,
        "headline",
        quantity,
        published,
        ours,
        tolerance=0.03 if fitted else None,
        basis="calibrated",
        assumptions=(DESIGN, f"BERT-base, {LENGTH} tokens, 144 heads of six templates"),
    )


def _own(table: str, quantity: str, ours: float) -> Row:
    """A number of our model on templates, which no one has published."""
    return _ours(table, quantity, ours, "calibrated", DESIGN)


def _ours(table: str, quantity: str, ours: float, basis: Any, assumption: str) -> Row:
    return row(PAPER, table, quantity, _NONE, ours, basis=basis, assumptions=(assumption,))
