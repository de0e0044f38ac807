"""A model in another mode for a while: training or evaluation, with gradients or without."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """Every module in training or evaluation mode; each has its own mode back on exit.

    A model may hold some modules in evaluation mode while it trains, as when a part is frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module, *, gradients: bool = False) -> Generator[None]:
    """The model in eval mode, all parameters with `gradients` or none; both restored on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(gradients)
    try:
        with in_mode(model, training=False):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
