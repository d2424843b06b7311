"""How good features are: nearest neighbours, linear probes with all labels or a few."""

from hsv.evaluate.features import Features, extract_features, pixel_features
from hsv.evaluate.knn import Neighbours, knn_accuracy, nearest_neighbours
from hsv.evaluate.linear import MeanStd, few_label_accuracy, linear_accuracy

__all__ = [
    "Features",
    "MeanStd",
    "Neighbours",
    "extract_features",
    "few_label_accuracy",
    "knn_accuracy",
    "linear_accuracy",
    "nearest_neighbours",
    "pixel_features",
]
