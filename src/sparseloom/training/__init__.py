"""Adaptation: fit a predictor, fine-tune with a mask in place, save and load the result."""

from sparseloom.training.adapt import adapt, finetune
from sparseloom.training.checkpoint import load, load_method, save, save_method

__all__ = ["adapt", "finetune", "load", "load_method", "save", "save_method"]
