"""hsv_kernels.compat.pytorch_metric_learning against the installed library."""

import inspect

import pytest
import torch
from parity import assert_same, error_of, leaves
from torch import Tensor

from hsv_kernels import nt_xent
from hsv_kernels.compat import pytorch_metric_learning as ours

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

NAMES = ["NTXentLoss", "SupConLoss"]
LABELS = {
    "classes": torch.tensor([3, 1, 3, 3, 0, 1, 2, 0, 1, 3, 3, 9]),
    "two views": torch.arange(6).repeat(2),
    "floats": torch.tensor([0.5, 1.5, -2, 0.5] * 3),
    "one class": torch.zeros(12, dtype=torch.long),
    "no positive": torch.arange(12),
}
PAIRS = tuple(torch.tensor(x) for x in ([0, 0, 1, 5, 7], [1, 2, 2, 6, 3], [0, 0, 1, 3, 0], [3, 4, 4, 1, 3]))
TRIPLETS = tuple(torch.tensor(x) for x in ([0, 0, 1, 5], [1, 2, 2, 6], [3, 3, 4, 1]))


def _both(name: str, *arguments: object, **options: object) -> list[torch.nn.Module]:
    return [getattr(library, name)(*arguments, **options) for library in (losses, ours)]


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    for method in ("__init__", "forward"):
        functions = (getattr(getattr(library, name), method) for library in (losses, ours))
        found = [[(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in functions]
        assert found[0] == found[1]


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_labels(name: str, labels: Tensor) -> None:
    (x,) = leaves((12, 8))
    assert_same(*_both(name), x, labels, rtol=1e-4)
    assert_same(*_both(name, -0.5), x, labels, rtol=1e-4)


@pytest.mark.parametrize("indices", [PAIRS, TRIPLETS], ids=["pairs", "triplets"])
@pytest.mark.parametrize("name", NAMES)
def test_indices(name: str, indices: tuple[Tensor, ...]) -> None:
    x, other = leaves((12, 8), (9, 8))
    assert_same(*_both(name), x, None, indices, rtol=1e-4)
    assert_same(*_both(name), x, LABELS["classes"], indices, other, torch.arange(9), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_indices_of_a_miner(name: str) -> None:
    (x,) = leaves((12, 8))
    labels = LABELS["classes"]
    assert_same(*_both(name), x, labels, miners.MultiSimilarityMiner()(x, labels), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_references(name: str) -> None:
    x, other, equal = leaves((12, 8), (9, 8), (12, 8))
    labels = LABELS["classes"]
    assert_same(*_both(name), x, labels, None, other, torch.tensor([1, 1, 0, 4, 3, 3, 9, 5, 0]), rtol=1e-4)
    assert_same(*_both(name), x, labels, ref_emb=equal, rtol=1e-4)  # labels of the anchors: pair (i, i) is left out
    assert_same(*_both(name), x, labels, ref_emb=equal, ref_labels=labels.clone(), rtol=1e-4)  # and here it is not


@pytest.mark.parametrize("name", NAMES)
def test_references_of_other_length_without_labels(name: str) -> None:
    x, more = leaves((12, 8), (15, 8))
    assert_same(*_both(name), x, LABELS["classes"], None, more, rtol=1e-4)
    calls = [lambda loss=loss: loss(more, torch.zeros(15), None, x) for loss in _both("NTXentLoss")]
    assert [error_of(call) for call in calls] == [IndexError, IndexError]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(name: str, rows: int) -> None:
    (x,) = leaves((rows, 8))
    for labels in (torch.zeros(rows), torch.arange(rows)):
        assert_same(*_both(name), x, labels)
    one, two = leaves((1, 8), (2, 8))
    assert_same(*_both(name), one, torch.zeros(1), None, two, torch.tensor([0, 1]))
    assert_same(*_both(name), two, torch.tensor([0, 1]), None, two, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    none, two = leaves((0, 8), (2, 8))
    assert_same(*_both(name), none, torch.zeros(0))
    assert_same(*_both(name), none, torch.zeros(0), None, two, torch.tensor([0, 1]))
    assert_same(*_both(name), two, torch.tensor([0, 1]), None, none, torch.zeros(0))


@pytest.mark.parametrize("reducer", [None, "MeanReducer", "AvgNonZeroReducer"])
@pytest.mark.parametrize("distance", [None, "CosineSimilarity", "DotProductSimilarity"])
@pytest.mark.parametrize("name", NAMES)
def test_distances_and_reducers(name: str, distance: str | None, reducer: str | None) -> None:
    options = {
        "distance": distance and getattr(distances, distance)(),
        "reducer": reducer and getattr(reducers, reducer)(),
    }
    assert_same(*_both(name, 0.5, **options), *leaves((12, 8)), LABELS["classes"], rtol=1e-4)
    if distance == "DotProductSimilarity":
        options["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
        assert_same(*_both(name, 5, **options), *leaves((12, 8)), LABELS["classes"], rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"distance": distances.LpDistance()},
        {"distance": distances.CosineSimilarity(power=2)},
        {"reducer": reducers.ThresholdReducer(low=1)},
        {"embedding_regularizer": regularizers.LpRegularizer()},
        {"collect_stats": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_supported_is_named(name: str, options: dict) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        getattr(ours, name)(**options)


def test_errors() -> None:
    (x,) = leaves((4, 8))
    overlap = tuple(torch.tensor(pair) for pair in ([0, 1], [1, 2], [0, 1], [1, 3]))
    for name in NAMES:
        for arguments in ((x,), (x, torch.zeros(4, 2)), (x, torch.zeros(3)), (x[:, :, None], torch.zeros(4))):
            calls = [lambda loss=loss, a=arguments: loss(*a) for loss in _both(name)]
            assert [error_of(call) for call in calls] == [ValueError, ValueError]
        assert error_of(lambda n=name: getattr(ours, n)(unknown=1)) is TypeError
    assert {error_of(lambda loss=loss: loss(x, None, overlap)) for loss in _both("SupConLoss")} == {AssertionError}


def test_half_precision_is_near_the_truth_where_the_library_saturates() -> None:
    labels = torch.arange(64) % 32
    (x,) = leaves((64, 16), dtype=torch.float16)
    truth = losses.NTXentLoss()(x.double(), labels)
    original, loss = (m(x, labels).double() for m in _both("NTXentLoss"))
    assert abs(loss - truth) < 2e-3 * truth < abs(original - truth)


def test_strided_rows_of_many_positives() -> None:
    """So many positives that the matrix of products is smaller than the rows of the pairs."""
    (x,) = leaves((32, 40))
    for name in NAMES:
        assert_same(*_both(name), x.T, torch.arange(40) % 2, rtol=1e-4, inputs=[x])


def test_memory_grows_with_pairs_alone() -> None:
    """Two views of 1,024: positives times negatives are 34 GB of float32."""
    z0, z1 = leaves((1024, 16), (1024, 16))
    labels = torch.arange(1024).repeat(2)

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        return ours.NTXentLoss(0.1)(torch.cat([z0, z1]), labels)

    assert_same(lambda *views: nt_xent(*views, 0.1), loss, z0, z1)
