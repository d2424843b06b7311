"""KeyQueue, and info_nce on every backend of this machine against its definition in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels import KeyQueue, info_nce
from tests.kernels.cases import assert_accurate, device_of, serves, strided, usable_backends

BACKENDS = usable_backends("contrast")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TYPED = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in BACKENDS
    for dtype in DTYPES
    if serves("contrast", name, dtype)
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_type = pytest.mark.parametrize(("backend", "dtype"), TYPED)
not_reference = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
in_double = pytest.mark.parametrize("backend", [name for name in BACKENDS if serves("contrast", name, torch.float64)])
N, K, D = 7, 37, 20


def problem(backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that require grad, and the unit rows of a queue."""
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, N, K))
    q, k, queue = (x.to(device_of(backend), dtype) for x in (q, k, F.normalize(queue)))
    return q.requires_grad_(), k.requires_grad_(), queue


def definition(
    q: Tensor, k: Tensor, queue: Tensor | None, temperature: float | Tensor = 0.2, normalise: bool = True
) -> Tensor:
    """Cross-entropies of the concatenated logits, [N]."""
    q, k = (F.normalize(x) if normalise else x for x in (q, k))
    if queue is None:
        return F.cross_entropy(q @ k.T / temperature, torch.arange(len(q), device=q.device), reduction="none")
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device), reduction="none")


def evaluate(losses: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The losses and the gradients of a sum that weighs them differently."""
    weights = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype, device=losses.device).reshape(losses.shape)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, weights)]


@every_type
@pytest.mark.parametrize("with_queue", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_info_nce_matches_its_definition(normalise: bool, with_queue: bool, backend: str, dtype: torch.dtype) -> None:
    q, k, queue = problem(backend, dtype)
    queue = queue if with_queue else None
    found = evaluate(info_nce(q, k, queue, normalise=normalise, reduction="none", backend=backend), q, k)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    exact = []
    for precision in (single, torch.float64):
        of_q, of_k = (x.detach().to(precision).requires_grad_() for x in (q, k))
        negatives = None if queue is None else queue.to(precision)
        exact.append(evaluate(definition(of_q, of_k, negatives, normalise=normalise), of_q, of_k))
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (single, dtype, dtype)
    for x, plain, truth in zip(found, *exact, strict=True):
        assert_accurate(x, plain, truth, dtype, D)


@in_double
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_a_learned_temperature(reduction: str, backend: str) -> None:
    q, k, queue = problem(backend, torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, device=q.device, requires_grad=True)
    found = info_nce(q, k, queue, temperature=temperature, reduction=reduction, backend=backend)
    truth = definition(q, k, queue, temperature)
    truth = truth if reduction == "none" else truth.sum() if reduction == "sum" else truth.mean()
    for x, y in zip(evaluate(found, q, k, temperature), evaluate(truth, q, k, temperature), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@in_double
@pytest.mark.parametrize("logit", [1.0, 30.0, 60.0, -700.0])
def test_losses_of_any_size_keep_their_digits(logit: float, backend: str) -> None:
    """One query, its positive and one negative: the loss is log(1 + e^d)."""
    q, k, queue = (torch.tensor([[x]], dtype=torch.float64) for x in (1.0, -logit, 0.0))
    found = info_nce(q, k, queue, temperature=1.0, normalise=False, backend=backend)
    expected = torch.logaddexp(torch.tensor(logit, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@every_backend
def test_a_single_query_without_negatives(backend: str) -> None:
    q, k, _ = (x[:1].detach().requires_grad_() for x in problem(backend))
    loss, dq = evaluate(info_nce(q, k, reduction="none", backend=backend), q)
    assert loss.item() == 0 and (dq == 0).all()


@every_backend
def test_a_push_before_backward_changes_nothing(backend: str) -> None:
    q, k, _ = problem(backend)
    torch.manual_seed(3)
    queue = KeyQueue(K, D, device=q.device)
    rows = queue.keys.clone()
    loss = info_nce(q, k.detach(), queue.keys, backend=backend)
    queue.push(torch.full((K, D), torch.nan, device=q.device))
    (found,) = torch.autograd.grad(loss, q)
    (expected,) = torch.autograd.grad(info_nce(q, k.detach(), rows, backend=backend), q)
    assert torch.equal(found, expected) and queue.keys.isnan().all()


@every_backend
def test_mixed_dtypes_are_computed_in_the_queues(backend: str) -> None:
    q, k, queue = problem(backend)
    loss, dq = evaluate(info_nce(q.bfloat16(), k.bfloat16(), queue, reduction="none", backend=backend), q)
    expected, _ = evaluate(definition(q.bfloat16().float(), k.bfloat16().float(), queue), q)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert dq.dtype == torch.float32
    half = info_nce(q, k, queue.bfloat16(), reduction="none", backend=backend)
    torch.testing.assert_close(half, definition(q, k, queue), rtol=0.03, atol=0.03)


@every_backend
def test_any_stride(backend: str) -> None:
    q, k, queue = problem(backend)
    loss, dq = evaluate(info_nce(q, k, queue, backend=backend), q)
    others = strided(q.detach()).requires_grad_(), strided(k.detach()), strided(queue)
    other, other_dq = evaluate(info_nce(*others, backend=backend), others[0])
    torch.testing.assert_close((other, other_dq), (loss, dq), rtol=1e-5, atol=1e-7)


@every_backend
@pytest.mark.filterwarnings("ignore")
def test_compiles_as_one_graph_with_the_push(backend: str) -> None:
    q, k, _ = problem(backend)
    torch.manual_seed(3)
    queue = KeyQueue(K, D, device=q.device)
    rows = queue.keys.clone()

    def step(q: Tensor, k: Tensor) -> Tensor:
        loss = info_nce(q, k, queue.keys, backend=backend)
        queue.push(k)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = evaluate(compiled(q, k.detach()), q)
    expected = evaluate(info_nce(q, k.detach(), rows, backend=backend), q)
    torch.testing.assert_close(found, expected)
    assert torch.equal(queue.keys[:N], F.normalize(k.detach())) and torch.equal(queue.keys[N:], rows[N:])


@every_backend
def test_functional_gradient(backend: str) -> None:
    q, k, queue = (x.detach() for x in problem(backend))
    found = torch.func.grad(lambda q: info_nce(q, k, queue, backend=backend))(q)
    _, expected = evaluate(info_nce(leaf := q.clone().requires_grad_(), k, queue, backend=backend) * 1, leaf)
    torch.testing.assert_close(-found, expected)  # evaluate weighs a single loss by −1


@not_reference
def test_double_backward_raises(backend: str) -> None:
    q, k, queue = problem(backend)
    (dq,) = torch.autograd.grad(info_nce(q, k, queue, backend=backend), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.square().sum().backward()


ROWS = torch.ones(4, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"q": None}, "q must be a tensor; got NoneType"),
        ({"q": torch.ones(0, 3)}, r"q must be \[N, D\] without an empty dimension; got \[0, 3\]"),
        ({"k": torch.ones(5, 3)}, r"k must have the shape of q, \[4, 3\]; got \[5, 3\]"),
        ({"k": torch.ones(4, 3, device="meta")}, "k and q must be on one device; got meta and cpu"),
        ({"queue": torch.ones(9, 2)}, "queue must have the 3 dimensions of q; got 2"),
        ({"queue": torch.ones(9)}, r"queue must be \[K, D\] .* got \[9\]"),
        ({"queue": torch.ones(9, 3, dtype=torch.int64)}, "queue must be float32, .* got torch.int64"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"temperature": torch.ones(1)}, "temperature must be a number or a 0-dim tensor"),
        ({"reduction": "batch"}, "reduction must be one of mean, sum, none; got 'batch'"),
    ],
)
def test_info_nce_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(**{"q": ROWS, "k": ROWS, **arguments})


def test_a_queue_begins_with_random_unit_rows_of_torchs_generator() -> None:
    torch.manual_seed(1)
    first = KeyQueue(50, 8)
    torch.manual_seed(1)
    second = KeyQueue(50, 8)
    assert torch.equal(first.keys, second.keys) and first.filled == 0
    torch.testing.assert_close(first.keys.norm(dim=1), torch.ones(50))
    assert first.keys.unique(dim=0).shape == (50, 8)


@pytest.mark.parametrize("size", [1, 5, 6, 11])
def test_the_last_rows_stay_whatever_the_batches(size: int) -> None:
    queue = KeyQueue(size, 3, normalise=False)
    pushed = queue.keys.clone()
    for batch in (0, 1, 4, 2 * size, 3, size, 5, 3 * size + 1, 0):
        rows = torch.randn(batch, 3, requires_grad=True)
        queue.push(rows)
        pushed = torch.cat([pushed, rows.detach()])
        oldest = int(queue.cursor) % size
        assert torch.equal(queue.keys.roll(-oldest, 0), pushed[-size:])
        assert queue.filled == min(size, len(pushed) - size) and not queue.keys.requires_grad


def test_pushed_rows_are_normalised_and_cast() -> None:
    queue = KeyQueue(4, 3, dtype=torch.bfloat16)
    rows = torch.tensor([[3.0, 0, 4], [0, 0, 0]], dtype=torch.float64)
    queue.push(rows)
    assert torch.equal(queue.keys[:2], torch.tensor([[0.6, 0, 0.8], [0, 0, 0]]).bfloat16())
    assert queue.keys.dtype == torch.bfloat16 and rows[0, 0] == 3


def test_the_state_continues_where_it_was_saved() -> None:
    first, second = KeyQueue(7, 3), KeyQueue(7, 3)
    first.push(torch.randn(5, 3))
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"keys", "cursor"}
    rows = torch.randn(4, 3)
    for queue in (first, second):
        queue.push(rows)
    assert torch.equal(first.keys, second.keys) and torch.equal(first.cursor, second.cursor) and second.filled == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 3), "size must be at least 1; got 0"),
        ((3, -1), "dim must be at least 1; got -1"),
        ((3.0, 3), "size must be an integer; got 3.0"),
    ],
)
def test_a_queue_refuses_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyQueue(*arguments)
    with pytest.raises(ValueError, match=r"dtype must be .* got torch.int32"):
        KeyQueue(3, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    "keys, message",
    [
        (torch.ones(2, 4), r"keys must be floating rows \[B, 3\]; got torch.float32 \[2, 4\]"),
        (torch.ones(3), r"got torch.float32 \[3\]"),
        (torch.ones(2, 3, dtype=torch.int64), "got torch.int64"),
        ([1.0], "got list"),
        (torch.ones(2, 3, device="meta"), "keys must be on cpu, where the queue is; got meta"),
    ],
)
def test_a_push_refuses(keys: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyQueue(5, 3).push(keys)
