import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hsv.evaluate import few_label_accuracy, linear_accuracy

Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # training features and labels, test features and labels


@pytest.fixture(scope="module")
def digits() -> Parts:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def _sklearn(x: Tensor, y: Tensor, test: Tensor, test_y: Tensor, l2: float) -> float:
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    model = LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000, tol=1e-6)
    model.fit((x - mean) / std, y)
    return model.score((test - mean) / std, test_y)


@pytest.mark.parametrize("l2", [1.0, 1e-2])
def test_one_strength_agrees_with_scikit_learn(digits: Parts, l2: float) -> None:
    assert linear_accuracy(*digits, l2=[l2]) == pytest.approx(_sklearn(*digits, l2), abs=1.5 / 360)


def test_the_grid_is_chosen_on_the_training_part_alone(digits: Parts) -> None:
    x, y, test, test_y = digits
    fitted = linear_accuracy(x, y, test, test_y, seed=3)
    held = np.array([linear_accuracy(x, y, test, test_y, l2=[value]) for value in (1.0, 1e-2, 1e-4)])
    assert fitted >= held.min()
    wrong = linear_accuracy(x, y, test, (test_y + 1) % 10, seed=3)
    assert wrong < 0.1  # the choice cannot bend towards the test labels
    assert linear_accuracy(x, y, test, test_y, seed=3) == fitted


def test_noise_makes_the_grid_prefer_strong_decay() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(1200) % 2
    x = torch.randn(1200, 300, generator=g)
    x[:, :8] += 0.4 * (2 * y[:, None] - 1)
    parts = x[:800], y[:800], x[800:], y[800:]
    strong, weak = (linear_accuracy(*parts, l2=[value]) for value in (1.0, 1e-6))
    assert strong > weak + 0.03
    assert linear_accuracy(*parts, l2=[1e-6, 1.0]) == strong


def test_few_labels_lie_between_chance_and_all_labels(digits: Parts) -> None:
    mean, std = few_label_accuracy(*digits, per_class=10, draws=5, seed=0)
    assert 0.6 < mean < linear_accuracy(*digits)
    assert 0 < std < 0.1
    assert few_label_accuracy(*digits, per_class=10, draws=5, seed=0) == (mean, std)
    assert few_label_accuracy(*digits, per_class=40, draws=3, seed=0).mean > mean


def test_few_labels_know_only_the_classes_they_hold() -> None:
    y = torch.arange(100) % 2
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    all_of_one_class = few_label_accuracy(x, torch.zeros(100, dtype=int), x, y, per_class=500, draws=2)
    assert all_of_one_class == (0.5, 0)


def test_labels_need_not_start_at_zero_and_constant_features_do_no_harm() -> None:
    y = torch.tensor([7, 42] * 20)
    x = torch.stack([y.float(), torch.ones(40)], 1)
    assert linear_accuracy(x, y, x, y) == 1
    assert linear_accuracy(torch.ones(40, 2), y, torch.ones(40, 2), y) == 0.5


def test_errors_name_the_argument(digits: Parts) -> None:
    x, y, test, test_y = digits
    with pytest.raises(ValueError, match="train: got labels"):
        linear_accuracy(x, y[:-1], test, test_y)
    with pytest.raises(ValueError, match="test: got shape"):
        linear_accuracy(x, y, test[:0], test_y[:0])
    with pytest.raises(ValueError, match="per_class, draws: got 0, 10"):
        few_label_accuracy(x, y, test, test_y, per_class=0)
