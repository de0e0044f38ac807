"""Radix selection against sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def best(row: Tensor, budget: int) -> list[int]:
    """Places of the largest ranks, ties to the first, ascending."""
    order = sorted(range(len(row)), key=lambda place: (-int(row[place]), place))
    return sorted(order[:budget])


@pytest.mark.parametrize(
    ("bits", "distinct", "parts", "tiles"),
    [(1, 2, 1, 1), (9, 1 << 9, 2, 2), (15, 3, 2, 1), (32, 4, 1, 2), (32, 1 << 32, 2, 1)],
)
def test_the_best_of_each_tile_are_kept(
    bits: int, distinct: int, parts: int, tiles: int, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from sparseloom.kernels.triton import select

    torch.manual_seed(bits + distinct)
    rows, stride = 3, 64
    tile = stride // tiles
    drawn = torch.randint(0, 1 << bits, (rows, stride))
    if distinct < 1 << bits:  # many ties
        drawn = torch.randint(0, 1 << bits, (distinct,))[drawn % distinct]
    ends = torch.tensor([stride, 50, 41])
    budget = torch.randint(1, 9, (rows, tiles))
    budget[1, 0] = 0
    stored = drawn.to(torch.int16 if bits < 16 else torch.int32)
    monkeypatch.setattr(select, "_CHUNK", 16)
    monkeypatch.setattr(select, "_PROGRAMS", parts * rows * tiles)
    case = select.Rows(stored.to(device), ends.int().to(device), tile, tiles, bits)
    levels = select.find_levels(case, budget.reshape(-1).int().to(device))
    starts = budget.flatten().cumsum(0) - budget.flatten()
    out = torch.full((int(budget.sum()),), -1, dtype=torch.int32, device=device)
    select.emit(case, levels, starts.to(device), out)
    expected: list[int] = []
    for r in range(rows):
        for t in range(tiles):
            piece = drawn[r, t * tile : min((t + 1) * tile, int(ends[r]))]
            expected += [t * tile + place for place in best(piece, int(budget[r, t]))]
    assert out.tolist() == expected


def test_the_level_and_the_ties_that_fit(device: torch.device) -> None:
    from sparseloom.kernels.triton import select

    ranks = torch.tensor([[5, 9, 5, 5, 1, 9, 5, 0]], dtype=torch.int16, device=device)
    ends = torch.tensor([8], dtype=torch.int32, device=device)
    rows = select.Rows(ranks, ends, 8, 1, 9)
    for budget, level, room in [(2, 9, 2), (3, 5, 1), (7, 1, 1), (0, -1, 0)]:
        wanted = torch.tensor([budget], dtype=torch.int32, device=device)
        found = select.find_levels(rows, wanted)
        assert (found.level.item(), found.room.item()) == (level, room)
    levels = select.Levels(wanted + 5, wanted)
    assert select.count_kept(rows, levels).tolist() == [[[2, 4]]]


def test_scratch_does_not_grow_with_rows_of_keys() -> None:
    pytest.importorskip("triton")
    from sparseloom.kernels.triton import select

    assert select.scratch_bytes(32, 1) == 5 * 4 * 128 + 8
    assert select.scratch_bytes(14, 2) == 2 * (2 * 4 * 128 + 8)
