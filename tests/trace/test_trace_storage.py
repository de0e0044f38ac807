"""What is saved comes back; what is damaged is named in one line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseloom.trace import (
    AttentionCall,
    MaskArrays,
    ModelShape,
    Operator,
    PredictorShape,
    Selection,
    Trace,
    TraceError,
    Workload,
    transformer_operators,
)

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\", min_codepoint=32), min_size=1
)


# Everything random comes from a drawn seed: beartype uses `random` where the package is called,
# and hypothesis forbids that inside strategies.
def random_call(rng: np.random.Generator, op: Operator) -> AttentionCall:
    def maybe(value: object) -> Any:
        return value if rng.random() < 0.5 else None

    def some_mask() -> MaskArrays:
        heads = rng.choice([1, op.kv_heads, op.heads])
        keep = rng.random((rng.choice([1, op.batch]), heads, op.q_len, op.kv_len)) < 0.4
        return MaskArrays.from_bool(keep, is_causal=op.is_causal)

    queries = (op.batch, op.heads, op.q_len)
    mask = maybe(some_mask())
    counts = maybe(rng.integers(0, op.kv_len + 1, queries)) if mask is None else None
    return AttentionCall(
        mask=mask,
        value_mask=maybe(some_mask()),
        key_counts=counts,
        predictor=maybe(PredictorShape(head_dim=int(rng.integers(1, 65)), bits=4)),
        key_bits=maybe(int(rng.integers(1, 17))),
        lsb_bits=maybe(4),
        lsb_threshold=maybe(float(rng.random())),
        lsb_refetch=maybe(rng.random(queries) < 0.5),
        tokens_alive=maybe(rng.random((op.batch, op.kv_len)) < 0.5),
        heads_alive=maybe(rng.random(op.heads) < 0.5),
        token_keep=maybe(int(rng.integers(0, 9))),
        accumulates_importance=bool(rng.random() < 0.5),
    )


def random_trace(seed: int, names: list[str], words: str, value: float) -> Trace:
    rng = np.random.default_rng(seed)
    layers, kv_heads, group, batch, length = (int(n) for n in rng.integers(1, (3, 3, 3, 3, 7)))
    shape = ModelShape(
        layers=layers,
        hidden_size=int(rng.integers(1, 99)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=int(rng.integers(1, 9)),
        intermediate_size=int(rng.integers(0, 9)),
        is_causal=bool(rng.random() < 0.5),
        family=words,
    )
    paddings = (rng.random((batch, length)) < 0.8,) if rng.random() < 0.5 else ()
    operators = transformer_operators(
        shape, q_len=length, batch=batch, padding=0 if paddings else None
    )
    workload = Workload(shape, operators, name=words, paddings=paddings)
    selections = {
        name: Selection(
            name,
            tuple(random_call(rng, op) for op in workload.attention()),
            {"method": "x", "block_size": [1, 8]},
            {"value": value, "metric": words},
        )
        for name in names
    }
    query = rng.standard_normal((batch, 2, 3)).astype(np.float16)
    return Trace(workload, selections, {"calls.0.query": query} if rng.random() < 0.5 else {})


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    names=st.lists(NAMES, max_size=2, unique=True),
    words=st.text(max_size=6),
    value=st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_is_saved_comes_back(
    seed: int,
    names: list[str],
    words: str,
    value: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    trace = random_trace(seed, names, words, value)
    path = tmp_path_factory.mktemp("round") / "trace"
    trace.save(path)
    assert Trace.load(path) == trace
    assert sorted(p.name for p in path.parent.iterdir()) == ["trace"]


def test_names_longer_than_a_file_may_have_are_told_apart(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    names = ["𐀀" * 30 + "a", "𐀀" * 30 + "b", "x" * 400]
    trace = random_trace(0, names, "", 0.0)
    path = tmp_path_factory.mktemp("long") / "trace"
    trace.save(path)
    assert Trace.load(path) == trace


def example() -> Trace:
    shape = ModelShape(layers=2, hidden_size=8, heads=2, kv_heads=2, head_dim=4, is_causal=True)
    operators = transformer_operators(shape, q_len=6, padding=0)
    keep = np.tril(np.ones((1, 2, 6, 6), np.bool_))
    call = AttentionCall(
        mask=MaskArrays.from_bool(keep, is_causal=True),
        predictor=PredictorShape(head_dim=2, bits=4),
        heads_alive=np.ones(2, np.bool_),
    )
    selection = Selection("oracle:sparsity=0.9", (call, call), {"method": "oracle"}, {"value": 1.5})
    workload = Workload(shape, operators, paddings=(np.ones((1, 6), np.bool_),))
    return Trace(workload, {selection.name: selection}, {"calls.0.query": np.zeros((1, 2, 6, 4))})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    example().save(tmp_path / "trace")
    return tmp_path / "trace"


def parquet(folder: Path) -> Path:
    return next((folder / "selections").glob("*.parquet"))


def arrays(folder: Path) -> Path:
    return next((folder / "selections").glob("*.safetensors"))


def test_the_folder_is_the_documented_one(saved: Path) -> None:
    files = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    assert files == [
        "operators.parquet",
        "selections/oracle%3Asparsity=0.9.parquet",
        "selections/oracle%3Asparsity=0.9.safetensors",
        "tensors.safetensors",
        "trace.json",
    ]
    assert json.loads((saved / "trace.json").read_text())["schema"] == "sparseloom/trace/1"


def test_a_trace_is_not_overwritten_unasked(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        example().save(saved)
    smaller = Trace(example().workload)
    smaller.save(saved, overwrite=True)
    assert Trace.load(saved) == smaller
    assert [p.name for p in saved.parent.iterdir()] == ["trace"]


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not a trace"):
        example().save(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize("quality", [{"value": float("nan")}, {"value": object()}])
def test_a_failed_save_leaves_nothing(tmp_path: Path, quality: dict[str, object]) -> None:
    trace = example()
    bad = Selection("bad", trace.selection().calls, {}, quality)
    with pytest.raises(TraceError, match="is not JSON"):
        Trace(trace.workload, {"bad": bad}).save(tmp_path / "trace")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_trace(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError("disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk is gone"):
        Trace(example().workload).save(saved, overwrite=True)
    assert Trace.load(saved) == example()
    assert [p.name for p in saved.parent.iterdir()] == ["trace"]


def test_folders_named_like_partitions_add_no_columns(tmp_path: Path) -> None:
    example().save(tmp_path / "seed=3" / "layer=x" / "trace")
    assert Trace.load(tmp_path / "seed=3" / "layer=x" / "trace") == example()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit_json(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps(data | changes))


def drop_column(file: Path) -> None:
    table = pq.ParquetFile(file).read()
    pq.write_table(table.drop_columns([table.column_names[-1]]), file)


def drop_row(file: Path) -> None:
    table = pq.ParquetFile(file).read()
    pq.write_table(table.slice(0, table.num_rows - 1), file)


def swap_arrays(folder: Path, **changes: np.ndarray | None) -> None:
    from safetensors.numpy import load_file, save_file

    stored = load_file(arrays(folder)) | {
        name.replace("__", "."): array for name, array in changes.items()
    }
    save_file({k: v for k, v in stored.items() if v is not None}, arrays(folder))


INDICES = "calls__0__mask__indices"
DAMAGE = {
    "no header": (lambda p: (p / "trace.json").unlink(), "trace.json is missing"),
    "not JSON": (lambda p: (p / "trace.json").write_text("{"), "trace.json: cannot be read"),
    "not an object": (lambda p: (p / "trace.json").write_text("[]"), "schema None is not"),
    "newer": (lambda p: edit_json(p, schema="sparseloom/trace/9"), "'sparseloom/trace/9' is not"),
    "unknown key": (lambda p: edit_json(p, colour="red"), "trace.json: colour"),
    "bad model": (lambda p: edit_json(p, model={"layers": "two"}), "trace.json: model.layers"),
    "no operators": (lambda p: (p / "operators.parquet").unlink(), "operators.parquet is missing"),
    "cut operators": (lambda p: truncate(p / "operators.parquet"), "operators.parquet: cannot be"),
    "lost column": (lambda p: drop_column(p / "operators.parquet"), "mistyped columns: padding"),
    "lost operator": (lambda p: drop_row(p / "operators.parquet"), None),
    "cut calls": (lambda p: truncate(parquet(p)), r"0.9.parquet: cannot be read"),
    "lost call": (lambda p: drop_row(parquet(p)), "belongs to no call"),
    "cut arrays": (lambda p: truncate(arrays(p)), r"0.9.safetensors: cannot be read"),
    "no arrays": (lambda p: arrays(p).unlink(), r"0.9.safetensors is missing"),
    "lost padding": (lambda p: (p / "tensors.safetensors").unlink(), "points at padding 0 of 0"),
    "lost indices": (lambda p: swap_arrays(p, **{INDICES: None}), "call 0: mask lacks indices"),
    "wrong type": (
        lambda p: swap_arrays(p, **{INDICES: np.zeros(42, np.int64)}),
        "must be int32 with 1 axes, got int64",
    ),
    "wrong index": (
        lambda p: swap_arrays(p, **{INDICES: np.full(42, 9, np.int32)}),
        r"call 0: indices must be in \[0, 6\), got 9",
    ),
    "wrong heads": (
        lambda p: swap_arrays(p, calls__1__heads_alive=np.ones(5, np.bool_)),
        r"call 1: heads_alive must be \(2,\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(saved: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(saved)
    if message is None:  # an operator that no selection depends on may go
        assert len(Trace.load(saved).workload.operators) == len(example().workload.operators) - 1
        return
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_damage_never_escapes_as_another_error(saved: Path, data: st.DataObject) -> None:
    trace = example()
    files = sorted(p for p in saved.rglob("*") if p.is_file())
    file = data.draw(st.sampled_from(files))
    raw = file.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    file.write_bytes(raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :])
    try:
        with suppress(TraceError):
            loaded = Trace.load(saved)
            assert len(loaded.workload.attention()) == len(trace.workload.attention())
    finally:
        file.write_bytes(raw)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_not_a_folder_is_no_trace(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TraceError, match=r"a trace is a folder with trace\.json"):
        Trace.load(tmp_path / name)
