"""DOTA (Qu et al., ASPLOS 2022): Lanes that detect weak attentions and omit them."""

from sparseloom.hardware.dota.machine import Dota

__all__ = ["Dota"]
