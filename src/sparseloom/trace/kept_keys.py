"""Counts of kept keys turned into masks, by an index model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparseloom.trace.errors import TraceError
from sparseloom.trace.index_models import IndexModel, Uniform, draw_tokens
from sparseloom.trace.masks import MaskArrays
from sparseloom.trace.schema import AttentionCall, Operator, Selection
from sparseloom.trace.trace import Trace


def with_keys(
    trace: Trace,
    selection: str | None = None,
    model: IndexModel | None = None,
    *,
    seed: int = 0,
    keep_first: bool | None = None,
    keep_last: bool | None = None,
) -> Selection:
    """A selection's counts turned into masks; what has masks already keeps them.

    Tokens of `tokens_alive` come before others. Where all heads that are alive keep equally many
    keys they keep the same ones, and the mask has one head.

    Args:
        trace: the workload and its selections.
        selection: whose counts; None takes the only one there is.
        model: default `Uniform()`.
        seed: same seed, same ids.
        keep_first, keep_last: never drop the first or the newest token. By default the first of
            a prompt that is read whole (BERT's [CLS]), the newest one while tokens are generated.

    Raises:
        TraceError: a call keeps more keys than are alive, or more values than keys.
    """
    chosen, used = trace.selection(selection), model or Uniform()
    ids = _Ids(used, seed, keep_first, keep_last)
    calls = tuple(
        ids.fill(operator, call)
        for operator, call in zip(trace.workload.attention(), chosen.calls, strict=True)
    )
    method = {**chosen.method, **used.settings(), "index_seed": seed}
    return Selection(chosen.name, calls, method, chosen.quality)


class _Ids:
    """Draws the scores of each step once and applies them call by call."""

    def __init__(
        self, model: IndexModel, seed: int, keep_first: bool | None, keep_last: bool | None
    ) -> None:
        self.model, self.rng = model, np.random.default_rng(seed)
        self.keep_first, self.keep_last = keep_first, keep_last
        self._step: tuple[int, int, int] | None = None
        self._tokens: Float[np.ndarray, "batch kv_len"] = np.zeros((0, 0))

    def tokens(self, operator: Operator) -> Float[np.ndarray, "batch kv_len"]:
        """The scores of the operator's step."""
        step = (operator.step, operator.batch, operator.kv_len)
        if step != self._step:
            self._step = step
            self._tokens = draw_tokens(
                self.model,
                self.rng,
                operator,
                keep_first=self.keep_first,
                keep_last=self.keep_last,
            )
        return self._tokens

    def fill(self, operator: Operator, call: AttentionCall) -> AttentionCall:
        """The call with masks instead of counts."""
        scores = self.tokens(operator)
        mask, values = call.mask, call.value_mask
        if call.key_counts is not None:
            if call.tokens_alive is not None:
                scores = np.where(call.tokens_alive, scores, -np.inf)
            mask = self._keys(operator, call, call.key_counts, scores)
        if call.value_counts is not None:
            values = self._values(operator, call, mask, call.value_counts)
        kept = {"mask": mask, "value_mask": values, "key_counts": None, "value_counts": None}
        return replace(call, **kept)

    def _keys(
        self,
        operator: Operator,
        call: AttentionCall,
        counts: Int64[np.ndarray, "batch heads q_len"],
        scores: Float[np.ndarray, "batch kv_len"],
    ) -> MaskArrays:
        visible = scores[:, None, None, :]
        if operator.is_causal and operator.q_len > 1:
            last = np.arange(operator.q_len)[:, None] + operator.kv_len - operator.q_len
            visible = np.where(np.arange(operator.kv_len) <= last, visible, -np.inf)
        alive = (visible > -np.inf).sum(axis=3)
        _check(counts, alive, operator, "keys that are alive")
        count = _common(counts, call.heads_alive)
        if count is not None and operator.q_len == 1:
            return _even_mask(operator, _top(visible, count))
        return _mask(operator, _ranks(visible) < counts[..., None], call.heads_alive)

    def _values(
        self,
        operator: Operator,
        call: AttentionCall,
        mask: MaskArrays | None,
        counts: Int64[np.ndarray, "batch heads q_len"],
    ) -> MaskArrays:
        shape = (*_rows(operator), operator.kv_len)
        if mask is not None and mask.offsets.size == 2:
            # One row for everybody: every key of it is kept.
            keys, kept = mask.indices.astype(np.int64), None
            _check(counts, np.array(keys.size), operator, "keys that are kept")
        else:
            kept = _kept(operator, call, mask)
            keys = np.flatnonzero(kept.any(axis=(0, 1, 2)))
            kept = np.broadcast_to(kept, shape)[..., keys]
            _check(counts, kept.sum(axis=3), operator, "keys that are kept")
        scores = self.model.values(self.rng, operator, keys)
        if kept is not None:
            scores = np.where(kept, scores, -np.inf)
        count = _common(counts, call.heads_alive)
        if count is not None and kept is None:
            return _even_mask(operator, keys[_top(scores, count)])
        keep = np.zeros(shape, np.bool_)
        keep[..., keys] = _ranks(scores) < counts[..., None]
        return _mask(operator, keep, None)


def _rows(operator: Operator) -> tuple[int, int, int]:
    return operator.batch, operator.heads, operator.q_len


def _check(counts: np.ndarray, most: np.ndarray, operator: Operator, what: str) -> None:
    wrong = counts > most
    if wrong.any():
        row = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(
            f"step {operator.step}, layer {operator.layer}, (sequence, head, query) {row}: "
            f"{int(counts[row])} kept of {int(np.broadcast_to(most, counts.shape)[row])} {what}"
        )


def _common(counts: np.ndarray, heads_alive: np.ndarray | None) -> int | None:
    """The count of all rows of heads that are alive, if it is one."""
    found = counts if heads_alive is None else counts[:, heads_alive]
    if not found.size or (found != found.flat[0]).any():
        return None
    return int(found.flat[0])


def _kept(
    operator: Operator, call: AttentionCall, mask: MaskArrays | None
) -> Bool[np.ndarray, "_ _ _ kv_len"]:
    """The kept keys, with 1 where sequences, heads or queries share them."""
    if mask is not None:
        kept = mask.to_bool()
        return kept.repeat(operator.heads // kept.shape[1], axis=1)
    if call.tokens_alive is not None:
        return call.tokens_alive[:, None, None, :]
    return np.full((1, 1, 1, operator.kv_len), True)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the largest scores along the last axis, ascending."""
    size = scores.shape[-1]
    if count == size:
        return np.broadcast_to(np.arange(size), scores.shape)
    found = np.argpartition(scores, size - count - 1, axis=-1)[..., size - count :]
    return np.sort(found, axis=-1)


def _even_mask(operator: Operator, keys: Int64[np.ndarray, "_ _ _ count"]) -> MaskArrays:
    """A mask of rows of one length."""
    batch, heads, q_len, count = keys.shape
    rows = np.arange(batch * heads)[:, None] * q_len + np.arange(q_len + 1)
    offsets = (rows * count).astype(np.int64).reshape(batch, heads, q_len + 1)
    indices = keys.reshape(-1).astype(np.int32)
    return MaskArrays(indices, offsets, (1, 1), q_len, operator.kv_len, operator.is_causal)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """The place of each entry along the last axis, the largest being 0; ties in order."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[-1])[(None,) * (order.ndim - 1)], -1)
    return ranks


def _mask(
    operator: Operator, keep: Bool[np.ndarray, "batch heads q_len kv_len"], heads_alive: object
) -> MaskArrays:
    """A mask; heads that are dead anyway take the rows of those alive, so that one can do."""
    alive = np.arange(operator.heads)
    if isinstance(heads_alive, np.ndarray):
        alive = np.flatnonzero(heads_alive)
    if alive.size and (keep[:, alive] == keep[:, alive[:1]]).all():
        keep = keep[:, alive[:1]]
    counts = np.count_nonzero(keep, axis=3)
    ends = np.cumsum(counts).reshape(counts.shape)
    offsets = np.zeros((*counts.shape[:2], counts.shape[2] + 1), np.int64)
    offsets[:, :, 1:] = ends
    offsets[:, :, 0] = ends[:, :, 0] - counts[:, :, 0]
    flat = np.flatnonzero(keep)
    indices = (flat % operator.kv_len).astype(np.int32)
    return MaskArrays(indices, offsets, (1, 1), operator.q_len, operator.kv_len, operator.is_causal)
