"""What can be trained on the shared encoder: one file for each method, and `hybrid` for any set of them."""

from hsv.objectives.hybrid import Hybrid, build_hybrid
from hsv.objectives.mae import MAE
from hsv.objectives.request import Mask, Masked, Request, View
from hsv.objectives.simclr import SimCLR

__all__ = ["MAE", "Hybrid", "Mask", "Masked", "Request", "SimCLR", "View", "build_hybrid"]
