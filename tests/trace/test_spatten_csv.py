"""The SpAtten authors' CSV files: a handwritten one, damaged ones, and the real ones."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from sparseloom.trace import Trace, TraceError
from sparseloom.trace.spatten_benchmarks import benchmark

HEADER = (
    "iteration_id,layer_id,head_id,embedding_length_D,sentence_length_L,key_fetch_num,"
    "quant_key_bit,quant_query_bit,auto_requant_thres,if_requant,auto_requant_incre,"
    "value_fetch_num,quant_value_bit,if_accumulate_importance,if_rescale_previous_importance,"
    "if_topk,topk"
)
ROWS = [
    "0,0,0,64.0,10,10,6,16,0.05,True,4,2,6,True,False,False,-1",
    "0,0,1,64.0,10,10,6,16,0.05,False,4,2,6,True,False,True,7",
    # Layer 1 has lost head 0.
    "0,1,1,64.0,10,7,6,16,0.05,False,4,1,6,True,True,False,-1",
    "1,0,0,64.0,11,11,-1,-1,-1,False,-1,11,-1,False,False,False,-1",
    "1,0,1,64.0,11,11,-1,-1,-1,False,-1,11,-1,False,False,False,-1",
    "1,1,1,64.0,11,11,-1,-1,-1,False,-1,11,-1,False,False,False,-1",
]
CONFIG = "configs/gpt2/example.yml" + "," * 16


def write(path: Path, *lines: str, zipped: bool = False) -> Path:
    data = "\n".join(lines).encode() + b"\n"
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_a_small_file_by_hand(tmp_path: Path, zipped: bool) -> None:
    file = write(tmp_path / "tiny.csv", HEADER, *ROWS, CONFIG, zipped=zipped)
    trace = Trace.from_spatten_csv(file)
    workload, selection = trace.workload, trace.selection()
    assert (workload.name, workload.scope) == ("tiny", "attention")
    assert workload.source == selection.method["config"] == "configs/gpt2/example.yml"
    assert (workload.model.layers, workload.model.heads, workload.model.hidden_size) == (2, 2, 128)
    places = [(op.step, op.layer, op.kv_len, op.stage) for op in workload.operators]
    assert places == [(s, layer, 10 + s, "decode") for s in (0, 1) for layer in (0, 1)]
    first, second, dense, _ = selection.calls
    assert first.key_counts is not None
    assert first.value_counts is not None
    assert first.lsb_refetch is not None
    assert first.key_counts.tolist() == [[[10], [10]]]
    assert first.value_counts.tolist() == [[[2], [2]]]
    assert first.lsb_refetch.tolist() == [[[True], [False]]]
    assert (first.key_bits, first.lsb_bits, first.value_bits, first.query_bits) == (6, 4, 6, 16)
    assert (first.lsb_threshold, first.token_keep, first.heads_alive) == (0.05, 7, None)
    assert (first.accumulates_importance, first.rescales_importance) == (True, False)
    assert second.heads_alive is not None
    assert second.heads_alive.tolist() == [False, True]
    assert (second.token_keep, second.rescales_importance) == (None, True)
    assert (dense.key_bits, dense.lsb_threshold, dense.accumulates_importance) == (
        None,
        None,
        False,
    )
    assert [pairs.tolist() for pairs in trace.kept_pairs()] == [
        [[10, 10]],
        [[0, 7]],
        [[11, 11]],
        [[0, 11]],
    ]
    trace.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace") == trace


def test_the_last_line_may_be_data(tmp_path: Path) -> None:
    trace = Trace.from_spatten_csv(write(tmp_path / "a.csv", HEADER, *ROWS), name="mine", heads=4)
    assert trace.workload.source == "a.csv"
    assert list(trace.selections) == ["mine"]
    assert trace.workload.operators[0].heads == 4
    assert trace.kept_pairs()[0].tolist() == [[10, 10, 0, 0]]


def changed(row: str, column: str, value: str) -> str:
    cells = row.split(",")
    names: list[str] = HEADER.split(",")
    cells[names.index(column)] = value
    return ",".join(cells)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the header lacks iteration_id"),
        ([HEADER.replace("key_fetch_num", "key_value_query_fetch_num"), ROWS[0]], "key_fetch_num"),
        ([HEADER], "no rows after the header"),
        ([HEADER, CONFIG], "no rows after the header"),
        ([HEADER, ROWS[0], ROWS[1] + ",9"], "line 3: 17 columns expected, got 18"),
        ([HEADER, changed(ROWS[0], "head_id", "x")], "line 2: head_id must be a whole number"),
        ([HEADER, changed(ROWS[0], "head_id", "nan")], "line 2: head_id must be a whole number"),
        ([HEADER, changed(ROWS[0], "head_id", "inf")], "line 2: head_id must be a whole number"),
        ([HEADER, changed(ROWS[0], "if_topk", "1")], "line 2: if_topk must be True or False"),
        ([HEADER, changed(ROWS[0], "topk", "1.5")], "topk must be a whole number, got '1.5'"),
        ([HEADER, ROWS[0], ROWS[0]], "step 0, layer 0: head_id must be unique"),
        ([HEADER, ROWS[0], ROWS[2], ROWS[1]], "must stand together"),
        (
            [HEADER, ROWS[0], changed(ROWS[1], "sentence_length_L", "9")],
            "sentence_length_L differs between heads",
        ),
        ([HEADER, changed(ROWS[0], "key_fetch_num", "11")], r"key_counts must be in \[0, 10\]"),
        ([HEADER, changed(ROWS[0], "sentence_length_L", "0")], "sizes must be positive"),
        ([HEADER, changed(ROWS[0], "iteration_id", "-1")], "sizes must be positive"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    file = write(tmp_path / "bad.csv", *lines)
    with pytest.raises(TraceError, match=message) as caught:
        Trace.from_spatten_csv(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        Trace.from_spatten_csv(tmp_path / "nothing.csv")
    file = write(tmp_path / "cut.csv.gz", HEADER, *ROWS, zipped=True)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(TraceError, match="cannot be read"):
        Trace.from_spatten_csv(file)
    with pytest.raises(TraceError, match="heads must be at least 2, got 1"):
        Trace.from_spatten_csv(write(tmp_path / "a.csv", HEADER, *ROWS), heads=1)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_was_read_is_written_as_it_was(tmp_path: Path, zipped: bool) -> None:
    file = write(tmp_path / "tiny.csv", HEADER, *ROWS, CONFIG)
    again = tmp_path / ("again.csv.gz" if zipped else "again.csv")
    Trace.from_spatten_csv(file).to_spatten_csv(again)
    data = again.read_bytes()
    assert (gzip.decompress(data) if zipped else data) == file.read_bytes()
    bare = write(tmp_path / "bare.csv", HEADER, *ROWS)
    Trace.from_spatten_csv(bare).to_spatten_csv(again)
    data = again.read_bytes()
    assert (gzip.decompress(data) if zipped else data) == bare.read_bytes()


def test_a_prompt_is_no_generation(tmp_path: Path) -> None:
    trace = benchmark("bert-base-cola").trace()
    with pytest.raises(TraceError, match="bert-base-cola has no generation steps"):
        trace.to_spatten_csv(tmp_path / "a.csv", "spatten")
    small = benchmark("gpt2-small-ptb").trace(prompt=True)
    small.to_spatten_csv(tmp_path / "b.csv.gz", "spatten")
    read = Trace.from_spatten_csv(tmp_path / "b.csv.gz")
    assert [op.step for op in read.workload.operators[:13]] == [0] * 12 + [1]
    assert read.workload.operators[0].kv_len == 993


def published(name: str) -> Path:
    file = Path(os.environ.get("SPARSELOOM_DATA", "")) / "spatten_traces" / name
    if not file.is_file():
        pytest.skip(f"{file} is not in SPARSELOOM_DATA: the traces are not part of the project")
    return file


def test_the_pruned_gpt2_small_trace() -> None:
    trace = Trace.from_spatten_csv(published("summary-gpt2-small-wikitext2-per8.csv.gz"))
    workload, calls = trace.workload, trace.selection().calls
    assert (workload.model.layers, workload.model.heads, len(calls)) == (12, 12, 32 * 12)
    assert trace.density() == pytest.approx(0.276, abs=5e-4)
    length = sum(op.kv_len * op.heads for op in workload.operators)
    values = sum(call.value_counts.sum() for call in calls if call.value_counts is not None)
    assert values / length == pytest.approx(0.055, abs=5e-4)
    refetched = sum(call.lsb_refetch.sum() for call in calls if call.lsb_refetch is not None)
    assert refetched == 323
    assert {(call.key_bits, call.lsb_bits, call.value_bits) for call in calls} == {(6, 4, 6)}
    keep = [int(np.max(call.key_counts)) for call in calls[12:24] if call.key_counts is not None]
    assert keep == [921, 716] + [204] * 4 + [102] * 6


@pytest.mark.parametrize(
    "name",
    [
        "small.csv.gz",
        "summary-gpt2-small-wikitext2-per8.csv.gz",
        "summary-gpt2-small-wikitext2-per8-step1+dedic.csv.gz",
    ],
)
def test_the_published_traces_are_written_byte_by_byte(tmp_path: Path, name: str) -> None:
    file = published(name)
    Trace.from_spatten_csv(file).to_spatten_csv(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == gzip.decompress(file.read_bytes())


@pytest.mark.parametrize(
    ("name", "calls"),
    [("small.csv.gz", 1), ("summary-gpt2-small-wikitext2-per8-step1+dedic.csv.gz", 32 * 12)],
)
def test_the_dense_traces(name: str, calls: int) -> None:
    trace = Trace.from_spatten_csv(published(name))
    assert len(trace.workload.operators) == calls
    assert trace.density() == 1.0
    assert trace.workload.source.endswith(".yml")
