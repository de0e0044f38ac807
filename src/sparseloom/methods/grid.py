"""Which key blocks each query block may keep, must keep, and how many."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


def budgets(
    allowed: Int64[Tensor, "*rows"], sparsity: float, minimum: int
) -> Int64[Tensor, "*rows"]:
    """max(minimum, ⌈(1 - sparsity) · allowed⌉), but never more than `allowed`.

    Liu et al. keep ⌈r·l⌉ per row (IEEE TC 2022, §3); with causality l is what the row may see,
    and `minimum` keeps short rows whole.  The product is rounded to a millionth first, so that
    1 - 0.95 = 0.05000…04 does not add a key.
    """
    wanted = ((1.0 - sparsity) * allowed.double() - 1e-6).ceil().long()
    return wanted.clamp(min=minimum).minimum(allowed)


def keeps_all(kv_len: int, sparsity: float, minimum_keys: int) -> bool:
    """Whether even the row that sees all `kv_len` keys keeps all of them."""
    return int(budgets(torch.tensor(kv_len), sparsity, minimum_keys)) >= kv_len


@functools.lru_cache(maxsize=256)
def kept_blocks(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    *,
    is_causal: bool,
    sparsity: float,
    minimum_keys: int,
) -> int:
    """Key blocks that one head keeps in all by `topk_mask`, without padding."""
    device = torch.device("cpu")
    grid = Grid(
        q_len, kv_len, block_size=block_size, is_causal=is_causal, key_padding=None, device=device
    )
    return int(grid.budget(sparsity, minimum_keys).sum())


class Grid:
    """The blocks of one attention call: q_blocks rows of kv_blocks key blocks.

    A query block may keep a key block if its last query may attend to a key in it.  In causal
    models it must keep the blocks in which the diagonal of one of its queries lies, unless they
    are padding.  All tensors have batch size 1 where there is no padding.

    Attributes:
        visible: (batch, q_blocks), one past the last key block that may be kept.
        allowed: (batch, q_blocks), how many key blocks may be kept.
        attended: (batch, kv_blocks), False where a key block is all padding; None = no padding.
        diagonal: (q_blocks, 2), first and one past the last key block that must be kept.
        must: (batch, q_blocks), how many must be kept.
    """

    visible: Int64[Tensor, "batch q_blocks"]
    allowed: Int64[Tensor, "batch q_blocks"]
    attended: Bool[Tensor, "batch kv_blocks"] | None
    diagonal: Int64[Tensor, "q_blocks 2"]
    must: Int64[Tensor, "batch q_blocks"]

    def __init__(
        self,
        q_len: int,
        kv_len: int,
        *,
        block_size: tuple[int, int],
        is_causal: bool,
        key_padding: Bool[Tensor, "batch kv_len"] | None,
        device: torch.device,
    ) -> None:
        bq, bk = block_size
        self.q_len, self.kv_len, self.block_size = q_len, kv_len, block_size
        self.q_blocks, self.kv_blocks = -(-q_len // bq), -(-kv_len // bk)
        self.is_causal, self.key_padding, self.device = is_causal, key_padding, device
        first = torch.arange(self.q_blocks, device=device) * bq
        if is_causal:
            keys = (first + bq).clamp(max=q_len) + (kv_len - q_len)
            keys = keys.clamp(min=0)[None]  # (1, q_blocks): visible from the last query
            start = (first + (kv_len - q_len)).clamp(min=0) // bk
            self.diagonal = torch.stack([start, -(-keys[0] // bk)], -1)
        else:
            keys = torch.full((1, self.q_blocks), kv_len, device=device)
            self.diagonal = torch.zeros(self.q_blocks, 2, dtype=torch.int64, device=device)
        self.visible = -(-keys // bk)
        if key_padding is None:
            self.attended = None
            self.allowed = self.visible
            self.must = (self.diagonal[:, 1] - self.diagonal[:, 0]).clamp(min=0)[None]
            return
        before = torch.nn.functional.pad(key_padding.to(device).cumsum(-1), (1, 0))  # (B, S + 1)
        edges = (torch.arange(self.kv_blocks + 1, device=device) * bk).clamp(max=kv_len)
        self.attended = before[:, edges].diff(dim=-1) > 0
        # The last visible block may hold no key that is both visible and attended.
        last = (self.visible[0] - 1).clamp(min=0)
        empty = before[:, keys[0]] == before[:, (last * bk).minimum(keys[0])]
        self.visible = (self.visible - empty.long()).clamp(min=0)
        blocks_before = torch.nn.functional.pad(self.attended.cumsum(-1), (1, 0))
        self.allowed = blocks_before.gather(1, self.visible)
        start, stop = (self.diagonal[:, side][None].minimum(self.visible) for side in (0, 1))
        self.must = blocks_before.gather(1, stop) - blocks_before.gather(1, start)

    def budget(self, sparsity: float, minimum_keys: int) -> Int64[Tensor, "batch q_blocks"]:
        """Key blocks that each query block keeps: `budgets` of the allowed ones, raised to the
        ones that it must keep."""
        least = -(-minimum_keys // self.block_size[1])
        return budgets(self.allowed, sparsity, least).maximum(self.must)

    def shares(
        self, budget: Int64[Tensor, "batch q_blocks"], tile: int
    ) -> Int64[Tensor, "batch q_blocks tiles"]:
        """A budget split over tiles of `tile` key blocks, in proportion to the allowed ones.

        Rounded such that the shares add up to the budget and later tiles get what is left over;
        then a tile's share is raised to the blocks in it that must be kept.
        """
        edges = torch.arange(-(-self.kv_blocks // tile) + 1, device=self.device) * tile
        edges = edges.clamp(max=self.kv_blocks)
        later = self.allowed[..., None] - self._allowed_before(edges)  # from each edge on
        given = -(-budget[..., None] * later // self.allowed.clamp(min=1)[..., None])
        start, stop = self.diagonal[:, None].unbind(-1)
        must = self._allowed_before(edges.clamp(min=start).minimum(stop))
        return (-given.diff(dim=-1)).maximum(must.diff(dim=-1))

    def _allowed_before(self, edges: Tensor) -> Int64[Tensor, "batch q_blocks edges"]:
        """Blocks before some edges, (edges,) or one list for each query block, that may be kept."""
        columns = edges.expand(len(self.visible), self.q_blocks, -1).minimum(
            self.visible[..., None]
        )
        if self.attended is None:
            return columns
        before = torch.nn.functional.pad(self.attended.cumsum(-1), (1, 0))
        return before[:, None].expand(-1, self.q_blocks, -1).gather(2, columns)

    def keys_of(self, stop: int) -> int:
        """Keys that any query before `stop` can see, in whole blocks where there are that many."""
        if not self.is_causal:
            return self.kv_len
        keys = max(0, stop + self.kv_len - self.q_len)
        return min(self.kv_len, -(-keys // self.block_size[1]) * self.block_size[1])

    def allowed_pairs(self, start: int, stop: int, keys: int) -> Bool[Tensor, "batch 1 rows keys"]:
        """Which of the first `keys` keys the queries start … stop - 1 may attend to."""
        diagonal = self.kv_len - self.q_len if self.is_causal else None
        return allowed_pairs(start, stop, keys, diagonal, self.key_padding, self.device)

    def allowed_blocks(self, first: int, last: int, columns: int) -> Bool[Tensor, "batch 1 rows c"]:
        """Which of the first `columns` key blocks the query blocks first … last - 1 may keep."""
        column = torch.arange(columns, device=self.device)
        ok = (column < self.visible[:, first:last, None])[:, None]
        return ok if self.attended is None else ok & self.attended[:, None, None, :columns]

    def diagonal_blocks(self, first: int, last: int, columns: int) -> Bool[Tensor, "1 1 rows c"]:
        """Which of them lie on the diagonal (padding not taken out)."""
        column = torch.arange(columns, device=self.device)
        start, stop = self.diagonal[first:last, :, None].unbind(1)
        return ((column >= start) & (column < stop))[None, None]


def allowed_pairs(
    start: int,
    stop: int,
    keys: int,
    diagonal: int | None,
    key_padding: Bool[Tensor, "batch kv_len"] | None,
    device: torch.device,
) -> Bool[Tensor, "batch 1 rows keys"]:
    """Which of the first `keys` keys the queries start … stop - 1 may attend to.

    `diagonal` is kv_len - q_len in causal models, where query i sees the keys up to i + diagonal,
    and None in the others.
    """
    column = torch.arange(keys, device=device)
    if diagonal is None:
        ok = torch.ones(1, 1, stop - start, keys, dtype=torch.bool, device=device)
    else:
        row = torch.arange(start, stop, device=device) + diagonal
        ok = (column <= row[:, None])[None, None]
    if key_padding is not None:
        ok = ok & key_padding[:, None, None, :keys].to(device)
    return ok
