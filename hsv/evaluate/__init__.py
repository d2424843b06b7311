"""How good features are: nearest neighbours, linear probes with all labels or a few."""

from hsv.evaluate.features import Features, extract_features, pixel_features
from hsv.evaluate.knn import Neighbours, knn_accuracy, nearest_neighbours
from hsv.evaluate.linear import MeanStd, few_label_accuracy, linear_accuracy
from hsv.evaluate.run import embed, evaluate, format_table

__all__ = [
    "Features",
    "MeanStd",
    "Neighbours",
    "embed",
    "evaluate",
    "extract_features",
    "few_label_accuracy",
    "format_table",
    "knn_accuracy",
    "linear_accuracy",
    "nearest_neighbours",
    "pixel_features",
]
