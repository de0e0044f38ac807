"""The cost rule: what it counts, when it has a say, and which table it reads.  No times here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseloom.methods import (
    AttentionInputs,
    AttentionShape,
    DynamicSparse,
    Oracle,
    Predictor,
    costs,
    topk_mask,
)
from sparseloom.methods.costs import CostTable, expected

SHAPE = AttentionShape(1, 8, 8, 1024, 1024, 64, 512, is_causal=False)
PREDICTOR = Predictor.for_shape(layers=1, hidden_size=512, heads=8, head_dim=64).eval()
METHOD = DynamicSparse(sparsity=0.9, block_size=(8, 1), rotary=False, predictor=PREDICTOR)


def table(**changes: Any) -> CostTable:
    """One unit per dense pair and dimension, two per kept one in 8×1 vectors, eight alone."""
    settings: dict[str, Any] = {
        "cpu": "x", "tier": "portable", "threads": 1, "date": "2026-01-01", "command": "c",
        "versions": {}, "unit_seconds": 1e-9,
        "dense": {"float32": {"pairs": 1.0}},
        "attend": {"float32": {"1x1": {"pairs": 8.0}, "8x1": {"pairs": 2.0}}},
        "select": {"1x1": {"pairs": 6.4}, "8x1": {"pairs": 0.8}},
    }  # fmt: skip
    return CostTable(**{**settings, **changes})


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def choose(chosen: CostTable | None) -> None:
        monkeypatch.setattr(costs.prediction, "unsupported", lambda *_: None)
        monkeypatch.setattr(costs, "table_in_use", lambda: chosen)

    return choose


def inputs_of(length: int = 64, **changes: Any) -> AttentionInputs:
    tensors = [torch.randn(1, 8, length, 64) for _ in range(3)]
    settings: dict[str, Any] = {
        "query": tensors[0], "key": tensors[1], "value": tensors[2], "layer": 0,
        "is_causal": False, "scale": 0.125, "hidden_states": torch.randn(1, length, 512),
    }  # fmt: skip
    return AttentionInputs(**{**settings, **changes})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_size", [(1, 1), (8, 1), (5, 3)])
def test_work_counts_what_selection_keeps(block_size: tuple[int, int], is_causal: bool) -> None:
    method = dataclasses.replace(METHOD, block_size=block_size, sparsity=0.7, minimum_keys=4)
    shape = dataclasses.replace(SHAPE, q_len=42, kv_len=50, is_causal=is_causal)
    work = method.work(shape)
    assert work is not None
    mask = topk_mask(
        torch.randn(1, 1, 42, 50), sparsity=0.7, minimum_keys=4, block_size=block_size,
        is_causal=is_causal,
    )  # fmt: skip
    assert work.kept_blocks == mask.nnz
    assert (work.block_size, work.width, work.bits) == (block_size, 16, 4)


def test_expected_times_are_those_of_the_terms() -> None:
    work = METHOD.work(SHAPE)
    assert work is not None
    found = expected(table(), SHAPE, work, "float32")
    pairs = 8 * 1024 * 1024
    assert found.dense == pytest.approx(64e-9 * pairs)
    assert found.select == pytest.approx(6.4e-9 * pairs / 8)
    assert found.attend == pytest.approx(2e-9 * 64 * 128 * 103 * 8 * 8)  # ⌈1024 / 10⌉ = 103 keys
    assert found.ratio == pytest.approx((found.select + found.attend) / found.dense)
    assert found.ratio < 0.25


def test_every_term_has_a_name_and_a_meaning() -> None:
    work = METHOD.work(SHAPE)
    assert work is not None
    assert set(costs.dense_terms(SHAPE)) == {"call", "rows", "pairs"}
    double = dataclasses.replace(SHAPE, batch=2)
    twice = (costs.attend_terms(double, work), costs.select_terms(double, work))
    once = (costs.attend_terms(SHAPE, work), costs.select_terms(SHAPE, work))
    for two, one in zip(twice, once, strict=True):
        assert all(two[name] == (1 if name == "call" else 2) * one[name] for name in one)
    with pytest.raises(ValueError, match="dtype must be one of float32, got 'float64'"):
        expected(table(), SHAPE, work, "float64")


@pytest.mark.parametrize(
    ("block_size", "name"),
    [((1, 1), "1x1"), ((7, 9), "1x1"), ((8, 1), "8x1"), ((16, 1), "8x1"), ((64, 64), "64x64")],
)
def test_blocks_that_were_not_measured(block_size: tuple[int, int], name: str) -> None:
    assert costs.fitting(block_size, {"1x1": 0, "8x1": 0, "64x64": 0}) == name


def test_no_block_fits() -> None:
    with pytest.raises(ValueError, match=r"no block of 8x1 fits into \(1, 1\)"):
        costs.fitting((1, 1), {"8x1": 0})


@torch.no_grad()
def test_sparser_pays_and_denser_does_not(use: Any) -> None:
    use(table())
    inputs = inputs_of(640)
    verdicts = {
        sparsity: costs.pays(dataclasses.replace(METHOD, sparsity=sparsity), inputs)
        for sparsity in (0.2, 0.5, 0.7, 0.9)
    }
    # 2 (1 - sparsity) + 0.0125 <= 0.9
    assert verdicts == {0.2: False, 0.5: False, 0.7: True, 0.9: True}
    fine = dataclasses.replace(METHOD, block_size=(1, 1))
    assert costs.pays(dataclasses.replace(fine, sparsity=0.95), inputs)  # 8 · 0.05 + 0.1
    assert not costs.pays(dataclasses.replace(fine, sparsity=0.85), inputs)
    assert not costs.pays(METHOD, inputs_of(24))  # 16 keys are the least that a query keeps


@torch.no_grad()
def test_a_fixed_cost_makes_short_calls_dense(use: Any) -> None:
    use(table(select={"1x1": {"call": 64.0 * 8 * 256 * 256}}))
    assert not costs.pays(METHOD, inputs_of(256))
    assert costs.pays(METHOD, inputs_of(512))


def test_where_the_rule_has_no_say(use: Any) -> None:
    use(table(select={"1x1": {"call": 1e12}}))
    inputs = inputs_of()
    assert not costs.pays(METHOD, inputs)
    assert costs.pays(Oracle(sparsity=0.1), inputs)  # a gauge, not a saving
    untrained = dataclasses.replace(METHOD, predictor=None)
    assert costs.pays(untrained, inputs)  # selecting will say what is missing
    learning = dataclasses.replace(inputs, query=torch.randn(1, 8, 64, 64).requires_grad_())
    assert costs.pays(METHOD, learning)
    with torch.no_grad():
        assert not costs.pays(METHOD, learning)


@torch.no_grad()
def test_what_the_backend_cannot_do_runs_dense(use: Any) -> None:
    inputs = inputs_of(640)
    use(None)
    assert not costs.pays(METHOD, inputs)
    use(table())
    assert costs.pays(METHOD, inputs)
    few = {"query": inputs.query[:, :, :16], "hidden_states": torch.randn(1, 16, 512)}
    assert not costs.pays(METHOD, dataclasses.replace(inputs, **few))  # as in decoding
    double = {name: getattr(inputs, name).double() for name in ("query", "key", "value")}
    assert not costs.pays(METHOD, dataclasses.replace(inputs, **double))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # attention will run in bfloat16
        assert not costs.pays(METHOD, inputs)


@torch.no_grad()
def test_a_predictor_that_the_backend_does_not_take_runs_dense(
    use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(table())
    asked: list[tuple[int, int]] = []

    def refuse(bits: int, width: int, device: torch.device) -> str:
        asked.append((bits, width))
        return "not this one"

    monkeypatch.setattr(costs.prediction, "unsupported", refuse)
    assert not costs.pays(METHOD, inputs_of(640))
    assert asked == [(4, 16)]


def test_the_least_sparsity_that_pays(use: Any) -> None:
    use(table())
    # 2 (1 - sparsity) + 0.0125 <= 0.85 where every row keeps ⌈(1 - sparsity) · 1024⌉ keys
    assert costs.crossover(METHOD, SHAPE, "float32") == 0.59
    assert costs.crossover(METHOD, SHAPE, "bfloat16") is None
    use(table(select={"1x1": {"call": 1e12}}))
    assert costs.crossover(METHOD, SHAPE, "float32") is None


# ---------------------------------------------------------------------------- tables


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SPARSELOOM_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparseloom" / "calibration.json"


def test_tables_are_kept_and_replaced(home: Path) -> None:
    assert costs.save_table(table()) == home == costs.user_file()
    costs.save_table(table(threads=2))
    costs.save_table(table(date="2026-02-02"))
    data = json.loads(home.read_text("utf-8"))
    assert data["schema"] == "sparseloom/costs/1"
    assert [(one["threads"], one["date"]) for one in data["tables"]] == [
        (2, "2026-01-01"),
        (1, "2026-02-02"),
    ]
    assert [path.name for path in home.parent.iterdir()] == ["calibration.json"]


def test_the_place_can_be_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELOOM_CALIBRATION", str(home / "mine.json"))
    assert costs.user_file() == home / "mine.json"


@pytest.mark.parametrize("text", ["{", "[]", '{"tables": [{}]}', '{"schema": "x", "tables": []}'])
def test_a_broken_file_says_which_and_what_to_do(home: Path, text: str) -> None:
    home.parent.mkdir()
    home.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"calibration\.json holds no cost tables .*--calibrate"):
        costs.save_table(table())


def test_shipped_tables_have_their_blocks() -> None:
    for shipped in costs._shipped():
        assert sum(shipped.dense["float32"].values()) > 0
        assert "1x1" in shipped.select
        for dtype in shipped.dense:
            assert "1x1" in shipped.attend[dtype]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A processor "x" with an AVX-512 backend on two threads, and shipped tables of two tiers."""
    native = pytest.importorskip("sparseloom.kernels.cpu.native")

    def pretend(tier: str, reason: str | None = None) -> None:
        monkeypatch.setattr(costs, "available_backends", lambda: {"cpu": reason})
        monkeypatch.setattr(costs, "_cpu", lambda: "x")
        monkeypatch.setattr(native, "active_tier", lambda: tier)
        shipped = tuple(table(cpu="shipped", tier=name) for name in ("portable", "avx512"))
        monkeypatch.setattr(costs, "_shipped", lambda: shipped)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    return pretend


@pytest.mark.parametrize(
    ("tier", "chosen"),
    [("portable", "portable"), ("avx2", "portable"), ("avx512", "avx512"), ("amx", "avx512")],
)
def test_the_shipped_table_of_the_tier(home: Path, machine: Any, tier: str, chosen: str) -> None:
    machine(tier)
    found = costs.table_in_use()
    assert found is not None
    assert (found.cpu, found.tier) == ("shipped", chosen)


def test_own_tables_come_first(home: Path, machine: Any) -> None:
    machine("avx512")
    costs.save_table(table(tier="avx512", cpu="another"))
    costs.save_table(table(tier="amx"))
    assert costs.table_in_use().cpu == "shipped"  # type: ignore[union-attr]
    for threads in (1, 2, 16):
        costs.save_table(table(tier="avx512", threads=threads))
    found = costs.table_in_use()
    assert found is not None
    assert (found.cpu, found.threads) == ("x", 2)


def test_without_the_backend_there_is_no_table(machine: Any) -> None:
    machine("avx512", "not built")
    assert costs.table_in_use() is None


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_the_table_of_a_card_is_the_users_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSELOOM_CALIBRATION", str(tmp_path / "tables.json"))
    card = {"cpu": "NVIDIA H200", "tier": "sm_90"}
    for other in ({"cpu": "NVIDIA A100", "tier": "sm_80"}, {"cpu": "NVIDIA H200", "tier": "sm_80"}):
        costs.save_table(table(**other))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert costs.table_of_card() is None
    on_a_card(monkeypatch)
    assert costs.table_of_card() is None  # nothing is known of this one
    costs.save_table(table(**card))
    found = costs.table_of_card()
    assert found is not None
    assert (found.cpu, found.tier) == ("NVIDIA H200", "sm_90")


def test_the_rule_on_a_card(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import FakeTensorMode

    use(None)  # the CPU's table has no say
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 8, 512, 64, device="cuda") for _ in range(3))
        hidden = torch.empty(1, 512, 512, device="cuda")
        inputs = inputs_of(query=query, key=key, value=value, hidden_states=hidden)
    monkeypatch.setattr(costs, "table_of_card", lambda: None)
    assert costs.pays(METHOD, inputs)  # a card that was not measured: select
    monkeypatch.setattr(costs, "table_of_card", table)
    assert costs.pays(METHOD, inputs)
    assert not costs.pays(dataclasses.replace(METHOD, sparsity=0.1), inputs)
    only = {"attend": {"float32": {"64x1": {"pairs": 0.1}}}}
    monkeypatch.setattr(costs, "table_of_card", lambda: table(**only))
    assert not costs.pays(METHOD, inputs)  # 8x1 is smaller than all that was measured
    half = dataclasses.replace(inputs, query=query.bfloat16())
    assert not costs.pays(METHOD, half)
