"""Nothing is lost and nothing is done twice: counts of runs against counts of masks, in numpy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sparseloom import hardware
from sparseloom.hardware.spatten import SpAtten, counts, cycle
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.units import dram
from sparseloom.trace import AttentionCall, MaskArrays, Operator, Selection, Trace
from sparseloom.trace.index_models import Uniform
from sparseloom.trace.kept_keys import with_keys
from sparseloom.trace.traffic import selection_traffic

NAMES = ["counted", "grouped", "reruns", "padded", "edges", "cola"]
MACHINES = ["spatten_hpca_2021", "spatten_eighth_hpca_2021", "spatten_e2e_hpca_2021"]


def _machine(name: str, **settings: Any) -> SpAtten:
    found = hardware.load(name, **settings)
    assert isinstance(found, SpAtten)
    return found


def _named_keys(trace: Trace) -> Selection:
    selection = trace.selection()
    if all(call.knows_keys and call.value_counts is None for call in selection.calls):
        return selection
    return with_keys(trace, None, Uniform(), seed=0)


@dataclass
class Counted:
    """What the masks say."""

    scores: int = 0
    rerun_scores: int = 0
    values: int = 0
    reruns: int = 0
    score_lines: int = 0
    value_lines: int = 0
    key_vectors: int = 0
    low_vectors: int = 0
    value_vectors: int = 0
    atoms: int = 0


def _pairs(mask: MaskArrays | None, op: Operator, sequence: int) -> np.ndarray:
    """(heads, q_len, kv_len) kept by a mask, causality applied."""
    kept = np.ones((op.heads, op.q_len, op.kv_len), np.bool_)
    if mask is not None:
        own = mask.to_bool()[min(sequence, mask.batch - 1)]
        kept = own.repeat(op.heads // mask.heads, axis=0)
    if op.is_causal:
        last = np.arange(op.q_len)[:, None] + op.kv_len - op.q_len
        kept = kept & (np.arange(op.kv_len) <= last)
    return kept


def _count(trace: Trace, per_line: int) -> Counted:
    found = Counted()
    for op, call in zip(trace.workload.attention(), _named_keys(trace).calls, strict=True):
        padding = trace.workload.padding_of(op)
        for sequence in range(op.batch):
            valid = np.ones(op.kv_len, np.bool_) if padding is None else padding[sequence]
            if call.tokens_alive is not None:
                valid = valid & call.tokens_alive[sequence]
            _count_sequence(found, op, call, sequence, valid, per_line)
    return found


def _atoms(bits: int | None, heads: int = 1) -> int:
    return -(-64 * (32 if bits is None else bits) * heads // 256)


def _count_sequence(
    found: Counted,
    op: Operator,
    call: AttentionCall,
    sequence: int,
    valid: np.ndarray,
    per_line: int,
) -> None:
    alive = np.ones(op.heads, np.bool_) if call.heads_alive is None else call.heads_alive
    kept = _pairs(call.mask, op, sequence) & valid
    if op.q_len == op.kv_len and op.q_len > 1:
        kept = kept[:, valid]
    used = _pairs(call.value_mask or call.mask, op, sequence) & valid
    group = op.heads // op.kv_heads
    alone: list[tuple[int, np.ndarray]] = []
    for kv in range(op.kv_heads):
        heads = [h for h in range(kv * group, (kv + 1) * group) if alive[h]]
        if not heads:
            continue
        union: np.ndarray = np.logical_or.reduce(kept[heads], axis=(0, 1))
        n = int(union.sum())
        if op.q_len > 1:
            seen = np.full(kept.shape[1], n)
            if op.is_causal:
                queries = np.flatnonzero(valid) if op.q_len == op.kv_len else np.arange(op.q_len)
                seen = np.array([union[: op.kv_len - op.q_len + q + 1].sum() for q in queries])
            found.scores += len(heads) * int(seen.sum())
            found.values += len(heads) * int(seen.sum())
            lines = len(heads) * int((-(-seen // per_line)).sum())
            found.score_lines += lines
            found.value_lines += lines
            found.key_vectors += n
            found.value_vectors += n
            found.atoms += n * (_atoms(call.key_bits) + _atoms(call.value_bits))
            continue
        found.key_vectors += n
        alone.append((kv, union))
        for h in heads:
            again = call.lsb_refetch is not None and bool(call.lsb_refetch[sequence, h, 0])
            k = int(used[h, 0].sum())
            found.scores += n * (1 + again)
            found.rerun_scores += n * again
            found.reruns += again
            found.low_vectors += n * again
            found.values += k
            found.value_vectors += k
            found.score_lines += -(-n // per_line) * (1 + again)
            found.value_lines += -(-k // per_line)
            found.atoms += n * again * _atoms(call.lsb_bits) + k * _atoms(call.value_bits)
    # Two neighbours of 6 bits with the same keys lie in one vector and are read at once.
    paired: set[int] = set()
    if call.key_bits == 6 and group == 1:
        for (one, keys), (two, others) in pairwise(alone):
            if one % 2 == 0 and two == one + 1 and (keys == others).all():
                paired |= {one, two}
                found.atoms += int(keys.sum()) * _atoms(6, heads=2)
    for kv, keys in alone:
        found.atoms += 0 if kv in paired else int(keys.sum()) * _atoms(call.key_bits)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_masks(name: str, machine: str, traces: dict[str, Trace]) -> None:
    trace, m = traces[name], _machine(machine)
    run = cycle.run(m.settings, m.memory, m.jobs(trace, trace.selection()), seed=5)
    wanted = _count(trace, m.settings.keys_per_cycle(64))
    c = run.state.counts
    found = Counted(
        scores=int(c[st.C_SCORES]),
        rerun_scores=int(c[st.C_RERUN_SCORES]),
        values=int(c[st.C_VALUES]),
        reruns=int(c[st.C_RERUNS]),
        score_lines=int(c[st.C_SCORE_LINES]),
        value_lines=int(c[st.C_VALUE_LINES]),
        key_vectors=int(c[st.C_KEY_VECTORS]),
        low_vectors=int(c[st.C_LOW_VECTORS]),
        value_vectors=int(c[st.C_VALUE_VECTORS]),
        atoms=int(c[st.C_ATOMS]),
    )
    assert found == wanted
    assert c[st.C_SOFTMAX] == wanted.scores
    assert c[st.C_EMITTED] == wanted.values
    # What was asked for came back, and whatever was held was given up.
    assert run.memory.counters[dram.READS] == wanted.atoms
    assert run.memory.counters[dram.WRITES] == 0
    assert dram.in_flight(run.memory) == 0
    for register in (st.R_IN_FLIGHT, st.R_ADDRESSES, st.R_BEATS, st.R_LINES, st.R_LOW_PENDING):
        assert run.state.registers[register] == 0
    for register in (st.R_KEY_LINES, st.R_VALUE_LINES, st.R_DECIDE_USED):
        assert run.state.registers[register] == 0
    # Every cycle of every unit is idle, busy, or waits for one cause; what is done takes its time.
    assert (run.log.totals.sum(axis=1) == run.cycles).all()
    rows = len(run.state.rows)
    for unit, busy in (
        (st.SCORES, wanted.score_lines),
        (st.SOFTMAX, wanted.score_lines),
        (st.DECISION, rows + wanted.reruns),
        (st.VALUES, wanted.value_lines),
        (st.HEAD_SCORE, rows),
    ):
        assert run.log.totals[unit, st.BUSY] == busy, st.UNITS[unit]


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_counts_the_same(name: str, traces: dict[str, Trace]) -> None:
    trace, m = traces[name], _machine("spatten_hpca_2021")
    jobs = m.jobs(trace, trace.selection())
    done, expected = counts.counted(cycle.run(m.settings, m.memory, jobs)), counts.expected(jobs)
    averages = {"topk_items", "rank_items", "activates"}
    for field in fields(done):
        if field.name not in averages:
            assert getattr(done, field.name) == getattr(expected, field.name), field.name


@pytest.mark.parametrize("name", ["counted", "reruns", "edges"])
def test_bytes_are_those_of_the_trace(name: str, traces: dict[str, Trace]) -> None:
    """`trace.traffic` counts what the machine fetches where each query head has keys of its own.

    It packs values too, which 6-bit heads with values of their own do not gain from.
    """
    trace, m = traces[name], _machine("spatten_hpca_2021")
    traffic = selection_traffic(trace.workload, _named_keys(trace))
    report = m.simulate(trace, fidelity="cycle")
    assert report.dram_bytes == traffic.fetched
    assert report.useful_bytes == traffic.useful


@pytest.mark.parametrize("order", ["hold", "overtake"])
def test_reruns_in_either_order_do_the_same_work(order: str, traces: dict[str, Trace]) -> None:
    trace = traces["reruns"]
    m = _machine("spatten_hpca_2021", **{"progressive.order": order})
    run = cycle.run(m.settings, m.memory, m.jobs(trace, trace.selection()))
    wanted = _count(trace, 8)
    flags = sum(int(np.sum(np.asarray(call.lsb_refetch))) for call in trace.selection().calls)
    assert run.state.counts[st.C_RERUNS] == flags == wanted.reruns > 0
    assert run.state.counts[st.C_RERUN_SCORES] == wanted.rerun_scores
    assert run.state.counts[st.C_SCORES] == wanted.scores


def test_overtaking_waits_less(traces: dict[str, Trace]) -> None:
    trace = traces["reruns"]
    waits: dict[str, int] = {}
    for order in ("hold", "overtake"):
        m = _machine("spatten_hpca_2021", **{"progressive.order": order})
        run = cycle.run(m.settings, m.memory, m.jobs(trace, trace.selection()))
        waits[order] = int(run.log.totals[st.SCORES, st.ON_LOW_BITS])
    assert waits["overtake"] < waits["hold"]


def test_the_report_tells_issued_products_from_useful_ones(traces: dict[str, Trace]) -> None:
    trace, m = traces["edges"], _machine("spatten_hpca_2021")
    report, wanted = m.simulate(trace, fidelity="cycle"), _count(trace, 8)
    multiplies = {name: n for name, n in report.actions.items() if " multiply " in name}
    assert report.operations == 2 * 64 * (wanted.scores + wanted.values)
    assert report.utilisation["scores"] == pytest.approx(wanted.score_lines / report.cycles)
    useful = wanted.scores / 8 / report.cycles
    assert report.utilisation["scores_useful"] == pytest.approx(useful)
    assert multiplies
