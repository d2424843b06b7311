"""How good features are: nearest neighbours, linear probes with all labels or a few."""

from hsv.evaluate.features import Features, extract_features, pixel_features
from hsv.evaluate.knn import Neighbours, knn_accuracy, nearest_neighbours
from hsv.evaluate.linear import MeanStd, few_label_accuracy, linear_accuracy
from hsv.evaluate.run import embed, evaluate, format_table
from hsv.evaluate.saved import differences, evaluation_file, read_evaluation

__all__ = [
    "Features",
    "MeanStd",
    "Neighbours",
    "differences",
    "embed",
    "evaluate",
    "evaluation_file",
    "extract_features",
    "few_label_accuracy",
    "format_table",
    "knn_accuracy",
    "linear_accuracy",
    "nearest_neighbours",
    "pixel_features",
    "read_evaluation",
]
