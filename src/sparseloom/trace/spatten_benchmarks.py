"""The 30 benchmarks of SpAtten (HPCA 2021) as traces: 22 of BERT and 8 of GPT-2.

BERT reads an input of its task's mean length; GPT-2 generates 32 tokens after a prompt of 992.
Each trace has the selection "spatten" (and "dense", as all traces have): what the paper's rules and
the authors' public traces leave of tokens, heads and values, at their bit widths. Which tokens
survive is not known for any of them: key counts are what counts, and `tokens_alive` comes from an
index model (`trace.index_models`), named in the selection's `method`. The four texts of
GPT-2 differ in nothing but their name, as far as is public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from sparseloom.schedules import HEAD_FRONT, TOKEN_FRONT, kept_counts, kept_fractions
from sparseloom.trace.index_models import IndexModel, Uniform, draw_tokens
from sparseloom.trace.schema import (
    AttentionCall,
    ModelShape,
    Operator,
    Scope,
    Selection,
    Workload,
)
from sparseloom.trace.trace import Trace
from sparseloom.trace.workloads import transformer_operators

Origin = Literal["measured", "default", "published"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(_Data):
    """How a benchmark is pruned and quantised.

    Args:
        token_keep, head_keep: mean kept fraction over layers, spread by `ratio_schedule`.
        tokens, heads: kept counts by layer instead; `tokens` refer to `reference_tokens`.
        reference_tokens: the length that `tokens` and local value pruning count from.
        value_keep: kept fraction of the values of each head and query, generation only.
        key_bits, value_bits, query_bits: operand widths.
        lsb_bits, lsb_threshold: progressive quantisation of the keys.
        rescales: earlier importance is rescaled on the last layer of each step.
        refetched_heads: heads of layer 0, 1, … that fetch low bits, by step ("1-9" = each).
    """

    token_keep: float | None = Field(default=None, gt=0, le=1)
    head_keep: float | None = Field(default=None, gt=0, le=1)
    tokens: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    reference_tokens: int | None = Field(default=None, ge=1)
    value_keep: float | None = Field(default=None, gt=0, le=1)
    key_bits: int | None = None
    value_bits: int | None = None
    query_bits: int | None = None
    lsb_bits: int | None = None
    lsb_threshold: float | None = None
    rescales: bool = False
    refetched_heads: dict[int | str, tuple[int, ...]] = Field(default_factory=dict)

    def token_counts(self, layers: int, length: int) -> tuple[int, ...]:
        """Tokens kept in each layer."""
        if self.tokens is not None:
            return self.tokens
        fractions = kept_fractions("token_keep", self.token_keep, layers, TOKEN_FRONT)
        return tuple(kept_counts(fractions, length).tolist())

    def head_counts(self, layers: int, heads: int) -> tuple[int, ...]:
        """Heads kept in each layer."""
        if self.heads is not None:
            return self.heads
        fractions = kept_fractions("head_keep", self.head_keep, layers, HEAD_FRONT)
        return tuple(kept_counts(fractions, heads).tolist())

    def refetched(self, step: int, layer: int) -> int:
        """Heads that fetch their low bits in this call."""
        for steps, heads in self.refetched_heads.items():
            first, _, last = str(steps).partition("-")
            if int(first) <= step <= int(last or first):
                return heads[layer] if layer < len(heads) else 0
        return 0


class Length(_Data):
    """Input tokens of a BERT task, and where the number is from."""

    tokens: int = Field(ge=1)
    origin: Origin


class _Generation(_Data):
    prompt: int = Field(ge=1)
    tokens: int = Field(ge=1)


class _Table(_Data):
    schema_: Literal["sparseloom/spatten_benchmarks/1"] = Field(alias="schema")
    models: dict[str, ModelShape]
    lengths: dict[str, Length]
    generation: _Generation
    texts: tuple[str, ...]
    selections: dict[str, Settings]


@dataclass(frozen=True)
class Benchmark:
    """One of the 30.

    Args:
        name: as "bert-base-cola".
        model: as "bert-base".
        task: as "cola".
        shape: the model's sizes.
        length: input tokens; of GPT-2 the prompt.
        new_tokens: tokens generated; 0 for BERT.
        length_origin: where the length is from.
    """

    name: str
    model: str
    task: str
    shape: ModelShape
    length: int
    new_tokens: int
    length_origin: Origin

    def trace(
        self,
        *,
        scope: Scope = "attention",
        prompt: bool = False,
        head: bool = False,
        index_model: IndexModel | None = None,
        seed: int = 0,
    ) -> Trace:
        """The workload with the selections that the table has for it.

        Args:
            scope: "attention" alone, or "model": with its matrix products, norms, activations.
            prompt: GPT-2 also reads the prompt, as step 0; else generation alone, steps from 0, as
                in the authors' traces.
            head: with scope "model", also the product with the vocabulary. Table IV leaves it
                out: its 19.3 GFLOP are those of the layers.
            index_model, seed: which tokens are alive; default `Uniform()`.
        """
        operators = self._operators(scope, prompt, head)
        source = f"SpAtten (HPCA 2021) benchmark, length {self.length} ({self.length_origin})"
        workload = Workload(self.shape, operators, self.name, scope=scope, source=source)
        model = index_model or Uniform()
        found = {
            name: spatten_selection(workload, used, name=name, index_model=model, seed=seed)
            for name, used in self.settings().items()
        }
        return Trace(workload, found)

    def settings(self) -> dict[str, Settings]:
        """The table's settings: "spatten", and "spatten-static" where there is one."""
        table = _table().selections
        family = self.model if self.model in table else self.shape.family
        found = {"spatten": table[family]}
        static = table.get(f"{family}-static")
        return found if static is None else {**found, "spatten-static": static}

    def _operators(self, scope: Scope, prompt: bool, head: bool) -> tuple[Operator, ...]:
        first = self.length
        found: list[Operator] = []
        if prompt or not self.new_tokens:
            found += transformer_operators(self.shape, q_len=first, head=head)
        for token in range(self.new_tokens):
            found += transformer_operators(
                self.shape,
                q_len=1,
                kv_len=first + 1 + token,
                stage="decode",
                step=token + int(prompt),
                head=head,
            )
        if scope == "attention":
            found = [operator for operator in found if operator.is_attention]
        return tuple(found)


def benchmarks() -> tuple[Benchmark, ...]:
    """All 30, BERT first."""
    table = _table()
    found: list[Benchmark] = []
    for model, shape in table.models.items():
        if shape.family == "bert":
            for task, length in table.lengths.items():
                name = f"{model}-{task}"
                found.append(Benchmark(name, model, task, shape, length.tokens, 0, length.origin))
        else:
            made = table.generation
            for text in table.texts:
                name = f"{model}-{text}"
                found.append(
                    Benchmark(name, model, text, shape, made.prompt, made.tokens, "published")
                )
    return tuple(found)


def lengths() -> dict[str, Length]:
    """The input length of each BERT task."""
    return dict(_table().lengths)


def benchmark(name: str) -> Benchmark:
    """One of the 30 by name, as "gpt2-small-wikitext2".

    Raises:
        ValueError: no such benchmark.
    """
    known = {one.name: one for one in benchmarks()}
    if name not in known:
        raise ValueError(f"benchmark must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def spatten_selection(
    workload: Workload,
    settings: Settings,
    *,
    name: str = "spatten",
    index_model: IndexModel | None = None,
    seed: int = 0,
) -> Selection:
    """What the settings leave of a workload: counts, and live tokens by an index model.

    A prompt that is followed by generation is read whole; pruning starts with the second token
    generated, and the first one fetches every key (as in the authors' traces). Heads that survive
    are numbered from 0, as there. Dead queries of BERT keep no keys.

    Args:
        workload: prefill alone, or generation with or without the prompt.
        settings: counts or ratios, bit widths.
        name: what to call the selection.
        index_model, seed: which tokens are alive; default `Uniform()`.
    """
    model = index_model or Uniform()
    operators = workload.attention()
    generated = sorted({op.step for op in operators if op.stage == "decode"})
    calls: list[AttentionCall] = []
    rng = np.random.default_rng(seed)
    tokens: np.ndarray = np.zeros((0, 0))
    for i, operator in enumerate(operators):
        if i == 0 or operators[i - 1].step != operator.step:
            tokens = draw_tokens(model, rng, operator)
        if operator.stage == "decode":
            token = generated.index(operator.step)
            last = operator.step == generated[-1]
            calls.append(_generation_call(workload, settings, operator, token, last, tokens))
        elif generated:
            calls.append(_bits(settings, accumulates_importance=True))
        else:
            calls.append(_prefill_call(workload, settings, operator, tokens))
    method: dict[str, object] = {
        "method": "spatten_benchmark",
        "version": 1,
        **settings.model_dump(exclude_none=True, exclude={"refetched_heads"}, mode="json"),
        **model.settings(),
        "index_seed": seed,
    }
    return Selection(name, tuple(calls), method)


def _generation_call(
    workload: Workload,
    settings: Settings,
    operator: Operator,
    token: int,
    is_last_step: bool,
    scores: np.ndarray,
) -> AttentionCall:
    layers, heads, layer = workload.model.layers, operator.heads, operator.layer or 0
    reference = settings.reference_tokens or operator.kv_len
    planned = settings.token_counts(layers, reference)
    alive_heads = _first(heads, settings.head_counts(layers, heads)[layer])
    # The token right after the prompt still sees everything.
    wanted = [reference] * layers if token == 0 else list(planned)
    count = min(wanted[layer], operator.kv_len)
    values = count
    if settings.value_keep is not None:
        values = min(count, int(settings.value_keep * wanted[layer] + 1e-9))
    # The keep count of the call that follows, in this step or the next.
    following: Sequence[int] = [*wanted[layer + 1 :], *([] if is_last_step else planned)]
    selects = bool(following) and following[0] != wanted[layer] and following[0] < reference
    ends_step = layer == layers - 1 and not is_last_step
    refetch = _first(heads, settings.refetched(token, layer)) & alive_heads
    return _bits(
        settings,
        key_counts=_spread(alive_heads, count),
        value_counts=_spread(alive_heads, values) if settings.value_keep else None,
        lsb_refetch=refetch[None, :, None] if settings.lsb_bits else None,
        tokens_alive=_alive(scores, count),
        heads_alive=None if alive_heads.all() else alive_heads,
        token_keep=following[0] if selects else None,
        # Scores that no later selection reads need not be kept.
        accumulates_importance=not is_last_step or _prunes_later(wanted, layer),
        rescales_importance=settings.rescales and ends_step,
    )


def _prefill_call(
    workload: Workload, settings: Settings, operator: Operator, scores: np.ndarray
) -> AttentionCall:
    layers, heads, layer = workload.model.layers, operator.heads, operator.layer or 0
    planned = settings.token_counts(layers, operator.kv_len)
    alive_heads = _first(heads, settings.head_counts(layers, heads)[layer])
    alive = _alive(scores, planned[layer])
    # A token that was pruned asks nothing any more: its row keeps no keys.
    counts = (alive[:, None, :] & alive_heads[None, :, None]) * np.int64(planned[layer])
    ends = layer == layers - 1 or planned[layer + 1] == planned[layer]
    return _bits(
        settings,
        key_counts=counts,
        tokens_alive=alive,
        heads_alive=None if alive_heads.all() else alive_heads,
        token_keep=None if ends else planned[layer + 1],
        accumulates_importance=_prunes_later(planned, layer),
    )


def _bits(settings: Settings, **fields: object) -> AttentionCall:
    call = AttentionCall(
        key_bits=settings.key_bits,
        value_bits=settings.value_bits,
        query_bits=settings.query_bits,
        lsb_bits=settings.lsb_bits,
        lsb_threshold=settings.lsb_threshold,
    )
    changes: Mapping[str, object] = fields
    return replace(call, **changes)


def _prunes_later(counts: Sequence[int], layer: int) -> bool:
    """Whether a layer after this one keeps fewer tokens."""
    return any(count < counts[layer] for count in counts[layer + 1 :])


def _first(total: int, count: int) -> np.ndarray:
    return np.arange(total) < count


def _spread(alive: np.ndarray, count: int) -> np.ndarray:
    """(1, heads, 1): so many for each head that is alive."""
    return (alive * np.int64(count))[None, :, None]


def _alive(scores: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the largest scores, (batch, kv_len)."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    alive = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(alive, order, True, axis=1)
    return alive


@cache
def _table() -> _Table:
    text = (
        resources.files("sparseloom.trace").joinpath("spatten_benchmarks.yaml").read_text("utf-8")
    )
    return _Table.model_validate(yaml.safe_load(text))
