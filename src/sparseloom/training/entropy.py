"""Entropy-aware fine-tuning: attention that needs few keys, and the same ones for every input.

That fine-tuning is made aware of entropy is from Dai et al. (DAC 2023); the paper's abstract names
no loss, so the terms, their weights and their schedule are ours.  With p a row of probabilities,
H(p) = -Σ p ln p and p̄ the mean of the row over inputs:

    L = L_task + λ · mean max(0, Ĥ - Ĥ*) + μ · mean I / ln n,    Ĥ = H / ln n,

where I = H(p̄) - E H(p) = E KL(p ‖ p̄) is the mutual information between input and attended key.
The first term makes rows sharp: the mass beyond the k largest is at most H / ln(k + 1).  A static
mask keeps keys of p̄ rather than of p, and H(p̄) = E H(p) + I, so the second term keeps sharp rows
from moving with the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.learned import allowed_rows, true_scores

Level = Literal["key", "tile"]

_TINY = torch.finfo(torch.float32).tiny


# ------------------------------------------------------------------ of one row


def row_entropy(p: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """-Σ p ln p in nats, 0·ln 0 = 0.  Through a softmax ∂H/∂s_j = -p_j (ln p_j + H)."""
    return -(p * p.clamp(min=_TINY).log()).sum(-1)


def effective_keys(p: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """exp(H): the number of keys that a uniform row of the same entropy has."""
    return row_entropy(p).exp()


def tail_bound(entropy: float, kept: int) -> float:
    """H / ln(k + 1), which the mass beyond the k largest probabilities never exceeds.

    Of every probability beyond rank k, -ln p ≥ ln(k + 1), because p ≤ 1/(k + 1).

    Raises:
        ValueError: `kept` is below 1.
    """
    if kept < 1:
        raise ValueError(f"kept must be at least 1, got {kept}")
    return entropy / math.log(kept + 1)


def divergence(
    p: Float[Tensor, "*rows keys"], mean: Float[Tensor, "*mean_rows keys"]
) -> Float[Tensor, "*rows"]:
    """KL(p ‖ mean) in nats, at least 0.  Its mean over inputs is I where `mean` is theirs."""
    logs = p.clamp(min=_TINY).log() - mean.clamp(min=_TINY).log()
    return (p * logs).sum(-1)


def in_tiles(p: Float[Tensor, "*rows keys"], tile: int) -> Float[Tensor, "*rows tiles"]:
    """Mass of each stretch of `tile` keys."""
    short = -p.shape[-1] % tile
    return nn.functional.pad(p, (0, short)).unflatten(-1, (-1, tile)).sum(-1)


def entropy_target(density: float, keys: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Ĥ* = ½ · ln(density · n) / ln n: half the logarithm of what the budget keeps.

    No row is asked to be sharper than that, which keeps heads from collapsing.

    Args:
        density: share of the keys (or tiles) that the mask will keep.
        keys: n, allowed keys (or tiles) of each row.
    """
    kept = (density * keys).clamp(min=1.0)
    return 0.5 * kept.log() / keys.clamp(min=2.0).log()


# ------------------------------------------------------------------ when


@dataclass(frozen=True, slots=True)
class EntropySettings:
    """Weights of the terms and when they apply.

    Attributes:
        entropy_weight: λ at its highest; positive weights lower the entropy.
        mutual_weight: μ at its highest.
        density: budget of the mask that is to come; sets the target Ĥ*.
        off: share of the steps without either term.
        ramp: share of the steps after that over which both rise linearly.
        after_freeze: share of λ that stays once the mask is frozen; μ is 0 then.
        level: probabilities of `"key"`s, or of `"tile"`s of `tile` keys, so that mass gathers in
            tiles rather than in scattered keys.
        tile: keys per tile.
        decay: of the running mean p̄.
        query_rows: rows drawn per step, the same for all sequences and layers; None takes all.
        teacher_weight: γ, weight of KL(teacher ‖ model) of the logits, where there is a teacher.
    """

    entropy_weight: float = 0.03
    mutual_weight: float = 0.03
    density: float = 0.4
    off: float = 0.1
    ramp: float = 0.4
    after_freeze: float = 0.1
    level: Level = "key"
    tile: int = 32
    decay: float = 0.9
    query_rows: int | None = 64
    teacher_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.off < 0 or self.ramp < 0 or self.off + self.ramp > 1:
            raise ValueError(
                f"off and ramp must be shares of the steps, got {self.off} and {self.ramp}"
            )
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.level not in get_args(Level):
            raise ValueError(f"level must be 'key' or 'tile', got {self.level!r}")
        for name in ("tile", "query_rows"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

    def weights(self, step: int, steps: int, *, frozen: bool = False) -> tuple[float, float]:
        """(λ, μ) of a step of `steps`: off, rising, held; small and 0 once the mask is frozen."""
        if frozen:
            return self.after_freeze * self.entropy_weight, 0.0
        done = step / max(steps, 1) - self.off
        share = min(1.0, max(0.0, done / self.ramp)) if self.ramp else float(done >= 0)
        return share * self.entropy_weight, share * self.mutual_weight


# ------------------------------------------------------------------ the loss


class RunningMean(nn.Module):
    """p̄ of each layer: the mean over a batch, then over batches with `decay`.

    What came before is held constant; the batch at hand carries gradients.  Rows are told apart by
    their position, so batches of different lengths and drawn rows fit together.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._means: dict[str, Tensor] = {}  # layer → (heads, positions, columns)
        self._seen: dict[str, Tensor] = {}  # layer → (positions,)

    def update(
        self,
        layer: int,
        rows: Tensor,
        p: Float[Tensor, "batch heads rows columns"],
        alive: Bool[Tensor, "batch rows"],
    ) -> Float[Tensor, "heads rows columns"]:
        """Take in a batch, and the mean with it; rows that are padding everywhere stay as is."""
        count = alive.sum(0)  # (R,)
        weight = alive[:, None, :, None].to(p.dtype)
        new = (p * weight).sum(0) / count.clamp(min=1)[None, :, None]
        old, seen = self._room(layer, int(rows[-1]) + 1, new)
        share = torch.where(seen[rows], 1.0 - self.decay, 1.0) * (count > 0)
        before = old[:, rows, : new.shape[-1]]
        mean = before + share[None, :, None] * (new - before)
        with torch.no_grad():
            # a shorter batch moves mass away from the columns that it does not have
            old[:, rows] *= (1.0 - share)[None, :, None]
            old[:, rows, : new.shape[-1]] += share[None, :, None] * new
            seen[rows] |= count > 0
        return mean

    def get_extra_state(self) -> dict[str, dict[str, Tensor]]:
        """For checkpoints."""
        return {"means": dict(self._means), "seen": dict(self._seen)}

    def set_extra_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """From a checkpoint."""
        self._means = {name: mean.clone() for name, mean in state["means"].items()}
        self._seen = {name: seen.clone() for name, seen in state["seen"].items()}

    def _room(self, layer: int, positions: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's mean with room for these positions and columns."""
        name, columns = str(layer), new.shape[-1]
        old = self._means.get(name)
        if old is None:
            old, seen = new.new_zeros(len(new), 0, 0), new.new_zeros(0, dtype=torch.bool)
        else:
            old, seen = old.to(new.device), self._seen[name].to(new.device)
        down, right = max(0, positions - old.shape[1]), max(0, columns - old.shape[2])
        if down or right or name not in self._means:
            old = nn.functional.pad(old.detach(), (0, right, 0, down))
            seen = nn.functional.pad(seen, (0, down))
        self._means[name], self._seen[name] = old, seen
        return old, seen


class EntropyLoss(nn.Module):
    """The two terms on the attention calls of a forward pass, with their running mean.

    Args:
        settings: weights and schedule.
        frozen: whether the mask is frozen: entropy is then that of the kept keys, with the small
            weight, and there is no second term.
        teacher: a model whose logits the third term holds ours to, in evaluation mode.
        seed: of the rows drawn.
    """

    def __init__(
        self,
        settings: EntropySettings,
        *,
        frozen: bool = False,
        teacher: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.frozen = frozen
        self.seed = seed
        self.mean = RunningMean(settings.decay)
        self._teacher = [] if teacher is None else [teacher.eval()]  # a list: not a submodule

    def forward(
        self,
        calls: list[tuple[AttentionInputs, SparseMask | None]],
        *,
        step: int,
        steps: int,
        outputs: Any = None,
        batch: Any = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the terms, and each term as it is.

        Args:
            calls: inputs and masks of the attention calls of one pass, by layer.
            step, steps: where in the schedule.
            outputs, batch: of the pass, for the teacher's term.
        """
        first = calls[0][0]
        weights = self.settings.weights(step, steps, frozen=self.frozen)
        rows = self._rows(first.query.shape[2], step).to(first.query.device)
        with torch.autocast(first.query.device.type, enabled=False):
            parts = [self._layer(call, mask, rows) for call, mask in calls]
        entropy, excess, mutual = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        total = weights[0] * excess + weights[1] * mutual
        values = {"entropy": entropy.item(), "mutual": mutual.item()}
        if self._teacher and self.settings.teacher_weight:
            with torch.no_grad():
                wanted = self._teacher[0](**{k: v for k, v in batch.items() if k != "labels"})
            apart = teacher_divergence(outputs.logits, wanted.logits)
            total = total + self.settings.teacher_weight * apart
            values["teacher"] = apart.item()
        return total, values

    def _rows(self, q_len: int, step: int) -> Tensor:
        """The query rows of a step, ascending; drawn from (seed, step), so a resumed run agrees."""
        count = self.settings.query_rows
        if count is None or count >= q_len:
            return torch.arange(q_len)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randperm(q_len, generator=generator)[:count].sort().values

    def _layer(
        self, call: AttentionInputs, mask: SparseMask | None, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean Ĥ, mean excess over the target, and mean I / ln n, over heads and real rows."""
        settings = self.settings
        p, columns, alive = probabilities(call, rows, mask)
        if settings.level == "tile":
            p = in_tiles(p, settings.tile)
            columns = in_tiles(columns.float(), settings.tile) > 0
        n = columns.sum(-1).to(p.dtype)  # (B or 1, 1 or H, R)
        log_n = n.clamp(min=2.0).log()
        weight = alive[:, None].to(p.dtype).expand(p.shape[:3])  # (B, H, R)
        total = weight.sum().clamp(min=1.0)

        def mean(values: Tensor) -> Tensor:
            return (values * weight).sum() / total

        share = row_entropy(p) / log_n
        excess = (share - entropy_target(settings.density, n)).clamp(min=0.0)
        if self.frozen:
            return mean(share), mean(excess), mean(share) * 0.0
        average = self.mean.update(call.layer, rows, p, alive)
        return mean(share), mean(excess), mean(divergence(p, average) / log_n)


def probabilities(
    call: AttentionInputs, rows: Tensor, mask: SparseMask | None = None
) -> tuple[
    Float[Tensor, "batch heads rows kv_len"],
    Bool[Tensor, "#batch #heads rows kv_len"],
    Bool[Tensor, "batch rows"],
]:
    """Attention probabilities of some query rows in fp32, with gradients.

    Args:
        call: the attention call.
        rows: query rows, ascending.
        mask: what is kept; None for all.

    Returns:
        Probabilities; which keys each row may attend to (and keeps); which rows are no padding and
        have a key.
    """
    allowed = allowed_rows(call, rows)
    if mask is not None:
        kept = mask.to_bool().to(rows.device)[:, :, rows]
        allowed = allowed & kept.repeat_interleave(
            1 if mask.heads == 1 else call.query.shape[1] // mask.heads, dim=1
        )
    scores = true_scores(_in_fp32(call), rows)
    # Finite, so that a row without a key gives no NaN; its probabilities are then set to zero.
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, -1).masked_fill(~allowed, 0.0)
    batch = call.query.shape[0]
    alive = allowed.any(-1).any(1).expand(batch, -1)
    if (real := call.query_padding) is not None:
        alive = alive & real[:, rows]
    return p, allowed, alive


def teacher_divergence(
    logits: Float[Tensor, "*items classes"], teacher: Float[Tensor, "*items classes"]
) -> Float[Tensor, ""]:
    """Mean over items of KL(teacher ‖ ours) in nats."""
    ours, theirs = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


def _in_fp32(call: AttentionInputs) -> AttentionInputs:
    if call.query.dtype == torch.float32 and call.key.dtype == torch.float32:
        return call
    return AttentionInputs(
        query=call.query.float(),
        key=call.key.float(),
        layer=call.layer,
        is_causal=call.is_causal,
        scale=call.scale,
        key_padding=call.key_padding,
    )
