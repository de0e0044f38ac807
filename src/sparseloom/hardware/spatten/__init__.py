"""SpAtten (HPCA 2021): cascade token and head pruning, local values, progressive quantisation."""

from sparseloom.hardware.spatten.machine import SpAtten

__all__ = ["SpAtten"]
