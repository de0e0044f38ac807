"""ELSA's candidates: keys whose hash says that they are long and point where the query does.

Ham et al.: ELSA, ISCA 2021, §III.  The arithmetic of the hashes is in `sparseloom.hashing`, which
the simulated accelerator uses, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparseloom.hashing import Form, angle_bias, cosine_table, make_hasher
from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, AttentionShape, Calibrated, Method, Selector
from sparseloom.methods.learned import allowed_rows, true_scores
from sparseloom.methods.selection import Scores, budgets, threshold_mask
from sparseloom.methods.settings import check_choice
from sparseloom.methods.thresholds import CALIBRATION_ROWS

Granularity = Literal["layer", "head"]


@dataclass(frozen=True)
class Elsa(Calibrated, Selector):
    """Keeps the keys y of a query with ‖K_y‖ · cos(θ_y) > t · ‖K_max‖ (ELSA, §III-D).

    θ_y is the angle that the hashes of query and key say, K_max the longest key that the query
    may see.  Nothing is trained: the threshold t of a layer is read off sample text by
    `sl.calibrate`, with one knob p.  For each query it takes the least of the keys whose
    probability exceeds p / n (the best key where none does), n being how many it may see, and
    averages that key's q·k / (‖q‖ · ‖K_max‖).  With a `retention`, t lets that share of the pairs
    through instead: of the sample text if calibrated, else of each call and head.

    Ours, not published: a query also keeps the key that ranks best, and itself in causal models,
    so that no row is empty; K_max is the longest key so far in causal models, so that no later
    token has a say.  Vectors whose length is not a power of two from 64 on are filled up with
    zeros, as the accelerator does.

    Args:
        p: of the thresholds; larger leaves out more, 0 keeps everything.  The paper's: 0.5, 1
            (below 40 % kept), 2 (about 26 % kept), 4.
        retention: share of pairs to keep, in (0, 1]; instead of `p`.
        thresholds: t per layer, one number or one per head.
        granularity: whether `calibrate` takes one threshold per `"layer"` or per `"head"`.
        form: of the hash: `"kronecker"`, three small factors, or `"orthogonal"`, one matrix.
        bits: of a hash; None: 64 for head_dim up to 64, 128 up to 128 …, or head_dim if
            orthogonal.
        seed: of the hash's directions.
    """

    name: ClassVar[str] = "elsa"

    p: float = 1.0
    retention: float | None = None
    thresholds: tuple[tuple[float, ...], ...] | None = None
    granularity: Granularity = "layer"
    form: Form = "kronecker"
    bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.p < math.inf:
            raise ValueError(f"p must be a number of at least 0, got {self.p}")
        if self.retention is not None and not 0.0 < self.retention <= 1.0:
            raise ValueError(f"retention must be in (0, 1], got {self.retention}")
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("form", self.form, get_args(Form))
        if self.thresholds is not None and not all(self.thresholds):
            raise ValueError("thresholds must hold one number per layer or one per head of it")

    @property
    def keeps_all(self) -> bool:
        """Whether the settings say that nothing is left out."""
        return self.p == 0.0 if self.retention is None else self.retention == 1.0

    @property
    def needs_calibration(self) -> bool:
        """Whether there is neither a threshold nor a retention."""
        return self.thresholds is None and self.retention is None and not self.keeps_all

    def is_calibrated_from(self, method: Method) -> bool:
        """Whether all but the thresholds are those of `method`, and nothing is missing."""
        if not isinstance(method, Elsa) or self.needs_calibration:
            return False
        return dataclasses.replace(self, thresholds=method.thresholds) == method

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The mask of the query heads; queries and keys are all that is looked at.

        Raises:
            ValueError: no thresholds of this layer, or not as many as there are heads.
        """
        similarity = _Similarity(self, inputs)
        level = self._level(similarity, inputs)  # (B or 1, H)
        shift = level[..., None, None].to(inputs.query.device)

        def above(start: int, stop: int, keys: int) -> Tensor:
            return similarity.of(torch.arange(start, stop, device=shift.device), keys) - shift

        batch, heads, q_len, _ = inputs.query.shape
        scores = Scores(batch, heads, q_len, inputs.key.shape[2], inputs.query.device, above)
        return threshold_mask(
            scores,
            0.0,
            strict=True,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
        )

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether the settings leave anything out, and there is more than one key."""
        return q_len > 0 and kv_len > 1 and not self.keeps_all

    def prediction_macs(self, shape: AttentionShape) -> int:
        """The hashes of all queries and keys, the keys' norms, and a product per allowed pair."""
        hasher = make_hasher(shape.head_dim, self.bits, form=self.form, seed=self.seed)
        vectors = shape.heads * shape.q_len + shape.kv_heads * shape.kv_len
        norms = shape.kv_heads * shape.kv_len * shape.head_dim
        pairs = shape.heads * shape.allowed_pairs
        return shape.batch * (vectors * hasher.multiplications + norms + pairs)

    @torch.no_grad()
    def calibrate(self, calls: Iterable[AttentionInputs]) -> Elsa:
        """A copy with the thresholds of every layer, from up to 256 evenly spaced queries a call.

        Args:
            calls: attention calls of the dense model without a cache, of every layer.

        Raises:
            ValueError: a layer is not among the calls.
        """
        if self.keeps_all:
            return dataclasses.replace(self, thresholds=None)
        found: dict[int, list[Tensor]] = {}
        for inputs in calls:
            found.setdefault(inputs.layer, []).append(self._samples(inputs))
        missing = [layer for layer in range(max(found, default=0)) if layer not in found]
        if missing or not found:
            raise ValueError(f"calls must hold every layer, got none of {missing or 'them'}")
        levels: list[tuple[float, ...]] = []
        for layer in sorted(found):
            samples = torch.cat(found[layer], -1)  # (heads, n)
            samples = samples.flatten()[None] if self.granularity == "layer" else samples
            kept = samples.mean(-1) if self.retention is None else _top(samples, self.retention)
            levels.append(tuple(kept.tolist()))
        return dataclasses.replace(self, thresholds=tuple(levels))

    def _samples(self, inputs: AttentionInputs) -> Float[Tensor, "heads n"]:
        """What thresholds are made of: of a query what it takes, or all of its similarities."""
        rows, real = _sampled_rows(inputs)
        if self.retention is None:
            return torch.cat(
                [_least_relevant(inputs, self.p, rows, real, b) for b in range(len(real))], -1
            )
        return torch.cat(_Similarity(self, inputs).visible(rows, real), -1)

    def _level(
        self, similarity: _Similarity, inputs: AttentionInputs
    ) -> Float[Tensor, "#batch #heads"]:
        """t of the call's sequences and heads."""
        if self.keeps_all:
            return torch.full((1, 1), -torch.inf)
        if self.thresholds is None:
            if self.retention is None:
                raise ValueError(
                    f"thresholds are missing for {self}: run sl.calibrate(model, method, batches) "
                    "or `sparseloom adapt` first, or give a retention"
                )
            seen = similarity.visible(*_sampled_rows(inputs))
            return torch.stack([_top(one, self.retention) for one in seen])
        if inputs.layer >= len(self.thresholds):
            raise ValueError(
                f"layer must be below {len(self.thresholds)}, the layers of the thresholds, got "
                f"{inputs.layer}"
            )
        level = self.thresholds[inputs.layer]
        if len(level) not in (1, inputs.query.shape[1]):
            raise ValueError(
                f"thresholds must hold 1 or {inputs.query.shape[1]} heads, got {len(level)}"
            )
        return torch.tensor(level)[None]


class _Similarity:
    """‖K_y‖ · cos(θ_y) / ‖K_max‖ of one call's queries and keys."""

    def __init__(self, method: Elsa, inputs: AttentionInputs) -> None:
        head_dim = inputs.query.shape[-1]
        hasher = make_hasher(head_dim, method.bits, form=method.form, seed=method.seed)
        bias = angle_bias(head_dim, method.bits, form=method.form)
        device = inputs.query.device
        self._bits = hasher.bits
        self._inputs = inputs
        self._cosines = torch.from_numpy(cosine_table(hasher.bits, bias)).float().to(device)
        directions = torch.from_numpy(hasher.matrix.T.copy()).float().to(device)
        kv_heads = inputs.key.shape[1]
        key = inputs.key.detach().float()
        with torch.autocast(device.type, enabled=False):
            query = _signs(inputs.query.detach().float() @ directions)
            self._keys = _signs(key @ directions).transpose(-1, -2)  # (B, Hkv, k, S)
        self._queries = query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))
        self._norms = key.norm(dim=-1)  # (B, Hkv, S)
        norms = self._norms
        if inputs.key_padding is not None:
            norms = norms * inputs.key_padding[:, None].to(device)
        # The longest key so far; a row of zeros must not divide by zero.
        self._largest = norms.cummax(-1).values.clamp(min=torch.finfo(torch.float32).tiny)

    def of(self, rows: Int64[Tensor, " rows"], keys: int) -> Float[Tensor, "batch heads rows keys"]:
        """Of some queries against the first `keys` keys."""
        batch, heads, q_len, _ = self._inputs.query.shape
        kv_heads, kv_len = self._norms.shape[1:]
        last = torch.full_like(rows, kv_len - 1)
        if self._inputs.is_causal:
            last = (rows + (kv_len - q_len)).clamp(min=0)
        some = self._queries[:, :, :, rows].flatten(2, 3)  # (B, Hkv, G * R, k)
        with torch.autocast(rows.device.type, enabled=False):
            equal = some @ self._keys[..., :keys]  # equal bits less different ones
        cosines = self._cosines[((self._bits - equal) / 2).round_().long()]
        cosines = cosines.mul_(self._norms[:, :, None, :keys])
        found = cosines.view(batch, kv_heads, heads // kv_heads, len(rows), keys)
        return found.div_(self._largest[:, :, None, last, None]).flatten(1, 2)

    def visible(
        self, rows: Int64[Tensor, " rows"], real: Bool[Tensor, "batch rows"]
    ) -> list[Float[Tensor, "heads _"]]:
        """Of every sequence: what its real queries among `rows` see."""
        found = self.of(rows, self._norms.shape[-1])  # (B, H, R, S)
        allowed = allowed_rows(self._inputs, rows)[:, 0].expand(len(found), -1, -1)
        allowed = allowed & real[..., None]
        return [one[:, may] for one, may in zip(found, allowed, strict=True)]


def _signs(products: Tensor) -> Tensor:
    """1 where a product is 0 or more, else -1."""
    return (products >= 0).float().mul_(2.0).sub_(1.0)


def _sampled_rows(
    inputs: AttentionInputs,
) -> tuple[Int64[Tensor, " rows"], Bool[Tensor, "batch rows"]]:
    """Evenly spaced queries that see a key, and which of them are no padding."""
    batch, _, q_len, _ = inputs.query.shape
    step = -(-q_len // CALIBRATION_ROWS)
    rows = torch.arange(step - 1, q_len, step, device=inputs.query.device)
    allowed = allowed_rows(inputs, rows).any(-1)[:, 0].expand(batch, -1)
    padding = inputs.query_padding
    return rows, allowed if padding is None else allowed & padding.to(rows.device)[:, rows]


def _least_relevant(
    inputs: AttentionInputs,
    p: float,
    rows: Int64[Tensor, " rows"],
    real: Bool[Tensor, "batch rows"],
    sequence: int,
) -> Float[Tensor, "heads n"]:
    """q·k / (‖q‖ · ‖K_max‖) of the least probable key above p / n, for each real query."""
    one = slice(sequence, sequence + 1)
    rows = rows[real[sequence]]
    call = dataclasses.replace(
        inputs,
        query=inputs.query[one].float(),
        key=inputs.key[one].float(),
        value=None,
        key_padding=None if inputs.key_padding is None else inputs.key_padding[one],
        hidden_states=None,
        rotary=None,
        past=None,
    )
    allowed = allowed_rows(call, rows)  # (1, 1, R, S)
    scores = true_scores(call, rows)  # (1, H, R, S)
    probability = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    relevant = (probability > p / allowed.sum(-1, keepdim=True)) & allowed
    least = probability.masked_fill(~relevant, torch.inf)
    best = probability.masked_fill(~allowed, -1.0).argmax(-1)
    chosen = torch.where(relevant.any(-1), least.argmin(-1), best)
    score = scores.gather(-1, chosen[..., None])[0, ..., 0] / inputs.scale  # (H, R)
    norms = call.key.norm(dim=-1)[0, :, None].masked_fill(~allowed[0], 0.0)  # (Hkv, R, S)
    longest = norms.amax(-1).repeat_interleave(len(score) // len(norms), 0)
    sizes = call.query[0, :, rows].norm(dim=-1) * longest
    return score / sizes.clamp(min=torch.finfo(torch.float32).tiny)


def _top(samples: Float[Tensor, "heads n"], share: float) -> Float[Tensor, " heads"]:
    """Just below what the largest `share` of each row reach."""
    count = samples.shape[-1]
    if not count:
        return samples.new_zeros(len(samples))
    keep = int(budgets(torch.tensor(count), 1.0 - share, 1))
    kth = samples.kthvalue(count - keep + 1, dim=-1).values
    return torch.nextafter(kth, torch.full_like(kth, -torch.inf))
