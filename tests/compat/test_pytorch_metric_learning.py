"""hsv_kernels.compat.pytorch_metric_learning against the installed library."""

import inspect
from collections.abc import Callable

import numpy as np
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
    mined = [miners.MultiSimilarityMiner(distance=loss.distance)(x, labels) for loss in _both(name)]
    assert all(torch.equal(a, b) for a, b in zip(*mined, strict=True))


#: Pairs of 12 rows, each written in another way, that both libraries take.
INDICES = {
    "negative partners": ([1, 1, 0], [-1, 2, 3], [1, 0, 0], [-5, 6, 7]),
    "negative anchors": ([-1, 1, 0], [1, 2, 3], [-1, 0, 0], [5, 6, 7]),
    "one pair twice": ([1, 1], [2, -10], [1, 1, 0], [5, -7, 6]),
}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_negative_indices(name: str, indices: tuple[list[int], ...]) -> None:
    for dtype in (torch.int64, torch.int32):
        tensors = tuple(torch.tensor(x, dtype=dtype) for x in indices)
        assert_same(*_both(name), *leaves((12, 8)), None, tensors, rtol=1e-4)


@pytest.mark.parametrize("kind", [list, np.array], ids=["lists", "numpy"])
def test_indices_of_other_types(kind: Callable) -> None:
    """NT-Xent of the library asks for tensors; ours takes the same from it as from SupCon."""
    (x,) = leaves((12, 8))
    indices = tuple(kind(index.tolist()) for index in PAIRS)
    assert_same(*_both("SupConLoss"), x, None, indices, rtol=1e-4)
    original, loss = _both("NTXentLoss")
    assert_same(lambda x: original(x, None, PAIRS), lambda x: loss(x, None, indices), x, rtol=1e-4)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (([1, 1, 0], [12, 2, 3], [1, 0, 0], [5, 6, 7]), IndexError),
        (([-13, 1, 0], [1, 2, 3], [-1, 0, 0], [5, 6, 7]), IndexError),
        (([1, 2, 3], [2, 3], [1, 0], [5, 6]), IndexError),
        (([1, 2], [2, 3], [1, 0], [5, 6, 7]), IndexError),
        (([1.0, 2], [2.0, 3], [1.0, 0], [5.0, 6]), IndexError),
        (([1, 2], [2, 3]), ValueError),
        (([1, 2], [2, 3], [1, 0], [5, 6], [1, 2]), ValueError),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_errors_of_indices(name: str, indices: tuple[list[float], ...], error: type[Exception]) -> None:
    (x,) = leaves((12, 8))
    tensors = tuple(torch.tensor(index) for index in indices)
    assert {error_of(lambda loss=loss: loss(x, None, tensors)) for loss in _both(name)} == {error}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("reducer", [None, reducers.AvgNonZeroReducer(), reducers.MeanReducer()], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_that_are_not_finite(name: str, reducer: torch.nn.Module | None, bad: float) -> None:
    rows, (other,) = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), leaves((7, 8))
    rows[0] = bad
    x, labels, others = rows.requires_grad_(), torch.arange(6) // 2, torch.tensor([5, 1, 1, 2, 2, 0, 0])
    indices = [
        tuple(map(torch.tensor, pairs))
        for pairs in (([1, 2], [3, 5], [1, 2], [4, 4]), ([1, 0], [3, 5], [1, 2], [4, 4]))
    ]
    for arguments in (
        (x, labels),
        (x, None, indices[0]),
        (x, None, indices[1]),
        (x, labels, None, other, others),
        (x, labels, None, other, others + 1),
        (other, others, None, x, labels),
    ):
        values = [loss(*arguments) for loss in _both(name, reducer=reducer)]
        torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_embeddings_that_are_all_lost(name: str) -> None:
    """One NaN in every row of products: the value is NaN, and the gradient is 0."""
    rows = torch.randn(6, 8)
    rows[0] = torch.nan
    x = rows.requires_grad_()
    for loss in _both(name, reducer=reducers.AvgNonZeroReducer()):
        value = loss(x, torch.arange(6) // 2)
        assert value.isnan() and not torch.autograd.grad(value, x)[0].any()


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


@pytest.mark.parametrize("name", NAMES)
def test_attributes_that_are_set_later(name: str) -> None:
    (x,), labels = leaves((12, 8)), LABELS["classes"]
    plain = distances.DotProductSimilarity(normalize_embeddings=False)
    other = {"NTXentLoss": reducers.AvgNonZeroReducer(), "SupConLoss": reducers.MeanReducer()}[name]
    for change in (
        lambda loss: setattr(loss, "distance", plain),
        lambda loss: setattr(loss, "reducer", other),
        lambda loss: setattr(loss, "temperature", 2),
        lambda loss: loss.set_reducer(other),
        lambda loss: loss.set_reducer(None),
    ):
        pair = _both(name, 5)
        for loss in pair:
            change(loss)
        assert_same(*pair, x, labels, rtol=1e-4)
    names = "distance", "reducer", "collect_stats", "embedding_regularizer", "embedding_reg_weight", "temperature"
    for attribute in names:
        found = [type(getattr(loss, attribute)).__name__ for loss in _both(name)]
        assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_defaults_that_a_subclass_overrides(name: str) -> None:
    def subclass(parent: type) -> torch.nn.Module:
        class Changed(parent):
            def get_default_distance(self) -> torch.nn.Module:
                return distances.DotProductSimilarity(normalize_embeddings=False)

            def get_default_reducer(self) -> torch.nn.Module:
                return reducers.AvgNonZeroReducer() if name == "NTXentLoss" else reducers.MeanReducer()

        return Changed(5)

    assert_same(*(subclass(getattr(m, name)) for m in (losses, ours)), *leaves((12, 8)), LABELS["classes"], rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_inside_the_losses_of_the_library(name: str) -> None:
    """Their parts serve others, and others serve them."""
    (x,), labels = leaves((12, 8)), LABELS["classes"]
    for wrap in (
        lambda loss: losses.TripletMarginLoss(distance=loss.distance, reducer=loss.reducer),
        lambda loss: losses.CrossBatchMemory(loss, 8, 24),
        lambda loss: losses.MultipleLosses([loss, losses.TripletMarginLoss()]),
        lambda loss: losses.MultipleLosses([loss], [miners.MultiSimilarityMiner()]),
    ):
        wrapped = []
        for loss in _both(name):
            torch.manual_seed(0)
            wrapped.append(wrap(loss))
        for _ in range(2):
            assert_same(*wrapped, x, labels, rtol=1e-4)


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
    ((attribute, value),) = options.items()
    with pytest.raises(NotImplementedError, match=attribute):
        getattr(ours, name)(**options)
    loss = getattr(ours, name)()
    setattr(loss, attribute, value)
    with pytest.raises(NotImplementedError, match=attribute):
        loss(*leaves((12, 8)), LABELS["classes"])


def test_errors() -> None:
    (x,) = leaves((4, 8))
    overlap = tuple(torch.tensor(pair) for pair in ([0, 1], [1, 2], [0, 1], [1, 3]))
    for name in NAMES:
        for arguments in ((x,), (x, torch.zeros(4, 2)), (x, torch.zeros(3)), (x[:, :, None], torch.zeros(4))):
            calls = [lambda loss=loss, a=arguments: loss(*a) for loss in _both(name)]
            assert [error_of(call) for call in calls] == [ValueError, ValueError]
        assert error_of(lambda n=name: getattr(ours, n)(unknown=1)) is TypeError
        calls = [lambda loss=loss: loss(x, torch.arange(4), ref_emb=torch.ones(4, 9)) for loss in _both(name)]
        assert {error_of(call) for call in calls} == {RuntimeError}
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
