"""Generation with SpAtten and later cache methods: quality against the bytes read of the cache.

    python -m sparseloom.experiments.spatten_generation --data DIR

Teacher-forced decoding: a dense prompt, then one step per token of the text, each scored by what
the model gave it before it was read; no query sees importance from later ones. Each technique of
SpAtten (HPCA 2021, §III) runs alone and together with the others; H2O, StreamingLLM, SnapKV and
Quest at four budgets. Two models: the built-in one on held-out source text (bits per byte) and,
where the data folder has it, the small stories checkpoint on text that it sampled itself (bits per
token). What is finished lies in the work folder or in the results and is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparseloom.experiments.bootstrap import paired_bootstrap
from sparseloom.experiments.study_command import errors_in_one_line
from sparseloom.files import fresh_file
from sparseloom.integrations import sparsify
from sparseloom.methods import H2O, Method, Quest, SnapKV, SpAtten, StreamingLLM
from sparseloom.methods.settings import check_at_least
from sparseloom.models import LoadedModel, load_model
from sparseloom.results import module_command, read_results, write_results
from sparseloom.tasks.data import find_data
from sparseloom.tasks.stdlib import load_stdlib

DENSE = "everything in fp32"
_WHOLE: dict[str, Any] = {"token_keep": None, "head_keep": None}
_READS = ("key_high_bytes", "key_low_bytes", "value_bytes", "index_bytes")


@dataclass(frozen=True)
class Contender:
    """A method and what it stands for."""

    name: str
    method: Method


def contenders(layers: int) -> list[Contender]:
    """What is compared, the first being what the others are compared with."""
    trace = _shares_of_the_trace(layers)
    near: dict[str, Any] = {"recent": 32}
    alone: list[tuple[str, dict[str, Any]]] = [
        *((f"tokens {keep:.0%}", {"token_keep": keep}) for keep in (0.8, 0.65, 0.5)),
        ("tokens as in the trace of GPT-2 small", {"token_keep": trace}),
        ("tokens 65 %, decay 0.9", {"token_keep": 0.65, "decay": 0.9}),
        *(
            (f"tokens {keep:.0%}, newest 32", {"token_keep": keep, **near})
            for keep in (0.8, 0.65, 0.5)
        ),
        ("tokens as in the trace, newest 32", {"token_keep": trace, **near}),
        ("heads 90 %", {"head_keep": 0.9}),
        ("heads 75 %", {"head_keep": 0.75}),
        *((f"values {keep:.0%}", {"value_keep": keep}) for keep in (0.5, 0.2, 0.1)),
        *((f"keys {msb}+4", {"key_bits": (msb, 4)}) for msb in (4, 6, 8, 12)),
        *((f"keys {bits} static", {"key_bits": (bits, 0)}) for bits in (4, 6, 8)),
        *((f"stored values {bits}", {"value_bits": bits}) for bits in (4, 6, 8)),
    ]
    gentle: dict[str, Any] = {"key_bits": (8, 4), "value_bits": 8, "value_keep": 0.5}
    strong: dict[str, Any] = {"key_bits": (6, 4), "value_bits": 6, "value_keep": 0.2}
    together: list[tuple[str, dict[str, Any]]] = [
        ("keys 8+4, values 8, half of them", gentle),
        ("together, tokens 65 %", {"token_keep": 0.65, **gentle}),
        ("together, tokens 65 %, newest 32", {"token_keep": 0.65, **near, **gentle}),
        (
            "together, tokens 65 %, heads 90 %, newest 32",
            {"token_keep": 0.65, "head_keep": 0.9, **near, **gentle},
        ),
        (
            "together, as the trace of GPT-2 small",
            {"token_keep": trace, "threshold": 0.05, **strong},
        ),
        (
            "together, as the trace, newest 32",
            {"token_keep": trace, "threshold": 0.05, **near, **strong},
        ),
    ]
    return [
        Contender(DENSE, SpAtten(**_WHOLE)),
        *(Contender(name, SpAtten(**{**_WHOLE, **settings})) for name, settings in alone),
        *(Contender(name, SpAtten(**{**_WHOLE, **settings})) for name, settings in together),
        *_cache_methods(),
    ]


def _cache_methods() -> list[Contender]:
    """Later methods, at shares of the prompt (of the length so far for pages)."""
    found: list[Contender] = []
    for keep in (0.1, 0.2, 0.35, 0.5):
        half = keep / 2
        found += [
            Contender(f"H2O {keep:.0%}", H2O(heavy_keep=half, recent_keep=half)),
            Contender(f"StreamingLLM {keep:.0%}", StreamingLLM(window=keep)),
            Contender(f"SnapKV {keep:.0%}", SnapKV(token_keep=keep, window=16)),
            Contender(f"Quest {keep:.0%}", Quest(token_keep=keep)),
            Contender(f"Quest {keep:.0%}, no dense layers", Quest(token_keep=keep, dense_layers=0)),
        ]
    smooth = SnapKV(token_keep=0.2, window=16, kernel=7, pooling="max")
    return [
        *found,
        Contender("StreamingLLM 20%, no sinks", StreamingLLM(sinks=0, window=0.2)),
        Contender("SnapKV 20%, window 32", SnapKV(token_keep=0.2)),
        Contender("SnapKV 20%, max of 7", smooth),
        Contender(
            "Quest 20%, no dense layers, by key head",
            Quest(token_keep=0.2, dense_layers=0, mask_heads="kv"),
        ),
    ]


def _shares_of_the_trace(layers: int) -> tuple[float, ...]:
    """Shares of GPT-2 small's published trace, averaged over the layers that one stands for."""
    published = np.repeat([0.9, 0.7, 0.2, 0.1], [1, 1, 4, 6])
    parts = np.array_split(published, layers)
    return tuple(round(float(part.mean()), 3) for part in parts)


@dataclass(frozen=True)
class Text:
    """What is decoded.

    Attributes:
        model: the model.
        ids: (windows, tokens).
        prompt: tokens of each window that are read at once.
        unit: what a token is.
        source: where the text is from.
    """

    model: LoadedModel
    ids: Tensor
    prompt: int
    unit: str
    source: str


def built_in(windows: int, prompt: int, steps: int) -> Text:
    """Evenly spaced windows of the held-out source text, for the built-in model."""
    raw = np.frombuffer(load_stdlib().held_out, dtype=np.uint8)
    length = prompt + steps
    starts = np.linspace(0, len(raw) - length, windows).astype(int)
    ids = torch.from_numpy(np.stack([raw[at : at + length] for at in starts]).astype(np.int64))
    return Text(load_model("stdlib"), ids, prompt, "byte", "held-out standard library")


@torch.no_grad()
def stories(folder: Path, windows: int, prompt: int, steps: int) -> Text:
    """Texts that the dense checkpoint samples at temperature 1, from a fixed seed."""
    loaded = load_model(folder)
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    ids, cache = torch.ones(windows, 1, dtype=torch.int64), DynamicCache()
    for _ in range(prompt + steps - 1):
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        logits[:, :3] = -torch.inf  # no end of the text, nor a start of another
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], 1)
    return Text(loaded, ids, prompt, "token", "sampled from the dense model")


@torch.no_grad()
def teacher_forced(text: Text, method: Method) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Bits of every token after the prompt, (windows, steps), and the statistics by layer."""
    model, ids, bits = text.model.model, text.ids, []
    cache, begin = DynamicCache(), 0
    with sparsify(model, method) as sparse:
        for end in range(text.prompt, ids.shape[1]):
            logits = model(
                input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True
            ).logits
            spread = logits[:, -1].double().log_softmax(-1)
            bits.append(-spread.gather(1, ids[:, end, None])[:, 0] / np.log(2))
            begin = end
    return torch.stack(bits, 1).numpy(), [dict(row) for row in sparse.stats()]


def score(text: Text, contender: Contender) -> dict[str, Any]:
    """One contender on one text: bits per window and what it read."""
    bits, stats = teacher_forced(text, contender.method)
    total = {key: float(sum(row.get(key, 0) for row in stats)) for key in _READS}
    read, dense = sum(total.values()), float(sum(row["dense_cache_bytes"] for row in stats))
    rows = sum(row["rows"] for row in stats)
    return {
        "record": "generation",
        "model": "stdlib" if text.unit == "byte" else "stories260K",
        "text": text.source,
        "contender": contender.name,
        "settings": contender.method.to_dict(),
        "windows": len(bits),
        "prompt": text.prompt,
        "steps": bits.shape[1] - 1,
        "metric": f"bits per {text.unit}",
        "value": float(bits[:, 1:].mean()),  # the first token after the prompt costs nothing more
        "per_window": bits[:, 1:].mean(1).tolist(),
        "read_share": read / dense,
        "dram_reduction": dense / read,
        **{key.replace("_bytes", "_share"): found / dense for key, found in total.items()},
        "low_rows": sum(row["low_rows"] for row in stats) / rows,
    }


def run_study(
    texts: Iterable[Text], work: Path, known: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Rows of all contenders; those that are known, or in the work folder, are not made again."""
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for text in texts:
        dense: list[float] = []
        for contender in contenders(text.model.model.config.num_hidden_layers):
            row = _stored(text, contender, work, known)
            dense = dense or row["per_window"]
            difference = paired_bootstrap(np.array(row["per_window"]), np.array(dense))
            row["difference"] = difference.mean
            row["interval95"] = list(difference.interval95)
            sys.stdout.write(
                f"{row['model']} {contender.name}: {row['value']:.4f} ({difference.mean:+.4f}), "
                f"{row['dram_reduction']:.2f}x fewer bytes, low bits {row['low_rows']:.1%}\n"
            )
            sys.stdout.flush()
            rows.append(row)
    return rows


def _stored(
    text: Text, contender: Contender, work: Path, known: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    name = "".join(c if c.isalnum() else "-" for c in f"{text.unit}-{contender.name}")
    file = work / f"{name}.json"
    asked = {
        "metric": f"bits per {text.unit}",
        "windows": len(text.ids),
        "prompt": text.prompt,
        "steps": text.ids.shape[1] - text.prompt - 1,
    }
    held = [*known, *([json.loads(file.read_text("utf-8"))] if file.exists() else [])]
    for row in held:
        same = all(row.get(key) == value for key, value in asked.items())
        if same and _is_of(row, contender.method):
            now = {"contender": contender.name, "settings": contender.method.to_dict()}
            return {"index_share": 0.0, **row, **now}
    row = json.loads(json.dumps(score(text, contender)))
    with fresh_file(file) as fresh:
        fresh.write_text(json.dumps(row), "utf-8")
    return row


def _is_of(row: Mapping[str, Any], method: Method) -> bool:
    """Whether a row is the method's; settings that are newer than the row have their defaults."""
    try:
        return Method.from_dict(row["settings"]) == method
    except ValueError:  # a setting that is no more
        return False


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Some contenders as a table in Markdown, both models side by side."""
    lines = [
        "| contender | built-in: bits per byte | fewer bytes | stories: bits per token "
        "| fewer bytes |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        cells = [name]
        for metric in ("bits per byte", "bits per token"):
            one = next(r for r in rows if (r.get("contender"), r.get("metric")) == (name, metric))
            cells += [f"{one['value']:.3f}", f"{one['dram_reduction']:.2f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Command line of the study."""
    parser = argparse.ArgumentParser(
        "python -m sparseloom.experiments.spatten_generation",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("--out", type=Path, default=Path("out/spatten_generation"))
    parser.add_argument("--data", type=Path, default=None, help="default: $SPARSELOOM_DATA")
    parser.add_argument("--results", type=Path, default=Path("results/spatten_generation.json"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    with errors_in_one_line(arguments.out):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    for name in ("windows", "prompt", "steps"):
        check_at_least(name, getattr(arguments, name), 1)
    sizes = (arguments.windows, arguments.prompt, arguments.steps + 1)
    texts = [built_in(*sizes)]
    try:
        folder = find_data("ckpt_stories260K", arguments.data, files=("checkpoint_v1.bin",))
    except FileNotFoundError as error:
        sys.stdout.write(f"without the stories checkpoint: {error}\n")
    else:
        texts.append(stories(folder, arguments.windows, 256, arguments.steps + 1))
    known = read_results(arguments.results).rows if arguments.results.exists() else []
    rows = run_study(texts, arguments.out, [row.model_dump() for row in known])
    command = module_command("sparseloom.experiments.spatten_generation")
    write_results(arguments.results, rows, command=command)


if __name__ == "__main__":
    main()
