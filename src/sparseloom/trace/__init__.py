"""Traces: what a run did, layer by layer, in a form that drives every machine (numpy only)."""

from sparseloom.trace.errors import TraceError
from sparseloom.trace.masks import MaskArrays, allowed_pairs
from sparseloom.trace.schema import (
    AttentionCall,
    ModelShape,
    Operator,
    PredictorShape,
    Selection,
    Workload,
)
from sparseloom.trace.trace import Trace
from sparseloom.trace.workloads import transformer_operators

__all__ = [
    "AttentionCall",
    "MaskArrays",
    "ModelShape",
    "Operator",
    "PredictorShape",
    "Selection",
    "Trace",
    "TraceError",
    "Workload",
    "allowed_pairs",
    "transformer_operators",
]
