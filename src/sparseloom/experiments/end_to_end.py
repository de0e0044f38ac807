"""Time and peak memory of a whole encoder: dense, dynamic sparse, and linear-time attention.

The model is that of Long Range Arena Text as Liu et al. (IEEE TC 2022, table 4, figures 12 and 13)
time it: 4 layers, 4 heads of 64, 2000 tokens.  Its weights are random: neither time nor memory
depends on what it learned, except that real masks are less even.  Attention is the sum over layers
from queries, keys, values and hidden states to the output, so prediction and selection are part of
it.  All contenders of one precision take turns in one process; memory is measured in another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparseloom.experiments.attention_time import attend
from sparseloom.experiments.bench_cases import DTYPES
from sparseloom.experiments.bench_memory import memory_of_call
from sparseloom.experiments.compare import capture
from sparseloom.experiments.on_device import Device, timed
from sparseloom.experiments.parts import kept_part
from sparseloom.experiments.timing import Timing
from sparseloom.experiments.unfused_time import keep_freed_memory
from sparseloom.integrations import method_shape, sparsify
from sparseloom.methods import AttentionInputs, Dense, DynamicSparse, Learned, parse_method
from sparseloom.methods.base import Method
from sparseloom.models import LoadedModel
from sparseloom.models.lra import LraForSequenceClassification
from sparseloom.models.lra_presets import lra_config
from sparseloom.training import adapt

Row = dict[str, Any]
SDPA, EAGER = "dense, SDPA", "dense, unfused"
# σ and INT8 as on the V100; the widths of the others are their authors' usual ones.
METHODS = {
    f"DSA-{round(100 * sparsity)}, {name}": f"dynamic:sparsity={sparsity},block_size={block},"
    "projection=0.25,bits=8,rotary=false"
    for sparsity in (0.9, 0.95)
    for name, block in (("fine-grained", "1x1"), ("1×4", "4x1"), ("1×8", "8x1"))
} | {
    "Performer": "performer:features=256",
    "Reformer": "reformer:rounds=2,bucket_size=64",
    "Linformer": "linformer:rank=256",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is timed; `length` counts [CLS]."""

    batch: int = 16
    length: int = 2000
    layers: int = 4
    repeats: int = 7
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: Device = "cpu"


SMALL = Plan(batch=2, repeats=5)
PAPER = Plan()


def on_card(plan: Plan) -> Plan:
    """The same on the current CUDA device, in half precision as on the V100."""
    return dataclasses.replace(plan, device="cuda", dtypes=("float16", "bfloat16"))


def run_study(
    plan: Plan, out: Path, *, seed: int = 0, step: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Rows of op "attention" and "model"; precisions that are finished in `out` are not run again.

    `peak_bytes` is the largest memory that one pass takes above what was there before it, where
    the system tells.
    """
    keep_freed_memory()
    rows: list[Row] = []
    for name in plan.dtypes:
        step(f"times in {name}")
        settings = [dataclasses.asdict(plan), list(METHODS.items()), seed]
        timed = kept_part(out / f"{name}.json", settings, partial(time_all, plan, name, seed))
        step(f"memory in {name}")
        measure = _peaks_elsewhere if plan.device == "cpu" else peak_all
        peaks = kept_part(out / f"{name}-memory.json", settings, partial(measure, plan, name, seed))
        for row in timed:
            peak = peaks[row["op"]].get(row["contender"])
            rows.append(row if peak is None else row | {"peak_bytes": peak})
    return rows


def time_all(plan: Plan, dtype: str, seed: int) -> list[Row]:
    """Interleaved times of attention and of the model in one precision."""
    setup = Setup.make(plan, dtype, seed)
    with torch.inference_mode():
        times = {
            op: timed(runs, device=plan.device, repeats=plan.repeats)
            for op, runs in setup.runs().items()
        }
    return [
        _row(plan, setup, op, name, dtype, found) for op, found in times.items() for name in found
    ]


def peak_all(plan: Plan, dtype: str, seed: int) -> dict[str, dict[str, int]]:
    """Peak memory of attention and of the model under every contender, each run once before."""
    setup = Setup.make(plan, dtype, seed)
    found: dict[str, dict[str, int]] = {}
    with torch.inference_mode():
        for op, runs in setup.runs().items():
            found[op] = {}
            for name, run in runs.items():
                run()
                peak = _peak(run, plan.device)
                if peak is not None:
                    found[op][name] = peak
    return found


def _peak(run: Callable[[], object], device: Device) -> int | None:
    if device == "cpu":
        return memory_of_call(run)
    from sparseloom.experiments.gpu.memory import call_with_peak

    return call_with_peak(run).total


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The model, an input and the methods with their weights."""

    model: LraForSequenceClassification
    inputs: dict[str, Tensor]
    methods: dict[str, Method]

    @classmethod
    def make(cls, plan: Plan, dtype: str, seed: int) -> Setup:
        """Random weights and bytes; predictors see one batch, which sets their scales."""
        torch.manual_seed(seed)
        config = lra_config("text", length=plan.length - 1, num_hidden_layers=plan.layers)
        config._attn_implementation = "sdpa"
        model = LraForSequenceClassification(config).eval()
        tokens = torch.randint(1, 257, (plan.batch, plan.length - 1))
        methods = {
            name: _ready(parse_method(text), model, tokens) for name, text in METHODS.items()
        }
        cast("nn.Module", model).to(plan.device, DTYPES[dtype])
        for method in methods.values():
            if isinstance(method, Learned) and method.module is not None:
                method.module.to(plan.device)
        return cls(model, {"input_ids": tokens.to(plan.device)}, methods)

    def runs(self) -> dict[str, dict[str, Callable[[], object]]]:
        """By op and contender: attention of all layers on recorded inputs, and the whole model."""
        calls = capture(LoadedModel("lra-text", self.model, None), self.inputs)
        attention: dict[str, Callable[[], object]] = {
            SDPA: partial(_attention, Dense(), calls),
            EAGER: partial(_unfused, calls),
        }
        attention |= {name: partial(_attention, m, calls) for name, m in self.methods.items()}
        return {
            "attention": attention,
            "model": {name: partial(self.forward, name) for name in attention},
        }

    def forward(self, name: str) -> None:
        """One forward pass under a contender."""
        if name in (SDPA, EAGER):
            with _implementation(self.model, "sdpa" if name == SDPA else "eager"):
                self.model(**self.inputs)
            return
        with sparsify(self.model, self.methods[name], when="always"):
            self.model(**self.inputs)


def _ready(method: Method, model: LraForSequenceClassification, tokens: Tensor) -> Method:
    if isinstance(method, DynamicSparse):
        batch = {"input_ids": tokens[:1, :256]}
        return adapt(model, method, [batch], warmup_steps=1, progress=False)
    if isinstance(method, Learned):
        return method.initialise(method_shape(model))
    return method


def _attention(method: Method, calls: list[AttentionInputs]) -> None:
    for call in calls:
        attend(method, call)


def _unfused(calls: list[AttentionInputs]) -> None:
    for call in calls:
        assert call.value is not None
        scores = call.query @ call.key.transpose(-1, -2) * call.scale
        out = torch.softmax(scores, -1) @ call.value
        del out


@contextmanager
def _implementation(model: LraForSequenceClassification, name: str) -> Generator[None]:
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _row(plan: Plan, setup: Setup, op: str, name: str, dtype: str, times: dict[str, Timing]) -> Row:
    method = setup.methods.get(name)
    dynamic = method if isinstance(method, DynamicSparse) else None
    shape: Any = setup.model.config
    return {
        "op": op,
        "path": "whole",
        "contender": name,
        "method": None if method is None else str(method),
        "batch": plan.batch,
        "layers": plan.layers,
        "q_len": plan.length,
        "kv_len": plan.length,
        "heads": shape.num_attention_heads,
        "head_dim": shape.qkv_size // shape.num_attention_heads,
        "block_size": None if dynamic is None else list(dynamic.block_size),
        "sparsity": 0.0 if dynamic is None else dynamic.sparsity,
        "dtype": dtype,
        "device": plan.device,
        "causal": False,
        "ms": times[name].ms,
        "spread": times[name].spread,
        "repeats": times[name].repeats,
        "baseline": SDPA,
        "baseline_ms": times[SDPA].ms,
        "speedup": times[SDPA].ms / times[name].ms,
    }


def _peaks_elsewhere(plan: Plan, dtype: str, seed: int) -> dict[str, dict[str, int]]:
    """`peak_all` in a process that gives freed memory back at once."""
    question = {"plan": dataclasses.asdict(plan), "dtype": dtype, "seed": seed}
    done = subprocess.run(
        [sys.executable, "-m", "sparseloom.experiments.end_to_end"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    if done.returncode:
        raise RuntimeError(f"peak memory was not measured: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    asked["plan"]["dtypes"] = tuple(asked["plan"]["dtypes"])
    answer = peak_all(Plan(**asked["plan"]), asked["dtype"], asked["seed"])
    sys.stdout.write(json.dumps(answer) + "\n")
