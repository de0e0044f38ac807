"""Modes and gradients come back as they were, module by module."""

from __future__ import annotations

import pytest
from torch import nn

from sparseloom.models.modes import frozen, in_mode


def half_frozen() -> nn.Sequential:
    """A model that trains, but for one part of it."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model.train()
    model[1].eval()
    model[1][0].weight.requires_grad_(False)
    return model


def test_every_module_has_its_own_mode_back() -> None:
    model = half_frozen()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    for training in (True, False):
        with in_mode(model, training=training):
            assert all(module.training is training for module in model.modules())
        assert [module.training for module in model.modules()] == before


def test_frozen_parameters_come_back_after_an_error() -> None:
    model = half_frozen()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags == [False, True]
    for gradients in (True, False):
        with frozen(model, gradients=gradients):
            assert {p.requires_grad for p in model.parameters()} == {gradients}
            assert not any(module.training for module in model.modules())
        with pytest.raises(KeyError), frozen(model, gradients=gradients):
            raise KeyError
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert [module.training for module in model.modules()] == modes
