"""Every accelerator at one size: sizes, what each one computes, and what may be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware import MachineError
from sparseloom.hardware.comparison import Comparison, Run, load_comparison, rows, runs, verdict
from sparseloom.hardware.scaling import energy_scale
from sparseloom.results import results
from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Selection,
    Trace,
    Workload,
    transformer_operators,
)

LENGTH = 64


def trace(*, head_dim: int = 64, quality: dict[str, object] | None = None) -> Trace:
    """One layer of two heads; selection "half" keeps every second key."""
    width = 2 * head_dim
    shape = ModelShape(layers=1, hidden_size=width, heads=2, kv_heads=2, head_dim=head_dim)
    operators = tuple(op for op in transformer_operators(shape, q_len=LENGTH) if op.is_attention)
    keys = np.tile(np.arange(0, LENGTH, 2, dtype=np.int32), LENGTH)
    offsets = np.arange(0, keys.size + 1, LENGTH // 2, dtype=np.int64).reshape(1, 1, -1)
    mask = MaskArrays(keys, offsets, (1, 1), LENGTH, LENGTH, False)
    half = Selection("half", (AttentionCall(mask=mask),), {"method": "oracle"}, quality or {})
    return Trace(Workload(shape, operators, name="t", scope="attention"), {"half": half})


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return load_comparison()


@pytest.fixture(scope="module")
def found(comparison: Comparison) -> list[Run]:
    quality = {"metric": "accuracy", "value": 0.75, "dense_value": 0.75}
    return list(runs(comparison, trace(quality=quality)))


def one(found: list[Run], name: str, selection: str, configuration: str = "one size") -> Run:
    (run,) = [
        run
        for run in found
        if (run.accelerator.name, run.selection, run.configuration)
        == (name, selection, configuration)
    ]
    return run


def test_all_have_one_size(comparison: Comparison) -> None:
    names = [one.machine for one in comparison.accelerators]
    for family in ("spatten", "dota", "elsa", "a3", "mnnfast", "dense_static", "dense_ideal"):
        assert any(name.startswith(family) for name in names)
    for one in comparison.accelerators:
        machine = one.at("one size")
        assert machine.roof() == pytest.approx((256e9, 64e9))
        assert machine.config.clock_ghz == 1.0
        assert one.at("as published").name == one.machine


def test_every_published_configuration_stands_beside(found: list[Run]) -> None:
    assert found[0].accelerator.name == "dense"
    for name in ("SpAtten", "DOTA"):
        for selection in ("dense", "half"):
            published = one(found, name, selection, "as published")
            assert published.report is not None
            assert published.machine.config_hash == (
                hardware.load(published.accelerator.machine).config_hash
            )
    # A3 was published at this size, and chooses by itself: one run.
    assert [run.configuration for run in found if run.accelerator.name == "A3"] == ["one size"]


def test_cycles_at_one_size_by_hand(found: list[Run]) -> None:
    pairs = 2 * LENGTH * LENGTH
    dense = one(found, "dense", "dense").report
    dota = {name: one(found, "DOTA", name).report for name in ("dense", "half")}
    assert dense is not None
    assert dense.cycles == pairs * 2 * 64 / 128
    assert dota["dense"] is not None
    assert dota["half"] is not None
    assert dota["dense"].cycles == dense.cycles
    assert dota["half"].cycles == dense.cycles / 2


def test_energy_is_scaled_to_the_node_but_for_dram(found: list[Run]) -> None:
    run = one(found, "DOTA", "dense")
    assert run.report is not None
    assert run.energy is not None
    scale = energy_scale(22, 40, from_volts=hardware_volts(22), to_volts=hardware_volts(40))
    assert scale > 2
    for part, joules in run.report.energy.items():
        times = 1.0 if part == "dram" else scale
        assert run.energy[part] == pytest.approx(joules * times)
    assert "dram" in run.report.energy
    published = one(found, "DOTA", "dense", "as published")
    assert published.report is not None
    assert published.energy == published.report.energy
    fpga = one(found, "MnnFast", "dense")
    assert fpga.report is not None
    assert fpga.energy == fpga.report.energy


def hardware_volts(node: int) -> float:
    from sparseloom.hardware.scaling import nominal_volts

    return nominal_volts(node)


def test_accuracy_belongs_to_what_is_computed(found: list[Run]) -> None:
    dense = found[0]
    assert (dense.accuracy.value, dense.accuracy.metric) == (0.75, "accuracy")
    assert one(found, "DOTA", "half").accuracy.value == 0.75
    # SpAtten prunes tokens, not pairs, and A3 takes keys of its own: neither is the oracle's half.
    for name, selection in (("SpAtten", "half"), ("A3", "dense"), ("MnnFast", "dense")):
        run = one(found, name, selection)
        assert run.accuracy.value is None
        assert (
            verdict(run, dense)
            == f"no comparison: accuracy of {run.accuracy.computes} is not known"
        )
    assert verdict(one(found, "DOTA", "half"), dense) == ""
    assert verdict(one(found, "SpAtten", "dense"), dense) == ""
    assert verdict(one(found, "DOTA", "half", "as published"), dense) == (
        "no comparison: another size"
    )


def test_elsa_follows_its_own_selection_alone(comparison: Comparison) -> None:
    few = replace_accelerators(comparison, "dense", "ELSA")
    plain = trace()
    calls = plain.selection("half").calls
    quality = {"metric": "accuracy", "value": 0.7, "dense_value": 0.75}
    own = Selection("elsa:p=1", calls, {"method": "elsa"}, quality)
    found = list(runs(few, replace(plain, selections={**plain.selections, own.name: own})))
    said = {(run.selection, run.accuracy.computes, run.accuracy.value) for run in found[1:]}
    assert said == {
        ("dense", "keys of its own choice, a fifth of the pairs", None),
        ("elsa:p=1", "elsa:p=1", 0.7),
    }
    sized, published = (
        one(found, "ELSA", "elsa:p=1", configuration).report
        for configuration in ("one size", "as published")
    )
    assert sized is not None
    assert published is not None
    # 32 candidates a query: in one bank, or in two of four, every second key being kept.
    assert 2 < sized.cycles / published.cycles < 2.5


@pytest.mark.parametrize(
    ("quality", "within", "said"),
    [
        ({}, 0.0, "no comparison: accuracy of half is not known"),
        ({"metric": "loss", "value": 2.0}, 0.0, "no comparison: accuracy of dense attention"),
        ({"metric": "m", "value": 0.7, "dense_value": 0.75}, 0.0, "no comparison: m 0.7 against"),
        ({"metric": "m", "value": 0.7, "dense_value": 0.75}, 0.04, "no comparison: m 0.7 against"),
        ({"metric": "m", "value": 0.7, "dense_value": 0.75}, 0.05, ""),
        ({"metric": "m", "value": 0.75, "dense_value": 0.75}, 0.0, ""),
    ],
)
def test_unequal_or_unknown_accuracy_is_no_comparison(
    comparison: Comparison, quality: dict[str, object], within: float, said: str
) -> None:
    few = replace_accelerators(comparison, "dense", "DOTA")
    found = list(runs(few, trace(quality=quality)))
    text = verdict(one(found, "DOTA", "half"), found[0], within)
    assert text.startswith(said) if said else text == ""
    # Whatever was measured, dense attention on two machines is the same computation.
    assert verdict(one(found, "DOTA", "dense"), found[0], within) == ""


def replace_accelerators(comparison: Comparison, *names: str) -> Comparison:
    kept = [one for one in comparison.accelerators if one.name in names]
    return comparison.model_copy(update={"accelerators": kept})


def test_one_who_cannot_run_says_why_in_a_row(comparison: Comparison) -> None:
    few = replace_accelerators(comparison, "dense", "SpAtten", "DOTA")
    found = list(runs(few, trace(head_dim=48)))
    refused = [run for run in found if run.report is None]
    assert {run.accelerator.name for run in refused} == {"SpAtten"}
    made = results(rows(found, few.budget, trace="t", within=0.0), command="test").rows
    records = [row.model_dump() for row in made if "record" in type(row).model_fields]
    assert len(records) == len(refused) == 4
    assert all(
        "must be a multiple of head_dim, got head_dim 48" in row["reason"] for row in records
    )
    assert len(made) == len(found)


def test_rows_carry_accuracy_of_the_machine(comparison: Comparison, found: list[Run]) -> None:
    made = rows(found, comparison.budget, trace="t", within=0.0)
    results(made, command="test")
    for run, row in zip(found, made, strict=True):
        assert row["value"] == run.accuracy.value
        assert run.report is not None
        assert row["cycles"] == run.report.cycles
    assert made[0]["times_as_fast_as_dense"] == 1.0
    faster = [row for row in made if row["accelerator"] == "DOTA" and row["selection"] == "half"]
    assert faster[0]["times_as_fast_as_dense"] == pytest.approx(2.0)


def test_other_fidelities_and_scopes(comparison: Comparison) -> None:
    few = replace_accelerators(comparison, "dense", "A3")
    found = list(runs(few, trace(), fidelity="cycle"))
    assert [run.report.fidelity for run in found if run.report] == ["analytic", "cycle"]
    whole = replace(trace(), workload=replace(trace().workload, scope="model"))
    with pytest.raises(ValueError, match="scope must be attention"):
        list(runs(few, whole))
    with pytest.raises(ValueError, match="no selection 'third'"):
        list(runs(few, trace(), ["third"]))


ENTRY = """
  - name: dense
    machine: dense_ideal
    follows: dense
    computes: every allowed pair
    size: a bound
    operands: none
"""
HEAD = "schema: sparseloom/comparison/1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "budget: {multipliers: 64, clock_ghz: 1.0, gbytes_per_second: 64.0, node_nm: 40}\n"
            f"accelerators:{ENTRY}",
            r"dense: operations per second must be 1\.28e\+11 at one size, got 2\.56e\+11",
        ),
        (
            "budget: {multipliers: 128, clock_ghz: 1.0, gbytes_per_second: 32.0, node_nm: 40}\n"
            f"accelerators:{ENTRY}",
            r"dense: bytes per second must be 3\.2e\+10 at one size, got 6\.4e\+10",
        ),
        (
            "budget: {multipliers: 128, clock_ghz: 0.5, gbytes_per_second: 64.0, node_nm: 40}\n"
            f"accelerators:{ENTRY}",
            r"dense: clock_ghz must be 0\.5",
        ),
        (
            "budget: {multipliers: 128, clock_ghz: 1.0, gbytes_per_second: 64.0, node_nm: 40}\n"
            f"accelerators:{ENTRY.replace('follows: dense', 'follows: []')}",
            "the first accelerator must follow dense, got 'dense'",
        ),
        (
            "budget: {multipliers: 128, clock_ghz: 1.0, gbytes_per_second: 64.0, node_nm: 40}\n"
            f"accelerators:{ENTRY}    bits: 3",
            "unknown key 'accelerators.0.bits'",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(HEAD + text)
    with pytest.raises(MachineError, match=message) as caught:
        load_comparison(file)
    assert "\n" not in str(caught.value)


def test_unknown_comparison() -> None:
    with pytest.raises(MachineError, match="unknown comparison 'accelerator'; did you mean"):
        load_comparison("accelerator")
