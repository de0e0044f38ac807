"""The cache layer: validity and method state follow every operation on the keys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparseloom.integrations.cache import SparseLayer, layer_of
from sparseloom.methods import DynamicSparse, Predictor


@pytest.fixture
def method() -> DynamicSparse:
    predictor = Predictor.for_shape(
        layers=1, hidden_size=8, heads=2, head_dim=4, projection=0.5, bits=32
    )
    return DynamicSparse(projection=0.5, bits=32, predictor=predictor, minimum_keys=1)


def filled(method: DynamicSparse) -> SparseLayer:
    """Three sequences of five tokens; keys, validity and codes all tell sequence and token."""
    layer = SparseLayer()
    number = torch.arange(15.0).view(3, 1, 5, 1)
    layer.update(number.expand(3, 2, 5, 4), number.expand(3, 2, 5, 4))
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1, :1] = valid[2, :2] = False
    layer.remember(valid, batch=3, new=5, total=5)
    state = layer.claim(method, 0, new=5, total=5)
    assert state is not None
    state.codes = number.expand(3, 2, 5, 2)  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def tokens(layer: SparseLayer) -> list[list[int]]:
    """Which token each key is; checks that state and validity are those of the same tokens."""
    numbers = layer.keys[:, 0, :, 0]
    assert torch.equal(layer.state.codes[:, 0, :, 0], numbers)
    padding = (numbers == 5) | (numbers == 10) | (numbers == 11)
    assert torch.equal(layer.valid, ~padding)
    return numbers.int().tolist()


def test_reorder(method: DynamicSparse) -> None:
    layer = filled(method)
    layer.reorder_cache(torch.tensor([2, 2, 0], dtype=torch.int32))
    assert [row[0] for row in tokens(layer)] == [10, 10, 0]


def test_crop(zoo: SimpleNamespace, method: DynamicSparse) -> None:
    layer = filled(method)
    layer.crop(-2)
    assert tokens(layer)[1] == [5, 6, 7]
    if zoo.is_old:  # a length, before 5.x
        layer.crop(2)
        assert tokens(layer)[1] == [5, 6]


def test_batches(method: DynamicSparse) -> None:
    layer = filled(method)
    layer.batch_repeat_interleave(2)
    assert [row[0] for row in tokens(layer)] == [0, 0, 5, 5, 10, 10]
    layer.batch_select_indices(torch.tensor([5, 2]))
    assert [row[0] for row in tokens(layer)] == [10, 5]


def test_reset(method: DynamicSparse) -> None:
    layer = filled(method)
    layer.reset()
    assert layer.valid is None
    assert layer.state is None


def test_validity_is_remembered_where_the_mask_does_not_tell() -> None:
    layer = SparseLayer()
    states = torch.zeros(2, 1, 4, 2)
    layer.update(states, states)
    given = torch.tensor([[False, True, True, True], [True] * 4])
    assert layer.remember(None, batch=2, new=4, total=4) is None
    assert torch.equal(layer.remember(given, batch=2, new=4, total=4), given)
    layer.update(states[:, :, :1], states[:, :, :1])
    found = layer.remember(None, batch=2, new=1, total=5)  # the caller left the mask out
    assert found.tolist() == [[False, True, True, True, True], [True] * 5]


def test_layers_that_keep_different_keys() -> None:
    """The mask's last columns are not this layer's keys once it has dropped some."""
    layer = SparseLayer()
    states = torch.zeros(1, 1, 6, 2)
    layer.update(states, states)
    layer.remember(torch.tensor([[False, False, True, True, True, True]]), batch=1, new=6, total=6)
    kept = torch.tensor([1, 2, 5])  # one of them padding
    layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    layer.valid = layer.valid[:, kept]
    layer.update(states[:, :, :1], states[:, :, :1])
    mask = torch.tensor([[False, False, True, True, True, True, True]])
    found = layer.remember(mask, batch=1, new=1, total=4)
    assert found.tolist() == [[False, True, True, True]]


def test_layers_are_replaced_where_they_stand() -> None:
    cache = DynamicCache()
    assert isinstance(layer_of(cache, 1), SparseLayer)
    assert len(cache.layers) == 2
    plain = DynamicLayer()
    plain.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    cache = Cache(layers=[plain, DynamicLayer()])
    mine = layer_of(cache, 0)
    assert cache.layers[0] is mine is layer_of(cache, 0)
    assert (cache.get_seq_length(), mine.keys.shape) == (3, (1, 1, 3, 2))
    with pytest.raises(ValueError, match="has 2 layers, but layer 2 ran"):
        layer_of(cache, 2)


def test_another_method_starts_anew(method: DynamicSparse) -> None:
    layer = filled(method)
    other = DynamicSparse(
        projection=0.5, bits=32, sparsity=0.5, predictor=method.predictor, minimum_keys=1
    )
    with pytest.raises(ValueError, match="holds 5 tokens of which method 'dynamic' has seen 0"):
        layer.claim(other, 0, new=1, total=6)
