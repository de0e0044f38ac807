"""Which tokens are kept, where only their number is known (`kept_keys.with_keys` applies these).

Counts say what a machine computes; where the kept vectors lie decides how well a memory delivers
them. The published SpAtten traces hold counts alone, so every result from them names the index
model that stood in:

- `Uniform`: any token is as likely as any other;
- `Clustered`: kept tokens come in runs, more of them at the start and near the newest token;
- `Recorded`: the tokens that survived longest in a recorded selection.

All are cascades: within a step, a call that keeps fewer tokens keeps a subset of those that a call
with more keeps. Values are a subset of the keys, drawn for each head and query alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int64

from sparseloom.trace.schema import Operator, Selection, Workload

Tokens = Float[np.ndarray, "kv_len"]


@dataclass(frozen=True)
class IndexModel(ABC):
    """Scores of tokens; the largest are kept."""

    name: ClassVar[str]

    @abstractmethod
    def tokens(self, rng: np.random.Generator, operator: Operator) -> Tokens:
        """One score per key, shared by the heads and layers of a step."""

    @abstractmethod
    def values(
        self,
        rng: np.random.Generator,
        operator: Operator,
        keys: Int64[np.ndarray, "keys"],
    ) -> Float[np.ndarray, "batch heads q_len keys"]:
        """A score for each of some keys, by sequence, head and query."""

    def settings(self) -> dict[str, object]:
        """Name and parameters, as a result's record needs them."""
        return {"index_model": self.name, **asdict(self)}


@dataclass(frozen=True)
class Uniform(IndexModel):
    """A random sorted subset."""

    name: ClassVar[str] = "uniform"

    def tokens(self, rng: np.random.Generator, operator: Operator) -> Tokens:
        """Independent of the position."""
        return rng.random(operator.kv_len)

    def values(
        self, rng: np.random.Generator, operator: Operator, keys: Int64[np.ndarray, "keys"]
    ) -> Float[np.ndarray, "batch heads q_len keys"]:
        """Independent of the position."""
        return rng.random((*_rows(operator), keys.size))


@dataclass(frozen=True)
class Clustered(IndexModel):
    """Runs of neighbours are kept or dropped together.

    The parameters are choices of this library, not measurements.

    Args:
        run: mean length of a run; lengths are geometric.
        start, recent: how many times likelier than in the middle a run at the first or the newest
            token is to be kept, less 1.
        reach: tokens after which that has fallen to 1/e.
    """

    name: ClassVar[str] = "clustered"
    run: float = 4.0
    start: float = 4.0
    recent: float = 8.0
    reach: float = 32.0

    def __post_init__(self) -> None:
        if self.run < 1 or self.reach <= 0 or min(self.start, self.recent) < 0:
            raise ValueError(
                "run must be at least 1, reach above 0, start and recent at least 0, got "
                f"{self.run}, {self.reach}, {self.start} and {self.recent}"
            )

    def tokens(self, rng: np.random.Generator, operator: Operator) -> Tokens:
        """One score per run of neighbouring tokens."""
        positions = np.arange(operator.kv_len)
        return self._scores(rng, 1, positions, operator.kv_len)[0]

    def values(
        self, rng: np.random.Generator, operator: Operator, keys: Int64[np.ndarray, "keys"]
    ) -> Float[np.ndarray, "batch heads q_len keys"]:
        """Runs of keys that are neighbours among those kept."""
        shape = _rows(operator)
        scores = self._scores(rng, int(np.prod(shape)), keys, operator.kv_len)
        return scores.reshape((*shape, keys.size))

    def _scores(
        self, rng: np.random.Generator, rows: int, positions: np.ndarray, length: int
    ) -> Float[np.ndarray, "rows keys"]:
        near = np.exp(-positions / self.reach) * self.start
        far = np.exp(-(length - 1 - positions) / self.reach) * self.recent
        # Arrival times at a rate of weight each: drawing runs by weight, without replacement.
        size = (rows, positions.size)
        waits = rng.standard_exponential(size) / (1 + near + far)
        opens = rng.random(size, np.float32) < 1 / self.run
        opens[:, :1] = True
        first = np.maximum.accumulate(np.where(opens, np.arange(positions.size), 0), axis=1)
        # Within a run the earlier token goes first; far below any difference between runs.
        waits = np.take_along_axis(waits, first, axis=1) + np.arange(positions.size) * 1e-12
        return -waits


@dataclass(frozen=True)
class Recorded(IndexModel):
    """The tokens that a recorded selection kept for longest.

    A token's score is the number of calls of the recorded step that kept it, for values how many
    of them kept its value in that head; steps repeat when there are too few. Where the recording
    has as many keys and the counts are its own, the ids are too; elsewhere positions are
    stretched to the new length. Ties are broken at random.

    Args:
        workload, selection: a selection with masks.
        name_of: what to call the recording in results.
    """

    name: ClassVar[str] = "recorded"
    workload: Workload
    selection: Selection

    def __post_init__(self) -> None:
        if not any(call.mask is not None for call in self.selection.calls):
            raise ValueError(f"selection {self.selection.name!r} has no masks to take ids from")

    def settings(self) -> dict[str, object]:
        """The recording by name."""
        return {
            "index_model": self.name,
            "workload": self.workload.name,
            "selection": self.selection.name,
        }

    def tokens(self, rng: np.random.Generator, operator: Operator) -> Tokens:
        """Calls of the recorded step that kept the token."""
        kept = self._kept(operator, "mask").sum(axis=0)
        return _stretch(kept, operator.kv_len) + rng.random(operator.kv_len)

    def values(
        self, rng: np.random.Generator, operator: Operator, keys: Int64[np.ndarray, "keys"]
    ) -> Float[np.ndarray, "batch heads q_len keys"]:
        """Calls of the recorded step that kept the value, in the head of the same place."""
        kept = self._kept(operator, "value_mask")
        heads = np.arange(operator.heads) * kept.shape[0] // operator.heads
        scores = _stretch(kept, operator.kv_len)[heads][:, keys]
        shape = (*_rows(operator), keys.size)
        return scores[None, :, None, :] + rng.random(shape)

    def _kept(self, operator: Operator, which: str) -> Float[np.ndarray, "heads keys"]:
        """Calls of the matching step that kept each key, by head; for values its layer decides."""
        pairs = [
            (op, getattr(call, which) or call.mask)
            for op, call in zip(self.workload.attention(), self.selection.calls, strict=True)
        ]
        found = [(op, mask) for op, mask in pairs if mask is not None]
        steps = sorted({op.step for op, _ in found})
        step = steps[operator.step % len(steps)]
        here = [(op, mask) for op, mask in found if op.step == step]
        heads, length = max(op.heads for op, _ in here), max(op.kv_len for op, _ in here)
        kept = np.zeros((heads, length))
        for op, mask in here:
            one = mask.to_bool().any(axis=(0, 2))
            own = one.repeat(op.heads // mask.heads, axis=0).astype(np.float64)
            same = which == "value_mask" and op.layer == operator.layer
            kept[: op.heads, : op.kv_len] += own * (len(here) + 1 if same else 1)
        return kept


def draw_tokens(
    model: IndexModel,
    rng: np.random.Generator,
    operator: Operator,
    *,
    keep_first: bool | None = None,
    keep_last: bool | None = None,
) -> Float[np.ndarray, "batch kv_len"]:
    """Scores for one step, infinite for tokens that are never dropped (see `with_keys`)."""
    scores = np.stack([model.tokens(rng, operator) for _ in range(operator.batch)])
    decode = operator.stage == "decode"
    reads_whole = not decode and not operator.is_causal
    if reads_whole if keep_first is None else keep_first:
        scores[:, 0] = np.inf
    if decode if keep_last is None else keep_last:
        scores[:, -1] = np.inf
    return scores


def _rows(operator: Operator) -> tuple[int, int, int]:
    return operator.batch, operator.heads, operator.q_len


def _stretch(kept: np.ndarray, length: int) -> np.ndarray:
    """The last axis at another length, by the nearest position before."""
    at = np.arange(length) * kept.shape[-1] // length
    return kept[..., at]
