"""A dense accelerator extended for static regions, after Dai et al., DAC 2023.

What is public of that paper is its abstract: masks of dense regions, work outside them skipped and
inside them reduced, a typical dense accelerator extended. The design here (tile grid, descriptors,
sequencer, energy and cycle formulas) is ours; its parts cite what they are anchored on.
"""

from sparseloom.hardware.static_dense.machine import StaticDense

__all__ = ["StaticDense"]
