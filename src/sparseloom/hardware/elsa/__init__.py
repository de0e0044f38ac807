"""ELSA (Ham et al., ISCA 2021): hashed angles choose candidates, banks of modules score them."""

from sparseloom.hardware.elsa.machine import Elsa

__all__ = ["Elsa"]
