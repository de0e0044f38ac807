"""SpAtten's cascade pruning on a recorded trace: which tokens, heads, values and low bits it picks.

A trace recorded with `tensors=True` holds the queries, keys and values of every call. The
datapath's own arithmetic (`units.numerics`) makes probabilities of them, and the scores of SpAtten
(Wang, Zhang, Han; HPCA 2021, Alg. 2) accumulate: a token's is the sum of its probabilities over
queries, heads, layers and steps, a head's the sum of the magnitudes of its outputs.

The loop is open: every call sees the hidden states of the run that was recorded, not those that
pruning would have left. What a machine costs hardly depends on it; quality has to be measured with
the method itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.numerics import Datapath, Head, attention_head
from sparseloom.schedules import HEAD_FRONT, TOKEN_FRONT, kept_counts, kept_fractions
from sparseloom.trace import AttentionCall, MaskArrays, Operator, Selection, Trace
from sparseloom.trace.ranking import with_ranking

Bools = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Cascade:
    """What is pruned.

    Args:
        token_keep, head_keep: kept fraction of each layer, or the mean over layers, spread by
            the published rule (`ratio_schedule`).
        path: widths, threshold, and the kept fraction of values. Values are pruned and low bits
            fetched on demand while tokens are generated only; a prompt is read at full width.
        reference_tokens: the length that `token_keep` is a fraction of while tokens are generated;
            default the largest of the trace. A prompt that is not followed by generation counts
            from its own length, without padding.
        decay: what earlier token scores are multiplied by at the start of each step.
        keep_first, keep_last: tokens that are never pruned; by default the first one of a prompt
            (BERT's [CLS]), the newest one while tokens are generated. The paper names none.
    """

    token_keep: float | tuple[float, ...] = 0.65
    head_keep: float | tuple[float, ...] = 1.0
    path: Datapath = field(default_factory=Datapath)
    reference_tokens: int | None = None
    decay: float = 1.0
    keep_first: bool | None = None
    keep_last: bool | None = None

    def to_dict(self) -> dict[str, object]:
        """Settings for a selection's record."""
        return {
            "method": "spatten_cascade",
            "version": 1,
            "loop": "open",
            "token_keep": _plain(self.token_keep),
            "head_keep": _plain(self.head_keep),
            "reference_tokens": self.reference_tokens,
            "decay": self.decay,
            "path": self.path.model_dump(mode="json"),
        }


def with_cascade(
    trace: Trace, cascade: Cascade, *, name: str = "spatten", probabilities: bool = False
) -> Trace:
    """The trace with one selection more, made from its tensors.

    While tokens are generated, the prompt is read whole, and each step starts anew from all tokens:
    what is pruned in a step is still in memory for the next (as in the authors' traces). Scores of
    tokens and heads persist. Scores are those of queries scaled by 1/sqrt(head_dim). With several
    sequences, heads are chosen for all of them together.

    Args:
        trace: recorded with `tensors=True`.
        cascade: the settings.
        name: of the new selection.
        probabilities: also store what the top-k engine gets, as `calls.I.probability`, uint16
            fractions of 2**probability_bits, 0 where nothing was computed.

    Raises:
        MachineError: the trace lacks tensors, or fractions do not fit its layers.
    """
    run = _Run(trace, cascade, probabilities)
    for number, operator in enumerate(trace.workload.attention()):
        run.call(number, operator)
    calls = with_ranking(trace.workload, run.calls)
    selection = Selection(name, calls, cascade.to_dict())
    tensors = {**trace.tensors, **run.stored}
    return Trace(trace.workload, {**trace.selections, name: selection}, tensors)


class _Run:
    """Scores and survivors, call by call."""

    def __init__(self, trace: Trace, cascade: Cascade, store: bool) -> None:
        self.trace, self.cascade, self.store = trace, cascade, store
        self.operators = trace.workload.attention()
        if not self.operators:
            raise MachineError(f"{trace.workload.name} has no attention calls")
        shape = trace.workload.model
        self.layers = shape.layers
        self.token_keep = _fractions("token_keep", cascade.token_keep, shape.layers, TOKEN_FRONT)
        head_keep = _fractions("head_keep", cascade.head_keep, shape.layers, HEAD_FRONT)
        self.head_counts = kept_counts(head_keep, shape.heads).tolist()
        self.generates = any(op.stage == "decode" for op in self.operators)
        self.longest = max(op.kv_len for op in self.operators)
        first = self.operators[0]
        self.tokens: Scores = np.zeros((first.batch, self.longest))
        self.heads: Scores = np.zeros(first.heads)
        self.alive: Bools = np.ones((first.batch, first.kv_len), np.bool_)
        self.heads_alive: Bools = np.ones(first.heads, np.bool_)
        self.step = -1
        self.calls: list[AttentionCall] = []
        self.stored: dict[str, NDArray[np.uint16]] = {}
        whole = {"key_bits": sum(cascade.path.planes), "value_keep": 1.0}
        self.prompt_path = Datapath.model_validate({**cascade.path.model_dump(), **whole})

    def call(self, number: int, operator: Operator) -> None:
        """Choose, compute and count one attention call."""
        layer, decode = operator.layer or 0, operator.stage == "decode"
        reads_prompt = self.generates and not decode
        if operator.step != self.step:
            self._start_step(operator)
        if not reads_prompt:
            self._prune(operator, self._counts(operator, layer), self.head_counts[layer])
        path = self.cascade.path if decode else self.prompt_path
        alive, heads_alive = self.alive.copy(), self.heads_alive.copy()
        shape = (operator.batch, operator.heads, operator.q_len, operator.kv_len)
        rows = np.zeros((operator.batch, operator.q_len), np.bool_)
        kept_values = np.zeros(shape if decode else (0,), np.bool_)
        refetch = np.zeros(shape[:3], np.bool_)
        codes = np.zeros(shape if self.store else (0,), np.uint16)
        one = 2**path.softmax.probability_bits
        for b in range(operator.batch):
            ids = np.flatnonzero(alive[b])
            # A query is alive with its token; while generating, the newest token asks.
            asks = np.arange(operator.q_len) + operator.kv_len - operator.q_len
            asking = np.flatnonzero(np.ones(1, np.bool_) if decode else alive[b, asks])
            rows[b, asking] = True
            for h in np.flatnonzero(heads_alive).tolist():
                head = self._head(number, operator, path, b, h, asking, ids)
                self.tokens[b, ids] += head.importance
                self.heads[h] += head.head_importance
                refetch[b, h, asking] = head.refetched
                if decode:
                    kept_values[b, h, 0, ids[head.value_ids[0]]] = True
                if self.store:
                    found = np.rint(head.probabilities * one).astype(np.uint16)
                    codes[b, h][np.ix_(asking, ids)] = found
        self.stored |= {f"calls.{number}.probability": codes} if self.store else {}
        high, low = path.planes
        everything = reads_prompt and bool(alive.all())
        keep = rows[:, None, :, None] & alive[:, None, None, :]
        self.calls.append(
            AttentionCall(
                mask=None if everything else _mask(keep, operator),
                value_mask=_mask(kept_values, operator) if decode and path.value_keep < 1 else None,
                key_bits=high,
                value_bits=path.value_bits,
                query_bits=path.query_bits,
                lsb_bits=low or None,
                lsb_threshold=path.threshold if low else None,
                lsb_refetch=refetch if low else None,
                tokens_alive=alive,
                heads_alive=None if heads_alive.all() else heads_alive,
                accumulates_importance=True,
            )
        )

    def _start_step(self, operator: Operator) -> None:
        self.step = operator.step
        self.tokens *= self.cascade.decay
        padding = self.trace.workload.padding_of(operator)
        self.alive = np.ones((operator.batch, operator.kv_len), np.bool_)
        if padding is not None:
            self.alive &= padding
        self.heads_alive = np.ones(operator.heads, np.bool_)

    def _counts(self, operator: Operator, layer: int) -> list[int]:
        """Tokens that may stay, per sequence."""
        if operator.stage == "decode":
            reference = self.cascade.reference_tokens or self.longest
            return [int(kept_counts(self.token_keep, reference)[layer])] * operator.batch
        padding = self.trace.workload.padding_of(operator)
        valid = np.ones((1, operator.kv_len)) if padding is None else padding
        lengths = np.broadcast_to(valid.sum(axis=1), (operator.batch,)).astype(int)
        return [int(kept_counts(self.token_keep, length)[layer]) for length in lengths.tolist()]

    def _prune(self, operator: Operator, counts: Sequence[int], heads: int) -> None:
        decode = operator.stage == "decode"
        kept = self.cascade
        for b, count in enumerate(counts):
            ids = np.flatnonzero(self.alive[b])
            scores = self.tokens[b, ids].copy()
            if ids.size and (not decode if kept.keep_first is None else kept.keep_first):
                scores[0] = np.inf
            if ids.size and (decode if kept.keep_last is None else kept.keep_last):
                scores[-1] = np.inf
            self.alive[b] = False
            self.alive[b, ids[_top(scores, count)]] = True
        ids = np.flatnonzero(self.heads_alive)
        self.heads_alive[:] = False
        self.heads_alive[ids[_top(self.heads[ids], heads)]] = True

    def _head(
        self,
        number: int,
        operator: Operator,
        path: Datapath,
        b: int,
        h: int,
        asking: NDArray[np.int64],
        ids: NDArray[np.int64],
    ) -> Head:
        shared = h * operator.kv_heads // operator.heads
        query = self._tensor(number, "query")[b, h, asking]
        key = self._tensor(number, "key")[b, shared, ids]
        value = self._tensor(number, "value")[b, shared, ids]
        causal = operator.is_causal and operator.q_len > 1
        return attention_head(path, query, key, value, is_causal=causal)

    def _tensor(self, number: int, name: str) -> NDArray[np.float32]:
        found = self.trace.tensors.get(f"calls.{number}.{name}")
        if found is None:
            raise MachineError(
                f"{self.trace.workload.name} has no tensor calls.{number}.{name}: record it with "
                "tensors=True"
            )
        return found


def _fractions(
    name: str, keep: float | tuple[float, ...], layers: int, front: float
) -> NDArray[np.float64]:
    """Kept fraction per layer."""
    try:
        return kept_fractions(name, keep, layers, front)
    except ValueError as error:
        raise MachineError(str(error)) from None


def _top(scores: Scores, count: int) -> NDArray[np.int64]:
    """Positions of the largest, ascending; of equal ones the first (Alg. 3 keeps their order)."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _mask(keep: Bools, operator: Operator) -> MaskArrays:
    return MaskArrays.from_bool(keep, is_causal=operator.is_causal)


def _plain(keep: float | tuple[float, ...]) -> object:
    return list(keep) if isinstance(keep, tuple) else keep
