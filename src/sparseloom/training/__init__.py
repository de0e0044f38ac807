"""Adaptation: fit a predictor, fine-tune with a mask in place, save and load the result."""

from sparseloom.training.adapt import adapt, finetune
from sparseloom.training.calibrate import calibrate
from sparseloom.training.checkpoint import load, load_method, save, save_method
from sparseloom.training.entropy import EntropyLoss, EntropySettings
from sparseloom.training.ramp import SparsityRamp
from sparseloom.training.static import adapt_static, select_regions

__all__ = [
    "EntropyLoss",
    "EntropySettings",
    "SparsityRamp",
    "adapt",
    "adapt_static",
    "calibrate",
    "finetune",
    "load",
    "load_method",
    "save",
    "save_method",
    "select_regions",
]
