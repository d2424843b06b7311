import pytest
import torch
from torch import Tensor

from hsv.evaluate import knn_accuracy, nearest_neighbours


def _random(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_neighbours_match_a_float64_sort(chunk: int) -> None:
    bank, queries = _random(53, 9, 0), _random(31, 9, 1)
    similarity, index = nearest_neighbours(bank, queries, 5, chunk=chunk)
    truth = torch.nn.functional.cosine_similarity(queries.double()[:, None], bank.double()[None], dim=-1)
    best = truth.sort(descending=True)
    assert torch.equal(index, best.indices[:, :5])
    torch.testing.assert_close(similarity.double(), best.values[:, :5], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_row_is_not_its_own_neighbour(chunk: int) -> None:
    bank = _random(23, 6, 2)
    plain = nearest_neighbours(bank, bank, 3, chunk=chunk).index
    others = nearest_neighbours(bank, bank, 2, chunk=chunk, exclude_self=True).index
    assert torch.equal(plain[:, 0], torch.arange(23))
    assert torch.equal(plain[:, 1:], others)


def test_accuracy_is_the_weighted_vote_written_as_a_loop() -> None:
    bank, queries = _random(60, 4, 3), _random(40, 4, 4)
    y, labels = torch.arange(60) % 3 + 5, torch.arange(40) % 3 + 5
    right = 0
    for query, label in zip(queries.double(), labels, strict=True):
        cosine = torch.nn.functional.cosine_similarity(query[None], bank.double())
        near = cosine.argsort(descending=True)[:7]
        votes = {int(c): (cosine[near][y[near] == c] / 0.5).exp().sum() for c in y.unique()}
        right += max(votes, key=votes.get) == int(label)
    assert knn_accuracy(bank, y, queries, labels, k=7, temperature=0.5) == pytest.approx(right / 40)


def test_weights_decide_when_counts_would_not() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    query, label = torch.tensor([[1.0, 0.4]]), torch.tensor([0])
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), query, label, k=3, temperature=0.07) == 1
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), query, label, k=3, temperature=10.0) == 0


def test_low_temperature_does_not_overflow_and_a_small_bank_votes_whole() -> None:
    bank = _random(6, 4, 5)
    labels = torch.arange(6)
    assert knn_accuracy(bank, labels, 2 * bank, labels, k=20, temperature=1e-4) == 1


def test_a_class_missing_from_the_bank_is_missed() -> None:
    bank = _random(6, 4, 6)
    assert knn_accuracy(bank, torch.zeros(6, dtype=int), bank, torch.ones(6, dtype=int)) == 0


def test_errors_name_the_argument() -> None:
    x, y = _random(6, 4, 7), torch.arange(6)
    with pytest.raises(ValueError, match="k: got 0"):
        nearest_neighbours(x, x, 0)
    with pytest.raises(ValueError, match="k: got 6; allowed: 1 to 5"):
        nearest_neighbours(x, x, 6, exclude_self=True)
    with pytest.raises(ValueError, match="queries: got width 3"):
        nearest_neighbours(x, x[:, :3], 1)
    with pytest.raises(ValueError, match="bank: got NaN or infinity in 1 of 6"):
        knn_accuracy(torch.cat([x[:5], x[:1] * torch.nan]), y, x, y)
    with pytest.raises(ValueError, match="queries: got labels"):
        knn_accuracy(x, y, x, y[:3])
    with pytest.raises(ValueError, match="queries: got labels"):
        knn_accuracy(x, y, x, y.float())
    with pytest.raises(ValueError, match="temperature: got 0"):
        knn_accuracy(x, y, x, y, temperature=0)
