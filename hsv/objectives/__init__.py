"""What can be trained on the shared encoder: one file for each method, and `hybrid` for any set of them."""

from hsv.objectives.hybrid import OBJECTIVES, Hybrid, build_hybrid
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.pixels import PixelObjective
from hsv.objectives.request import Causal, Drop, Encoded, Replace, Request, View

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Causal",
    "Drop",
    "Encoded",
    "Hybrid",
    "Objective",
    "PixelObjective",
    "Replace",
    "Request",
    "View",
    "build_hybrid",
]
