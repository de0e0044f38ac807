"""``SparseMask`` as the ``BlockMask`` of FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Bool, Int32
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from sparseloom import _mask_pairs
from sparseloom._mask_pairs import KeyPadding

if TYPE_CHECKING:
    import sparseloom.mask

_Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def to_block_mask(
    mask: sparseloom.mask.SparseMask,
    *,
    is_causal: bool,
    key_padding: KeyPadding | None,
    for_eager: bool,
) -> BlockMask:
    """See ``SparseMask.to_block_mask``."""
    if key_padding is not None:
        _mask_pairs.check_key_padding(key_padding, mask.batch, mask.kv_len)
        # A padding mask that hides nothing would only keep the blocks from being full.
        key_padding = None if bool(key_padding.all()) else key_padding.to(mask.device)
    if key_padding is not None and key_padding.shape[0] > mask.batch:
        mask = mask.expand(key_padding.shape[0], mask.heads)
    rows = mask.entry_rows()
    entries = torch.arange(mask.nnz, device=mask.device)
    pairs = _mask_pairs.entry_pairs(
        mask, entries, rows, is_causal=is_causal, key_padding=key_padding
    )
    # Cut-off blocks count as partial, as create_block_mask has it.
    is_full = pairs == mask.block_size[0] * mask.block_size[1]
    grid = (mask.batch, mask.heads, mask.q_blocks, mask.kv_blocks)
    place = rows * mask.kv_blocks + mask.indices

    def dense(entries: Tensor) -> Tensor:
        blocks = torch.zeros(grid, dtype=torch.bool, device=mask.device)
        blocks.view(-1)[place[entries]] = True
        return blocks

    partial, full = dense((pairs > 0) & ~is_full), dense(is_full)
    lists: list[Tensor] = []
    for blocks in (partial, full, partial.mT, full.mT):
        # Each list is a tensor of its own: FlexAttention's CPU code generator fails to compile
        # if kv_indices and full_kv_indices are one tensor.
        lists += _ordered(blocks)
    return BlockMask(
        (mask.q_len, mask.kv_len),
        *lists,
        BLOCK_SIZE=mask.block_size,
        mask_mod=_mask_mod(mask, is_causal, key_padding, partial | full if for_eager else None),
    )


def _ordered(
    blocks: Bool[Tensor, "batch heads rows columns"],
) -> tuple[Int32[Tensor, "batch heads rows"], Int32[Tensor, "batch heads rows columns"]]:
    """Counts and column lists as wide as the grid; 0, a valid block, behind the counts."""
    counts = blocks.sum(-1, dtype=torch.int32)
    lists = torch.zeros(blocks.shape, dtype=torch.int32, device=blocks.device)
    used = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    lists[used] = blocks.reshape(-1, blocks.shape[-1]).nonzero()[:, 1].to(torch.int32)
    return counts, lists


def _mask_mod(
    mask: sparseloom.mask.SparseMask,
    is_causal: bool,
    key_padding: Tensor | None,
    member: Tensor | None,
) -> _Rule:
    """FlexAttention's per-pair rule for partial blocks."""
    # A tensor, not a number: under dynamic lengths the CPU code generator of torch 2.13 mixes up
    # the names of captured numbers and block sizes ("cur_kvSplitSize… was not declared").
    shift = torch.tensor(mask.kv_len - mask.q_len, device=mask.device)
    bq, bk = mask.block_size
    # Shared dimensions are read at 0, written as b * 0 because an index must stay a tensor.
    pad_batch = 0 if key_padding is None or key_padding.shape[0] == 1 else 1
    per_batch, per_head = int(mask.batch > 1), int(mask.heads > 1)
    terms: list[_Rule] = []
    if is_causal and mask.q_len == mask.kv_len:
        terms.append(lambda _b, _h, i, j: j <= i)
    elif is_causal:
        terms.append(lambda _b, _h, i, j: j <= i + shift)
    if key_padding is not None:
        terms.append(lambda b, _h, _i, j: key_padding[b * pad_batch, j])
    if member is not None:
        terms.append(lambda b, h, i, j: member[b * per_batch, h * per_head, i // bq, j // bk])
    if not terms:
        return noop_mask

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = terms[0](b, h, i, j)
        for term in terms[1:]:
            allowed = allowed & term(b, h, i, j)
        return allowed

    return mask_mod
