"""A trained gate on pooled blocks: SeerAttention's way to choose blocks of keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad

from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, AttentionShape
from sparseloom.methods.gate_state import GateState
from sparseloom.methods.grid import Grid, keeps_all
from sparseloom.methods.learned import (
    Comparison,
    MethodShape,
    Predicting,
    allowed_rows,
    layer_weights,
    load_weights,
    read_sizes,
    true_scores,
)
from sparseloom.methods.rotary import Rotary, rotate, spread_frequencies, turn_back
from sparseloom.methods.selection import block_threshold_mask, block_topk_mask
from sparseloom.methods.settings import check_at_least, check_block_size, check_sparsity

_SIZES = ("layers", "heads", "kv_heads", "head_dim", "width")


@dataclass(frozen=True)
class AttentionGate(Predicting):
    """The gate of SeerAttention (Gao et al., 2024, §3): blocks of keys by their pooled contents.

    Queries are averaged over each block of queries; of the keys of each block the largest, the
    smallest and the mean of every column are taken.  One matrix per head brings each to `width`
    columns, which are rotated at the positions of the blocks' first tokens; the products are the
    scores of the blocks.  Queries and keys enter as they were before the model's own rotation.
    The gates alone learn, from KL(true attention ‖ softmax of the scores), where the true
    attention of a block is the largest of its pairs.

    In causal models the block on the diagonal is always kept.  Blocks of queries begin at the
    first query of a call, blocks of keys at key 0; a block that is not full yet is pooled over
    the tokens that it has.

    Other than published: positions may be rotated at a selection of the model's frequencies,
    where `width` is not the width of a head; and the pooled map's rows are scaled to sum to one.

    Args:
        sparsity: share of the allowed keys to drop per block of queries, in [0, 1).
        threshold: instead of `sparsity`, the share of a row's softmax from which on a block is
            kept, in (0, 1) (0.0005 to 0.005 there).
        block_size: (queries, keys) of a block; (1, 64) asks for every query anew.
        width: columns of the gate, even (128 there).
        minimum_keys: keys that a query keeps at least, with `sparsity`.
        gate: the trained weights.
    """

    name: ClassVar[str] = "gate"
    owns_cache_state: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = ("kl",)

    sparsity: float = 0.9
    threshold: float | None = None
    block_size: tuple[int, int] = (64, 64)
    width: int = 128
    minimum_keys: int = 16
    gate: Gate | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        check_block_size(self.block_size)
        check_at_least("width", self.width, 2)
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        check_at_least("minimum_keys", self.minimum_keys, 1)
        if self.gate is not None and self.gate.sizes()["width"] != self.width:
            raise ValueError(
                f"width must be {self.gate.sizes()['width']}, what the gate was made with, "
                f"got {self.width}"
            )

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The mask of the query heads, from queries and keys; `inputs.past` grows by the call.

        Raises:
            ValueError: no weights, no rotary positions where they are needed, or keys in the cache
                whose positions are unknown.
        """
        with torch.no_grad():
            scores = self._scores(inputs)
        grid = self._grid(inputs)
        if self.threshold is not None:
            return block_threshold_mask(scores, grid, self.threshold)
        return block_topk_mask(scores, grid, sparsity=self.sparsity, minimum_keys=self.minimum_keys)

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether a row that sees all keys may leave a block out."""
        del q_len
        blocks, least = (
            -(-kv_len // self.block_size[1]),
            -(-self.minimum_keys // self.block_size[1]),
        )
        if self.threshold is not None:
            return blocks > 1
        return not keeps_all(blocks, self.sparsity, least)

    def prediction_macs(self, shape: AttentionShape) -> int:
        """Multiply-accumulates: pooled queries and new pooled keys to `width` columns, and `width`
        for each pair of blocks that causality allows."""
        bq, bk = self.block_size
        queries, keys = -(-shape.q_len // bq), -(-min(shape.q_len, shape.kv_len) // bk)
        made = (shape.heads * queries + 3 * shape.kv_heads * keys) * shape.head_dim
        cpu = torch.device("cpu")
        grid = Grid(
            shape.q_len,
            shape.kv_len,
            block_size=self.block_size,
            is_causal=shape.is_causal,
            key_padding=None,
            device=cpu,
        )
        pairs = int(grid.allowed.sum()) * shape.heads
        return shape.batch * (made + pairs) * self.width

    def new_state(self, layer: int) -> GateState:
        """Empty state of one layer's cache."""
        del layer
        return GateState(self.block_size[1])

    @torch.no_grad()
    def remember(self, inputs: AttentionInputs) -> None:
        """Add the call's tokens to `inputs.past`, for calls that run dense."""
        past = _past(inputs)
        if past is not None and self.gate is not None:
            past.append(inputs.query.shape[2], *self._positions(inputs))

    # ------------------------------------------------------------------ weights

    @property
    def module(self) -> Gate | None:
        """The weights of all layers."""
        return self.gate

    def initialise(self, shape: MethodShape, *, seed: int = 0) -> AttentionGate:
        """With fresh weights; rotary where the model is."""
        made = Gate(
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            width=self.width,
            rotary=shape.rotary,
            seed=seed,
        )
        return dataclasses.replace(self, gate=made)

    def sizes(self) -> dict[str, int | bool]:
        """See `Gate.sizes`."""
        if self.gate is None:
            raise ValueError("AttentionGate has no weights whose sizes could be asked for")
        return self.gate.sizes()

    def restore(
        self, sizes: Mapping[str, int | bool | str], state: Mapping[str, Tensor]
    ) -> AttentionGate:
        """With stored weights."""
        made = Gate(**read_sizes(sizes, _SIZES, ("rotary",)))
        load_weights(made, state)
        return dataclasses.replace(self, gate=made.eval())

    def predicted(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows kv_len"]:
        """Scores of the blocks of some pairs, with gradients into the gates."""
        blocks = self._scores(_alone(inputs))[:, :, rows // self.block_size[0]]
        return blocks.repeat_interleave(self.block_size[1], -1)[..., : inputs.key.shape[2]]

    def compare(
        self, inputs: AttentionInputs, rows: Int64[Tensor, " rows"], *, detach: bool
    ) -> Comparison:
        """Pooled true attention, as logarithms, beside the scores of the blocks, for as many whole
        blocks of queries as `rows` would fill; cut off from the model anyway."""
        del detach
        inputs, grid = _alone(inputs), self._grid(inputs)
        bq, bk = self.block_size
        blocks = (rows[::bq] // bq).unique()
        within = (blocks[:, None] * bq + torch.arange(bq, device=rows.device)).flatten()
        within = within[within < grid.q_len]  # the last block may be cut off
        with torch.no_grad():
            may = allowed_rows(inputs, within)
            if inputs.query_padding is not None:
                may = may & inputs.query_padding[:, None, within, None]
            true = true_scores(inputs, within)
            lowest = torch.finfo(torch.float32).min
            share = true.masked_fill(~may, lowest).softmax(-1) * may
            share = pad(share, (0, -grid.kv_len % bk, 0, -len(within) % bq))
            share = share.unflatten(-1, (-1, bk)).unflatten(2, (-1, bq)).amax((3, 5))
            target = share.clamp(min=torch.finfo(torch.float32).tiny).log()
            allowed = grid.allowed_blocks(0, grid.q_blocks, grid.kv_blocks)[:, :, blocks]
            if inputs.query_padding is not None:  # blocks of padded queries alone
                allowed = allowed & (share.amax((1, 3)) > 0)[:, None, :, None]
        return Comparison(target, self._scores(inputs)[:, :, blocks], allowed)

    # ------------------------------------------------------------------ private

    def _grid(self, inputs: AttentionInputs) -> Grid:
        return Grid(
            inputs.query.shape[2],
            inputs.key.shape[2],
            block_size=self.block_size,
            is_causal=inputs.is_causal,
            key_padding=inputs.key_padding,
            device=inputs.query.device,
        )

    def _scores(self, inputs: AttentionInputs) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
        """Scores of all blocks; `inputs.past` grows by the call."""
        bq, bk = self.block_size
        gate, new, past = self._layer(inputs), self._positions(inputs), _past(inputs)
        query, key = inputs.query, inputs.key
        done = None
        positions = new
        if past is not None:
            positions = past.append(query.shape[2], *new)
            done = past.blocks
            if past.length != key.shape[2]:
                raise ValueError(
                    f"past must hold the positions of all earlier tokens: attention has "
                    f"{key.shape[2]} keys in layer {inputs.layer}, the gate {past.length}"
                )
        start = 0 if done is None else done.shape[2] * bk
        tail = tuple(side[:, start:] for side in positions)
        real = None if inputs.key_padding is None else inputs.key_padding[:, start:]
        with torch.autocast(query.device.type, enabled=False):
            low_q = gate.queries(query, _pair(new), inputs.query_padding, bq)
            low_k = gate.keys(key[:, :, start:], _pair(tail), real, bk)
            if past is not None:
                low_k = past.add_blocks(low_k)
            low_k = low_k.repeat_interleave(query.shape[1] // key.shape[1], 1)
            return low_q @ low_k.transpose(-1, -2) / math.sqrt(self.width)

    def _positions(self, inputs: AttentionInputs) -> tuple[Tensor, ...]:
        """cos and sin of the new tokens, one of each sequence; nothing in models without."""
        if not self._layer(inputs).rotary:
            return ()
        if inputs.rotary is None:
            raise ValueError("rotary is missing: this gate undoes the rotation, pass cos and sin")
        batch = inputs.query.shape[0]
        return tuple(side.expand(batch, -1, -1) for side in inputs.rotary)

    def _layer(self, inputs: AttentionInputs) -> LayerGate:
        layers = None if self.gate is None else self.gate.layers
        return layer_weights(layers, inputs.layer, "AttentionGate")


class LayerGate(nn.Module):
    """The gates of one layer's heads; sizes as in `Gate`."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, width: int, rotary: bool) -> None:
        super().__init__()
        self.head_dim, self.width, self.rotary = head_dim, width, rotary
        unit = 1 / math.sqrt(head_dim)
        self.w_q = nn.Parameter(torch.randn(heads, head_dim, width) * unit)
        self.w_k = nn.Parameter(torch.randn(kv_heads, 3 * head_dim, width) * unit / math.sqrt(3))

    def queries(
        self,
        query: Float[Tensor, "batch heads q_len head_dim"],
        rotary: Rotary | None,
        real: Bool[Tensor, "batch q_len"] | None,
        block: int,
    ) -> Float[Tensor, "batch heads q_blocks width"]:
        """Averaged queries through the gates' matrices, rotated."""
        pooled, first = self._pooled(query, rotary, real, block)
        return self._turn(pooled[2] @ self.w_q, rotary, first)

    def keys(
        self,
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        rotary: Rotary | None,
        real: Bool[Tensor, "batch kv_len"] | None,
        block: int,
    ) -> Float[Tensor, "batch kv_heads kv_blocks width"]:
        """Largest, smallest and mean keys of blocks through the gates' matrices, rotated."""
        pooled, first = self._pooled(key, rotary, real, block)
        return self._turn(torch.cat(pooled, -1) @ self.w_k, rotary, first)

    def _pooled(
        self, states: Tensor, rotary: Rotary | None, real: Tensor | None, block: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Int64[Tensor, "#batch blocks"]]:
        """Largest, smallest and mean of the real tokens of each block (zeros where there are
        none), and the first of these tokens."""
        states = states.float() if rotary is None else turn_back(states, rotary)
        length = states.shape[2]
        there = states.new_ones(1, length, dtype=torch.bool) if real is None else real
        there = pad(there, (0, -length % block)).unflatten(-1, (-1, block))  # (B or 1, n, block)
        states = pad(states, (0, 0, 0, -length % block)).unflatten(2, (-1, block))
        count = there.sum(-1).clamp(min=1)[:, None, :, None]
        out = ~there[:, None, :, :, None]
        mean = states.masked_fill(out, 0.0).sum(3) / count
        filled = there.any(-1)[:, None, :, None]
        most = states.masked_fill(out, -torch.inf).amax(3).where(filled, 0.0)
        least = states.masked_fill(out, torch.inf).amin(3).where(filled, 0.0)
        start = torch.arange(there.shape[1], device=states.device) * block
        return (most, least, mean), start + there.long().argmax(-1)

    def _turn(self, low: Tensor, rotary: Rotary | None, first: Tensor) -> Tensor:
        """Rotated at the positions of the tokens `first`."""
        if rotary is None:
            return low
        place = first.expand(len(low), -1)[..., None]
        cos, sin = (
            side.gather(1, place.expand(-1, -1, side.shape[-1])).unsqueeze(1) for side in rotary
        )
        return rotate(low, (cos, sin), spread_frequencies(rotary[0], self.width, self.head_dim))


class Gate(nn.Module):
    """One `LayerGate` per layer of a model.

    Args:
        layers, heads, kv_heads, head_dim, rotary: of the model.
        width: columns of the gates.
        seed: draws the weights.
    """

    layers: Sequence[LayerGate]

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        width: int,
        rotary: bool,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._sizes = (layers, heads, kv_heads, head_dim, width)
        self.rotary = rotary
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = [LayerGate(*self._sizes[1:], rotary) for _ in range(layers)]
        self.layers = cast("Sequence[LayerGate]", nn.ModuleList(made))

    def sizes(self) -> dict[str, int | bool]:
        """The sizes that an equal module is made with."""
        return {**dict(zip(_SIZES, self._sizes, strict=True)), "rotary": self.rotary}


def _alone(inputs: AttentionInputs) -> AttentionInputs:
    """The call with queries and keys in fp32, cut off from the model and from its past."""
    query, key = inputs.query.detach().float(), inputs.key.detach().float()
    return dataclasses.replace(inputs, query=query, key=key, past=None)


def _pair(sides: tuple[Tensor, ...]) -> Rotary | None:
    return (sides[0], sides[1]) if sides else None


def _past(inputs: AttentionInputs) -> GateState | None:
    if inputs.past is None or isinstance(inputs.past, GateState):
        return inputs.past
    raise TypeError(f"past must be GateState, got {type(inputs.past).__name__}")
