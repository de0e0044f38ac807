"""Methods: what chooses the pairs that are computed, and how they are named and stored."""

from sparseloom.methods.arena import ARENA
from sparseloom.methods.base import (
    Attender,
    AttentionInputs,
    AttentionShape,
    Calibrated,
    LayerState,
    Method,
    Pruner,
    Selector,
    Survivors,
    Work,
)
from sparseloom.methods.bigbird import BigBird
from sparseloom.methods.blocklocal import BlockLocal
from sparseloom.methods.dense import Dense
from sparseloom.methods.dynamic import DynamicSparse
from sparseloom.methods.elsa import Elsa
from sparseloom.methods.gate import AttentionGate
from sparseloom.methods.generation import Generating, Reading, Run
from sparseloom.methods.h2o import H2O
from sparseloom.methods.indexer import LightningIndexer
from sparseloom.methods.learned import Learned, MethodShape, Predicting
from sparseloom.methods.linear import LinearAttention
from sparseloom.methods.linformer import Linformer
from sparseloom.methods.longformer import Longformer
from sparseloom.methods.oracle import Oracle
from sparseloom.methods.performer import Performer
from sparseloom.methods.predictor import LayerPredictor, Predictor, PredictorKeys
from sparseloom.methods.quality import overlap, retained_mass
from sparseloom.methods.quest import Quest
from sparseloom.methods.random_mask import RandomMask
from sparseloom.methods.reformer import Reformer
from sparseloom.methods.registry import (
    METHODS,
    format_method,
    method_names,
    parse_method,
    selection_name,
)
from sparseloom.methods.selection import budgets, threshold_mask, topk_mask
from sparseloom.methods.sinkhorn import Sinkhorn
from sparseloom.methods.snapkv import SnapKV
from sparseloom.methods.sparse_transformer import Fixed, Strided
from sparseloom.methods.spatten import SpAtten
from sparseloom.methods.static_sparse import StaticSparse
from sparseloom.methods.streaming import StreamingLLM
from sparseloom.methods.synthesizer import Synthesizer
from sparseloom.methods.thresholds import calibrate_thresholds
from sparseloom.methods.tile_aligned import TileAligned
from sparseloom.methods.window import SlidingWindow

__all__ = [
    "ARENA",
    "H2O",
    "METHODS",
    "Attender",
    "AttentionGate",
    "AttentionInputs",
    "AttentionShape",
    "BigBird",
    "BlockLocal",
    "Calibrated",
    "Dense",
    "DynamicSparse",
    "Elsa",
    "Fixed",
    "Generating",
    "LayerPredictor",
    "LayerState",
    "Learned",
    "LightningIndexer",
    "LinearAttention",
    "Linformer",
    "Longformer",
    "Method",
    "MethodShape",
    "Oracle",
    "Performer",
    "Predicting",
    "Predictor",
    "PredictorKeys",
    "Pruner",
    "Quest",
    "RandomMask",
    "Reading",
    "Reformer",
    "Run",
    "Selector",
    "Sinkhorn",
    "SlidingWindow",
    "SnapKV",
    "SpAtten",
    "StaticSparse",
    "StreamingLLM",
    "Strided",
    "Survivors",
    "Synthesizer",
    "TileAligned",
    "Work",
    "budgets",
    "calibrate_thresholds",
    "format_method",
    "method_names",
    "overlap",
    "parse_method",
    "retained_mass",
    "selection_name",
    "threshold_mask",
    "topk_mask",
]
