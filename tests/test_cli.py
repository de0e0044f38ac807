"""The command line: what it prints, what it leaves on disk, and how it says no."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom import errors
from sparseloom.cli import boundary
from sparseloom.cli.app import app
from sparseloom.kernels.cpu import native
from sparseloom.results import read_results, results, validate_results

Run = Callable[..., tuple[int, str, str]]
COMMANDS = [
    "demo",
    "compare",
    "explain",
    "entropy",
    "adapt",
    "search",
    "bench",
    "trace",
    "simulate",
    "reproduce",
    "info",
]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELOOM_DATA", raising=False)
    monkeypatch.delenv("SPARSELOOM_DEBUG", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        code = boundary.run([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a very small byte-level language model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trace(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of that model with two selections."""
    folder = tmp_path_factory.mktemp("traces") / "one"
    words = ["trace", "--model", model, "--out", folder, "--length", 64]
    words += ["--method", "oracle:sparsity=0.5,minimum_keys=2", "--method", "window:width=8"]
    assert boundary.run([str(word) for word in words]) == 0
    return folder


def rows_of(text: str) -> list[dict[str, Any]]:
    """The rows of `--json` output, which must be a valid results file and nothing else."""
    found = json.loads(text)
    validate_results(found)
    return found["rows"]


# ---------------------------------------------------------------------------- it works


def test_help_lists_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_offers_json(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert code == 0, err
    assert "--json" in out


def test_help_wraps_at_the_terminal_and_not_where_the_source_does(run: Run) -> None:
    texts = [str(command.help) for command in app.registered_commands]
    assert all(texts)
    assert not [text for text in texts if "\n" in text.replace("\n\n", "")]
    assert "thresholds off training text instead. For" in " ".join(
        run("adapt", "--help")[1].split()
    )


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, "sparseloom 0.1.0\n")


def test_info_names_backends_and_reasons(run: Run) -> None:
    code, out, _ = run("info", "--json")
    rows = rows_of(out)
    assert code == 0
    backends = {row["name"]: row for row in rows if row["record"] == "backend"}
    assert backends["reference"]["usable"] is True
    assert all(row["usable"] or row["note"] for row in backends.values())
    kinds = {row["record"] for row in rows}
    assert kinds == {"library", "backend", "method", "task", "model", "machine"}
    code, out, _ = run("info")
    assert code == 0
    assert "torch" in out
    assert "dota_asplos_2022" in out


def test_info_says_how_the_library_was_built_and_which_tier_runs(run: Run) -> None:
    if native.missing_reason() is not None:
        pytest.skip("the library is missing")
    with native.use_tier("portable"):
        row = rows_of(run("info", "--json")[1])[0]
        text = run("info")[1]
    assert row["record"] == "library"
    assert row["usable"] is True
    assert row["tier"] == "portable"
    assert tuple(row["tiers"]) == native.available_tiers()
    assert row["threads"] >= 1
    assert row["compiler"].split()[0] in ("GCC", "Clang")
    assert Path(row["path"]).is_file()
    assert f"portable (of {', '.join(row['tiers'])})" in text
    assert f"built with {row['compiler']}" in text


def test_info_says_why_the_library_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: "there was no compiler")
    row = rows_of(run("info", "--json")[1])[0]
    assert (row["usable"], row["note"]) == (False, "there was no compiler")
    assert "missing: there was no compiler\n" in run("info")[1]


def test_compare_rows_are_valid_and_complete(run: Run, model: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "compare", "--model", model, "--limit", 2, "--json", "--out", "mine.json",
        "--method", "oracle:sparsity=0.5,minimum_keys=2", "--method", "window:sparsity=0.5",
        "--machine", "dota_asplos_2022",
    )  # fmt: skip
    rows = rows_of(out)
    assert code == 0
    assert [row["method"] for row in rows] == ["dense", "oracle", "window"]
    for row in rows:
        assert row["metric"] == "bits_per_byte"
        assert row["dense_value"] == rows[0]["value"]
        assert row["cycles"]["dota_asplos_2022"] > 0
        assert row["model_ms"] > 0
    assert rows[0]["density"] == 1
    assert 0.45 < rows[1]["density"] < 0.6
    assert json.loads((tmp_path / "mine.json").read_text("utf-8"))["rows"] == rows


def test_compare_prints_a_table(run: Run, model: Path) -> None:
    code, out, _ = run("compare", "--model", model, "--limit", 1, "--no-diagnose")
    assert code == 0
    assert "bits per byte" in out
    assert "oracle" in out


def test_trace_then_simulate(run: Run, trace: Path) -> None:
    code, out, _ = run("simulate", "dota_asplos_2022", trace, "--json")
    rows = rows_of(out)
    assert code == 0
    assert [row["selection"] for row in rows] == [
        "dense",
        "oracle:sparsity=0.5,minimum_keys=2",
        "window:width=8",
    ]
    cycles = [row["cycles"] for row in rows]
    assert cycles[0] > cycles[2] > 0


def test_scores_in_a_trace_make_machines_comparable(run: Run, model: Path) -> None:
    words: list[object] = ["trace", "--model", model, "--out", "t", "--length", 48, "--score", 1]
    words += ["--method", "oracle:sparsity=0.5,minimum_keys=2", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    (row,) = rows_of(out)
    assert row["metric"] == "bits_per_byte"
    assert row["value"] != row["dense_value"] > 0
    code, out, _ = run("simulate", "all", "t", "--json")
    assert code == 0
    rows = rows_of(out)
    assert rows[0]["value"] == rows[0]["dense_value"] == row["dense_value"]
    ours = [one for one in rows if one["computes"] == row["selection"]]
    assert {one["value"] for one in ours} == {row["value"]}
    sized = [one["comparison"] for one in ours if one["configuration"] == "one size"]
    assert sized
    assert all(said.startswith("no comparison: bits_per_byte") for said in sized)
    code, out, _ = run("simulate", "all", "t", "--within", 8, "--json")
    ours = [one for one in rows_of(out) if one["computes"] == row["selection"]]
    assert "" in {one["comparison"] for one in ours}


def test_generation_recorded_written_and_simulated(run: Run, model: Path, tmp_path: Path) -> None:
    words: list[object] = [
        "trace",
        "--model",
        model,
        "--out",
        "t",
        "--length",
        24,
        "--json",
        "--new-tokens",
        2,
    ]
    words += ["--method", "spatten:token_keep=0.7,head_keep=none", "--csv", "run.csv.gz"]
    code, out, _ = run(*words)
    assert code == 0
    (row,) = rows_of(out)
    assert 0.5 < row["density"] < 1  # of a prompt that is read whole, and two steps
    assert row["values_read"] == row["keys_kept"] == pytest.approx(row["tokens_alive"])
    assert 0.5 < row["tokens_alive"] < 0.8
    assert (row["heads_alive"], row["low_rows"]) == (1, 0)
    code, out, _ = run("simulate", "spatten_hpca_2021", "run.csv.gz", "t", "--json")
    assert code == 0
    assert all(one["cycles"] > 0 for one in rows_of(out))
    code, _, error = run(*words)
    assert code == 2
    assert "--overwrite" in error
    code, _, error = run(*words[:-2], "--overwrite", "--method", "dense", "--csv", "b.csv")
    assert (code, "got 2 and 2" in error) == (2, True)


def test_simulate_settings_and_timeline(run: Run, trace: Path, tmp_path: Path) -> None:
    words = ["simulate", "dota_asplos_2022", trace, "--selection", "dense", "--json"]
    _, out, _ = run(*words)
    code, slow, _ = run(*words, "--set", "clock_ghz=0.5", "--timeline", "lines/dense.json")
    assert code == 0
    fast_row, slow_row = rows_of(out)[0], rows_of(slow)[0]
    assert slow_row["seconds"] > fast_row["seconds"]
    assert slow_row["config_hash"] != fast_row["config_hash"]
    events = json.loads((tmp_path / "lines" / "dense.json").read_text("utf-8"))["traceEvents"]
    assert len(events) > 2


def test_simulate_prints_a_table(run: Run, trace: Path) -> None:
    code, out, _ = run("simulate", "dota_asplos_2022", trace)
    assert code == 0
    assert "× fewer" in out
    assert "closed form" in out


SMALL_BENCH = ("bench", "--q-len", 64, "--heads", 2, "--head-dim", 16, "--repeats", 1)


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseloom.experiments import bench
    from sparseloom.kernels.cpu.peaks import Peaks

    found = Peaks("registers", "avx2", 1, 10.0, None, 40.0, 5.0, 50.0)
    monkeypatch.setattr(bench, "measure_peaks", lambda: found)


def test_bench_rows(run: Run, quick_peaks: None) -> None:
    code, out, _ = run(
        *SMALL_BENCH, "--kv-heads", 1, "--block-size", "1x1", "--block-size", "8x1",
        "--backend", "reference", "--json",
    )  # fmt: skip
    rows = rows_of(out)
    assert code == 0
    timed = [row for row in rows if row.get("op")]
    assert {(row["contender"], row["path"]) for row in timed} == {
        ("sdpa float32", "given"),
        ("reference", "given"),
        ("dynamic", "whole"),
    }
    for row in timed:
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"])
        assert row["gflops"] > 0


def test_bench_says_peaks_rule_and_reasons(run: Run, quick_peaks: None, tmp_path: Path) -> None:
    code, out, err = run(
        *SMALL_BENCH, "--block-size", "8x1", "--backend", "csr", "--backend", "reference",
        "--out", "rows.csv", "--plot", "plots/page.html", "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    assert "peaks with 1 threads (in registers, avx2): 10 GFLOP/s fp32" in out
    assert "cost rule: " in out
    assert "no product that computes only the kept blocks" in out
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == ["sdpa float32", "reference", "dynamic", "csr"]
    assert rows[1]["block_size"] == "8x1"
    page = (tmp_path / "plots" / "page.html").read_text("utf-8")
    assert "Times as fast as dense SDPA" in page
    assert "reference 8×1" in page


def test_bench_of_prediction(run: Run, quick_peaks: None) -> None:
    code, out, _ = run(*SMALL_BENCH[:1], "predict", *SMALL_BENCH[1:], "--json")
    assert code == 0
    timed = [row for row in rows_of(out) if row.get("op") == "predict"]
    assert [row["path"] for row in timed] == ["given", "select"] * 3


def test_bench_of_decoding(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseloom.kernels.cpu import peaks

    found = peaks.Peaks("registers", "avx2", 1, 10.0, None, 40.0, 5.0, 50.0)
    monkeypatch.setattr(peaks, "measure_peaks", lambda: found)
    words = ["bench", "decode", "--kv-len", 96, "--heads", 2, "--head-dim", 16, "--repeats", 1]
    code, out, err = run(*words, "--kept", 0.5, "--json")
    assert code == 0, err
    rows = rows_of(out)
    assert rows[0]["record"] == "peaks"
    timed = {row["contender"]: row for row in rows if row.get("op") == "decode"}
    assert {"sdpa", "sdpa bfloat16"} <= timed.keys()
    assert {row["kv_len"] for row in timed.values()} == {96}
    missing = [row for row in rows if row.get("record") == "refused"]
    assert all(row["note"] for row in missing)
    code, out, _ = run(*words)
    assert "peaks with 1 threads" in out
    code, _, err = run(*words, "--kept", 2)
    assert (code, err) == (2, "error: kept must be in (0, 1], got 2.0\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_info_shows_what_the_compiler_makes_of_gpu_kernels(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sparseloom.experiments.gpu import compiled

    file = Path(__file__).parents[1] / "results/gpu_kernels_compiled.json"
    stored = [row.model_dump() for row in read_results(file).rows]
    asked: list[int] = []

    def compile_none(archs: Any, **_: Any) -> list[dict[str, Any]]:
        asked.extend(archs)
        return stored

    monkeypatch.setattr(compiled, "kernel_rows", compile_none)
    code, out, err = run("info", "--gpu-kernels", "--arch", 80, "--arch", 90, "--out", "k.json")
    assert code == 0, err
    assert asked == [80, 90]
    assert f"Triton {stored[0]['triton']}, ptxas {stored[0]['ptxas']}; no card was used" in out
    assert stored[1]["name"].split()[0] in out
    assert len(json.loads((tmp_path / "k.json").read_text("utf-8"))["rows"]) == len(stored)
    code, _, err = run("info", "--arch", 90)
    assert (code, err) == (2, "error: --arch and --out belong to --gpu-kernels\n")


def test_bench_without_a_card_is_one_sentence(run: Run) -> None:
    for words in ((), ("--calibrate",)):
        code, out, err = run("bench", "--device", "cuda", *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: --device cuda needs a CUDA device: ")
        assert err.count("\n") == 1


def test_bench_on_a_card_shows_it_and_its_goals(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sparseloom.experiments.gpu import bench, card

    asked: list[Any] = []
    timed = {
        "op": "attention", "path": "whole", "contender": "dynamic", "q_len": 8192, "kv_len": 8192,
        "heads": 32, "head_dim": 128, "block_size": [64, 1], "sparsity": 0.95, "causal": True,
        "dtype": "bfloat16", "ms": 0.5, "spread": 0.01, "baseline": "sdpa flash",
        "baseline_ms": 1.0, "speedup": 2.0, "gflops": 123456.0, "peak_bytes": 3 << 20,
        "rule": "sparse", "rule_over_dense": 0.5, "timed_as": "graph",
    }  # fmt: skip
    rows = [
        {"record": "card", "name": "H200", "driver": "570.1", "cuda": "12.8", "cudnn": 91002},
        {"record": "gpu peaks", "bf16_gflops": 790e3, "fp16_gflops": 780e3, "int8_gops": 1500e3,
         "dram_gbytes_s": 4321.0},
        timed,
        {"record": "goal", "name": "whole path", "value": 2.0, "wanted": 4.0, "met": False},
    ]  # fmt: skip

    def measured(cases: Any, **_: Any) -> list[dict[str, Any]]:
        asked.extend(cases)
        return rows

    monkeypatch.setattr(card, "check_card", lambda: None)
    monkeypatch.setattr(bench, "bench_cuda", measured)
    words = ("bench", "--device", "cuda", "--q-len", 8192, "--block-size", "64x1")
    code, out, err = run(*words, "--out", "gpu.json")
    assert code == 0, err
    assert {(case.heads, case.head_dim, case.dtype) for case in asked} == {(32, 128, "bfloat16")}
    assert [case.sparsity for case in asked] == [0.9, 0.95, 0.99]
    assert "H200, driver 570.1, CUDA 12.8, cuDNN 91002" in out
    assert "790 TFLOP/s bf16, 780 TFLOP/s fp16, 1,500 TOP/s int8, 4.32 TB/s memory" in out
    assert "123.46" in out  # TFLOP/s
    assert "NO       2.00 (goal 4)  whole path" in out
    assert "gpu.json" in out
    stored = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["rows"]
    assert [row.get("record") or row["op"] for row in stored] == [
        "card", "gpu peaks", "attention", "goal",
    ]  # fmt: skip


def test_bench_of_recorded_masks(run: Run, quick_peaks: None, trace: Path) -> None:
    code, out, err = run(
        "bench", "--mask", f"trace:{trace}", "--head-dim", 16, "--repeats", 1, "--json",
        "--backend", "reference",
    )  # fmt: skip
    assert code == 0, err
    given = [row for row in rows_of(out) if row.get("contender") == "reference"]
    assert [row["mask"] for row in given] == [
        "trace oracle:sparsity=0.5,minimum_keys=2",
        "trace window:width=8",
    ]
    assert [row["q_len"] for row in given] == [64, 64]
    assert given[1]["density"] < given[0]["density"]


def test_adapt_saves_a_model_that_compare_takes(run: Run, model: Path) -> None:
    code, _, err = run(
        "adapt", "--model", model, "--out", "adapted", "--warmup-steps", 2, "--batch-size", 1,
        "--method", "dynamic:sparsity=0.5,projection=0.5,minimum_keys=4", "--limit", 1,
    )  # fmt: skip
    assert code == 0, err
    assert not Path("adapted-checkpoints").exists()  # nothing is left to go on with
    code, out, err = run(
        "compare", "--model", "adapted", "--limit", 1, "--json",
        "--method", "dynamic:sparsity=0.7,projection=0.5,minimum_keys=4",
    )  # fmt: skip
    assert code == 0, err
    assert rows_of(out)[1]["density"] < 0.5


def test_adapt_calibrates_and_compare_takes_the_thresholds(run: Run, model: Path) -> None:
    words = ("adapt", "--model", model, "--out", "tuned", "--method", "elsa:p=2")
    code, _, err = run(*words, "--joint-steps", 2)
    assert (code, err) == (
        2,
        "error: --joint-steps must be 0 for elsa, which is calibrated to the model as it is, "
        "got 2\n",
    )
    code, out, err = run(
        *words, "--calibration-steps", 1, "--batch-size", 1, "--limit", 1, "--json"
    )
    assert code == 0, err
    tuned = rows_of(out)[0]
    assert tuned["settings"]["thresholds"]
    code, out, err = run(
        "compare", "--model", "tuned", "--limit", 1, "--json", "--method", "elsa:p=2",
        "--method", "elsa:p=4",
    )  # fmt: skip
    assert code == 0, err
    given, fresh = rows_of(out)[1:]
    assert given["settings"] == tuned["settings"]
    assert fresh["settings"]["thresholds"] != tuned["settings"]["thresholds"]
    assert given["density"] < 1.0
    assert fresh["density"] < 1.0


def test_adapt_reads_thresholds_off_predictions_and_compare_takes_them(
    run: Run, model: Path
) -> None:
    method = "dynamic:sparsity=0.5,projection=0.5,minimum_keys=4,selection=threshold"
    code, out, err = run(
        "adapt", "--model", model, "--out", "levels", "--method", method, "--warmup-steps", 1,
        "--joint-steps", 1, "--calibration-steps", 1, "--batch-size", 1, "--limit", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    tuned = rows_of(out)[0]
    assert tuned["settings"]["thresholds"]
    code, out, err = run(
        "compare", "--model", "levels", "--limit", 1, "--json", "--method", method,
        "--method", method.replace("0.5", "0.7", 1),
    )  # fmt: skip
    assert code == 0, err
    given, fresh = rows_of(out)[1:]
    assert given["settings"] == tuned["settings"]
    assert fresh["settings"]["thresholds"] != tuned["settings"]["thresholds"]
    assert fresh["density"] < given["density"] < 1.0


def test_adapt_chooses_regions_and_compare_takes_them(run: Run, model: Path) -> None:
    words = ("adapt", "--model", model, "--out", "masked", "--method", "static:density=0.9")
    code, out, err = run(
        *words, "--warmup-steps", 1, "--joint-steps", 1, "--calibration-steps", 1,
        "--batch-size", 1, "--limit", 1, "--entropy-weight", 0.1, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert rows_of(out)[0]["density"] < 1.0
    code, out, err = run(
        "compare", "--model", "masked", "--limit", 1, "--json", "--method", "static:density=0.9",
        "--method", "aligned:pattern=window,density=0.8",
    )  # fmt: skip
    assert code == 0, err
    assert all(row["density"] < 1.0 for row in rows_of(out)[1:])


def test_entropy_says_which_heads_are_sharp(run: Run, model: Path) -> None:
    words = ("entropy", "--model", model, "--limit", 2, "--every", 16)
    code, out, err = run(*words, "--json")
    assert code == 0, err
    rows = rows_of(out)
    assert [(row["layer"], row["head"]) for row in rows] == [
        (layer, head) for layer in range(2) for head in range(4)
    ]
    assert all(0 <= row["entropy"] <= row["mean_entropy"] + 1e-6 <= 1.01 for row in rows)
    code, out, err = run(*words, "--html", "page.html")
    assert code == 0, err
    assert "decided by the input" in out
    assert "What the input decides" in Path("page.html").read_text("utf-8")


def test_adapt_takes_the_ramp_and_the_gradient(run: Run, model: Path) -> None:
    words = ["adapt", "--model", model, "--warmup-steps", 1, "--joint-steps", 2, "--limit", 0,
             "--batch-size", 1, "--method", "dynamic:sparsity=0.5,projection=0.5,minimum_keys=4",
             "--gradient", "both", "--ramp-share", 0.5]  # fmt: skip
    code, _, err = run(*words, "--ramp-from", 0.2, "--out", "ramped")
    assert code == 0, err
    code, _, err = run(*words, "--ramp-from", 1.5, "--out", "refused")
    assert code == 2
    assert err.startswith("error: ")
    assert "1.5" in err
    assert not Path("refused").exists()


def test_reproduce_lists_and_computes(run: Run) -> None:
    code, out, _ = run("reproduce")
    assert code == 0
    assert "dsa_tc_2022 table1" in out
    code, out, _ = run("reproduce", "dota_asplos_2022", "--json")
    assert code == 0
    bases = {row["basis"] for row in rows_of(out)}
    assert bases <= {"identity", "calibrated", "predicted", "scenario"}


def test_reproduce_reads_a_stored_study(run: Run, tmp_path: Path) -> None:
    row = {
        "model": "minilm", "task": "imdb", "method": "oracle", "settings": {"threshold": 0.01},
        "metric": "one_minus_cosine", "value": 0.25, "dense_value": 0.0, "sparsity": 0.97,
        "sparsity_by_layer": [0.96, 0.98],
    }  # fmt: skip
    file = tmp_path / "kept" / "oracle_thresholds.json"
    file.parent.mkdir()
    file.write_text(results([row], command="test").to_json(), "utf-8")
    code, out, err = run("reproduce", "dsa_tc_2022", "table1", "--results", "kept", "--json")
    assert code == 0, err
    rows = rows_of(out)
    assert [found["ours"] for found in rows] == [0.97, 0.96, 0.98, 0.25]
    assert rows[0]["published"] == "94–97 %"


def test_demo_passes_its_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseloom.experiments import demo

    row = {
        "model": "stdlib", "task": "stdlib", "method": "dense", "settings": {}, "density": 1.0,
        "metric": "bits_per_byte", "value": 1.0, "dense_value": 1.0, "seed": 3,
    }  # fmt: skip
    given: dict[str, Any] = {}

    def stand_in(out: Path, **options: Any) -> object:
        given.update(options, out=out)
        return results([row], command=options["command"])

    monkeypatch.setattr(demo, "run_demo", stand_in)
    code, out, _ = run("demo", "--quick", "--seed", 3, "--out", "there", "--json")
    assert code == 0
    assert rows_of(out)[0]["seed"] == 3
    assert (given["out"], given["quick"], given["adapt"]) == (Path("there"), True, False)
    assert given["command"] == "sparseloom demo --quick --seed 3 --out there --json"


# ---------------------------------------------------------------------------- it says no

BAD = {
    "no such command": (["bogus"], "No such command 'bogus'"),
    "no such option": (["info", "--bogus"], "--bogus"),
    "missing argument": (["simulate", "dota_asplos_2022"], "TRACE"),
    "not a number": (["demo", "--seed", "x"], "--seed"),
    "unknown method": (["compare", "--method", "dynamik:sparsity=0.9"], "did you mean 'dynamic'"),
    "unknown setting": (["compare", "--method", "oracle:sparse=0.9"], "sparsity"),
    "sparsity 1.5": (
        ["compare", "--method", "oracle:sparsity=1.5"],
        "sparsity must be in [0, 1), got 1.5",
    ),
    "unknown task": (["compare", "--task", "stdlub"], "did you mean 'stdlib'"),
    "unknown model": (["compare", "--model", "no/such/model"], "stdlib"),
    "unknown machine": (["compare", "--machine", "dota"], "dota_asplos_2022"),
    "data not given": (["compare", "--model", "{model}", "--task", "ptb"], "SPARSELOOM_DATA"),
    "data not there": (
        ["compare", "--model", "{model}", "--task", "ptb", "--data", "nowhere"],
        "nowhere",
    ),
    "limit 0": (["compare", "--limit", "0"], "--limit"),
    "predictor missing": (
        ["compare", "--model", "{model}", "--method", "dynamic:sparsity=0.9"],
        "predictor",
    ),
    "what only generation reads": (
        ["compare", "--model", "{model}", "--method", "h2o"],
        "trace --new-tokens",
    ),
    "a cascade over the cache": (
        ["compare", "--model", "{model}", "--method", "spatten"],
        "spatten:prompt=shorten",
    ),
    "encoder task": (
        ["compare", "--model", "{model}", "--task", "sts-b", "--data", "."],
        "sts",
    ),
    "trace of a folder that exists": (["trace", "--out", "."], "--overwrite"),
    "score of a text": (
        ["trace", "--model", "{model}", "--out", "t", "--text", "empty.txt", "--score", "1"],
        "--text has none",
    ),
    "empty text": (["trace", "--model", "{model}", "--out", "t", "--text", "empty.txt"], "empty"),
    "simulate without a trace": (["simulate", "dota_asplos_2022", "nowhere"], "nowhere"),
    "simulate a file": (["simulate", "dota_asplos_2022", "empty.txt"], "empty.txt"),
    "simulate on nothing": (["simulate", "tpu", "{trace}"], "dota_asplos_2022"),
    "unknown selection": (
        ["simulate", "dota_asplos_2022", "{trace}", "--selection", "mine"],
        "window:width=8",
    ),
    "unknown machine setting": (
        ["simulate", "dota_asplos_2022", "{trace}", "--set", "rmmu.cols=8"],
        "cols",
    ),
    "setting without a value": (
        ["simulate", "dota_asplos_2022", "{trace}", "--set", "clock_ghz"],
        "key=value",
    ),
    "unknown fidelity": (
        ["simulate", "dota_asplos_2022", "{trace}", "--fidelity", "exact"],
        "analytic",
    ),
    "timeline of many": (
        ["simulate", "dota_asplos_2022", "{trace}", "--timeline", "t.json"],
        "--selection",
    ),
    "adapt a window": (["adapt", "--out", "a", "--method", "window:width=8"], "dynamic"),
    "adapt into a folder that exists": (["adapt", "--out", "."], "--overwrite"),
    "search of another method": (["search", "window"], "unknown method to search 'window'"),
    "search without trials": (["search", "spatten", "--trials", "0"], "--trials"),
    "bench sparsity": (["bench", "--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
    "bench block": (["bench", "--block-size", "8"], "--block-size must be like 8x1"),
    "bench heads": (["bench", "--heads", "6", "--kv-heads", "4"], "multiple of kv_heads"),
    "bench backend": (["bench", "--backend", "cuda"], "reference"),
    "bench operation": (["bench", "sorting"], "attention"),
    "bench decode on a card": (["bench", "decode", "--device", "cuda"], "times attention"),
    "bench memory on a card": (["bench", "--device", "cuda", "--memory"], "--memory is for"),
    "unknown paper": (["reproduce", "nature"], "dsa_tc_2022"),
    "unknown table": (["reproduce", "dsa_tc_2022", "table99"], "table1"),
    "no stored run": (["reproduce", "dsa_tc_2022", "table1"], "--run"),
    "size of stored runs": (["reproduce", "dynamic", "--size", "paper"], "belong to --run"),
    "size of a study": (["reproduce", "dynamic", "--size", "large"], "small, paper"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, run: Run, model: Path, trace: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    words, expected = BAD[case]
    code, out, err = run(*(word.format(model=model, trace=trace) for word in words))
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("file", ["trace.json", "operators.parquet"])
def test_corrupt_trace_names_the_file(run: Run, trace: Path, tmp_path: Path, file: str) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(trace, broken)
    (broken / file).write_bytes((broken / file).read_bytes()[:40])
    code, out, err = run("simulate", "dota_asplos_2022", broken)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert file in err


def test_no_output_file_after_an_error(run: Run, model: Path, tmp_path: Path) -> None:
    words = ["compare", "--model", model, "--limit", 1, "--out", "mine.json"]
    code, _, _ = run(*words, "--method", "dynamic:sparsity=0.5")
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELOOM_DEBUG", "1")
    code, _, err = run("reproduce", "nature")
    assert code == 2
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("error: unknown paper")


def test_a_fault_of_our_own_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparseloom.experiments.reproduce as module

    def broken(*words: object) -> object:
        raise RuntimeError("this should not\nhappen")

    monkeypatch.setattr(module, "find_tables", broken)
    code, out, err = run("reproduce")
    assert (code, out) == (1, "")
    assert err.startswith("error: internal: RuntimeError: this should not happen (")


def test_interruption_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparseloom.experiments.reproduce as module

    def interrupted(*words: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "find_tables", interrupted)
    assert run("reproduce")[0] == 130


def test_error_of_a_validation_library_fits_one_line() -> None:
    from pydantic import BaseModel, ValidationError

    class Sizes(BaseModel):
        rows: int
        columns: int

    with pytest.raises(ValidationError) as caught:
        Sizes.model_validate({"rows": "many"})
    text = errors.one_line(caught.value)
    assert "\n" not in text
    assert text.startswith("rows: ")
    assert "; columns: " in text


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m sparseloom reproduce dota_asplos_2022 closed-form | head -c 10"
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert len(done.stdout) == 10
    assert "Traceback" not in done.stderr
