"""distillation_loss and sinkhorn_centre on every backend of this machine against their definitions in float64."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hsv_kernels import distillation_loss, sinkhorn_centre
from hsv_kernels.backends import interpreting
from hsv_kernels.ops.distillation import function
from tests.kernels.cases import (
    LAYOUTS,
    assert_accurate,
    device_of,
    incoming,
    poisoned_allocations,
    serves,
    usable_backends,
)

BACKENDS = usable_backends("distillation")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["none"] if interpreting() else ["mean", "sum", "none"]
TYPED = [(name, dtype) for name in BACKENDS for dtype in DTYPES if serves("distillation", name, dtype)]

every_type = pytest.mark.parametrize(("backend", "dtype"), TYPED, ids=str)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_double = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
not_interpreted = pytest.mark.skipif(interpreting(), reason="what surrounds the operator, which is no backend's own")


class Case(NamedTuple):
    """Teacher and student views, rows and classes; None for the pairs is every t ≠ s."""

    T: int
    S: int
    N: int
    K: int
    pairs: tuple[tuple[int, int], ...] | None = None
    weighted: bool = False

    @property
    def all_pairs(self) -> list[tuple[int, int]]:
        every = [(t, s) for t in range(self.T) for s in range(self.S) if t != s]
        return list(self.pairs or every or [(0, 0)])


CASES = {
    "dino": Case(2, 5, 3, 130),
    "ibot": Case(1, 1, 7, 65, weighted=True),
    "one class": Case(2, 2, 2, 1),
    "seven classes": Case(2, 3, 2, 7),
    "one row": Case(2, 4, 1, 515),
    "several rows to a program, fewer to the last": Case(2, 2, 19, 70),
    "several blocks": Case(2, 3, 2, 4097),
    "a student in no pair": Case(2, 3, 2, 20, pairs=((0, 1), (1, 1), (0, 2))),
    "a teacher in no pair": Case(3, 2, 2, 20, pairs=((0, 1), (2, 1))),
    "ragged pairs, one of them twice": Case(3, 4, 2, 33, pairs=((2, 0), (0, 3), (1, 3), (2, 3), (0, 3), (1, 2))),
}
DINO = CASES["dino"]


class Problem(NamedTuple):
    student: Tensor
    teacher: Tensor
    centre: Tensor
    weights: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(None if x is None else x.to(dtype) for x in self))


def problem(case: Case, backend: str, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Problem:
    """Normal logits of deviation `spread` and of `dtype`, a centre and, where the case has them, weights."""
    generator = torch.Generator().manual_seed(sum(case[:4]))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    student, teacher = (spread * normal(views, case.N, case.K) for views in (case.S, case.T))
    centre = 0.3 * normal(case.K)
    weights = torch.rand(case.N, generator=generator) if case.weighted else None
    place = device_of(backend)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    weights = None if weights is None else weights.to(place)
    return Problem(student.to(place, dtype), teacher.to(place, dtype), centre.to(place, single), weights)


def definition(
    given: Problem, pairs: list[tuple[int, int]], reduction: str = "mean", temperatures: tuple = (0.1, 0.04)
) -> Tensor:
    """The loss as it is written in the papers, of PyTorch's own operations, in the type of the problem."""
    log_p = (given.student / temperatures[0]).log_softmax(-1)
    q = ((given.teacher - given.centre) / temperatures[1]).softmax(-1)
    losses = -sum((q[t] * log_p[s]).sum(-1) for t, s in pairs) / len(pairs)
    if given.weights is not None:
        losses = losses * given.weights
    if reduction == "none":
        return losses
    return losses.sum() / (
        1 if reduction == "sum" else losses.numel() if given.weights is None else given.weights.sum()
    )


def loss_of(case: Case, backend: str, given: Problem, student: Tensor | list, reduction: str = "mean") -> Tensor:
    return distillation_loss(
        *(student, given.teacher),
        centre=given.centre,
        pairs=case.pairs,
        weights=given.weights,
        reduction=reduction,
        backend=backend,
    )[0]


def evaluate(case: Case, backend: str, given: Problem, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Loss and gradient [S, N, K] of a stacked student."""
    student = given.student.detach().requires_grad_()
    loss = loss_of(case, backend, given, student, reduction)
    (gradient,) = torch.autograd.grad(loss, student, incoming(loss))
    return loss.detach(), gradient


def by_autograd(case: Case, given: Problem, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Loss and gradient of the definition, differentiated by PyTorch."""
    student = given.student.detach().requires_grad_()
    loss = definition(given._replace(student=student), case.all_pairs, reduction)
    (gradient,) = torch.autograd.grad(loss, student, incoming(loss))
    return loss.detach(), gradient


@every_type
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_match_the_definition(case: Case, backend: str, dtype: torch.dtype) -> None:
    given = problem(case, backend, dtype)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in REDUCTIONS:
        with poisoned_allocations():
            found = evaluate(case, backend, given, reduction)
        plain, truth = (by_autograd(case, given.to(kind), reduction) for kind in (single, torch.float64))
        assert (found[0].dtype, found[1].dtype) == (single, dtype)
        assert_accurate(found[0], plain[0], truth[0], single, case.K)
        assert_accurate(found[1], plain[1], truth[1], dtype, case.K)


@every_type
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_mean_of_the_teacher(case: Case, backend: str, dtype: torch.dtype) -> None:
    given = problem(case, backend, dtype)
    _, mean = distillation_loss(given.student.requires_grad_(), given.teacher, pairs=case.pairs, backend=backend)
    exact = given.teacher.double().mean((0, 1))
    assert not mean.requires_grad
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-6)


@every_backend
def test_each_tensor_of_a_list_gets_its_own_gradient(backend: str) -> None:
    given = problem(DINO, backend)
    loss, stacked = evaluate(DINO, backend, given)
    for sizes in ([1] * 5, [2, 3]):
        student = [x.clone().requires_grad_() for x in given.student.split(sizes)]
        student = [x.detach()[0].requires_grad_() if len(x) == 1 else x for x in student]
        found = loss_of(DINO, backend, given._replace(teacher=list(given.teacher)), student)
        gradients = torch.autograd.grad(found, student, incoming(found))
        assert torch.equal(found, loss)
        assert torch.equal(torch.cat([x.reshape(-1, *stacked.shape[1:]) for x in gradients]), stacked)


@every_backend
def test_a_student_without_a_gradient(backend: str) -> None:
    given = problem(DINO, backend)
    _, stacked = evaluate(DINO, backend, given)
    student = [x.clone().requires_grad_(i != 1) for i, x in enumerate(given.student)]
    loss_of(DINO, backend, given, student).backward(torch.tensor(-1.0, device=stacked.device))
    assert student[1].grad is None
    assert all(torch.equal(x.grad, stacked[i]) for i, x in enumerate(student) if i != 1)


@in_double
def test_gradcheck(backend: str) -> None:
    case = Case(2, 3, 2, 9, weighted=True)
    given = problem(case, backend, torch.float64)
    student = [x.clone().requires_grad_() for x in given.student]
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(lambda *x, r=reduction: loss_of(case, backend, given, list(x), r), student)


@every_backend
def test_temperatures_in_tensors(backend: str) -> None:
    given = problem(DINO, backend)
    numbers = {"student_temperature": 0.2, "teacher_temperature": 0.07}
    tensors = {name: torch.tensor(value, device=given.student.device) for name, value in numbers.items()}
    expected, found = (distillation_loss(*given[:2], **values, backend=backend)[0] for values in (numbers, tensors))
    torch.testing.assert_close(found, expected)
    tensors["teacher_temperature"] = -tensors["teacher_temperature"]
    assert distillation_loss(*given[:2], **tensors, backend=backend)[0].isnan()


def test_equal_weights_are_no_weights() -> None:
    given = problem(DINO, BACKENDS[0])
    expected = loss_of(DINO, BACKENDS[0], given, given.student)
    weights = torch.full((DINO.N,), 2, device=given.student.device)
    torch.testing.assert_close(loss_of(DINO, BACKENDS[0], given._replace(weights=weights), given.student), expected)
    assert loss_of(DINO, BACKENDS[0], given._replace(weights=0 * weights), given.student) == 0


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend: str, layout: str) -> None:
    given = problem(DINO, backend)
    expected = evaluate(DINO, backend, given)
    other = Problem(*(None if x is None else LAYOUTS[layout](x) for x in given))
    for x, y in zip(evaluate(DINO, backend, other), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    rows = [LAYOUTS[layout](x).requires_grad_() for x in given.student]
    loss = loss_of(DINO, backend, other, rows)
    gradients = torch.stack(torch.autograd.grad(loss, rows, incoming(loss)))
    torch.testing.assert_close(gradients, expected[1], rtol=1e-6, atol=1e-7)


@every_backend
def test_nan_reaches_what_it_should(backend: str) -> None:
    given = problem(DINO, backend)
    for view in (0, 3):
        student = given.student.clone()
        student[view, 1, 70] = torch.nan
        found = evaluate(DINO, backend, given._replace(student=student), "none")
        assert found[0].isnan().tolist() == [False, True, False]
        assert found[1].isnan().all(-1).nonzero().tolist() == [[view, 1]]
    teacher = given.teacher.clone()
    teacher[0, 2, 129] = torch.nan
    loss, gradient = evaluate(DINO, backend, given._replace(teacher=teacher), "none")
    assert loss.isnan().tolist() == [False, False, True]
    assert gradient.isnan().all(-1).nonzero().tolist() == [[s, 2] for s in range(1, DINO.S)]


@every_backend
def test_infinite_logits(backend: str) -> None:
    """A class that nobody may choose: its q and p are 0, and it adds nothing."""
    given = problem(DINO, backend)
    fewer = Problem(*(x if x is None else x[..., 1:] for x in given))
    masked = given._replace(student=given.student.clone(), teacher=given.teacher.clone())
    masked.student[..., 0] = masked.teacher[..., 0] = -torch.inf
    found, expected = evaluate(DINO, backend, masked), evaluate(DINO, backend, fewer)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][..., 1:], expected[1], rtol=1e-5, atol=1e-6)
    assert (found[1][..., 0] == 0).all()
    only_student = given._replace(student=masked.student)
    assert loss_of(DINO, backend, only_student, only_student.student) == torch.inf


@every_backend
@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -3e8])
def test_a_row_that_begins_with_masked_logits(backend: str, mask: float) -> None:
    case = Case(2, 3, 2, 1100)
    given = problem(case, backend)
    masked = given._replace(student=given.student.clone(), teacher=given.teacher.clone())
    masked.student[..., :600] = masked.teacher[..., :600] = mask
    found = evaluate(case, backend, masked)
    expected = evaluate(case, backend, Problem(*(x if x is None else x[..., 600:] for x in given)))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][..., 600:], expected[1], rtol=1e-5, atol=1e-6)
    assert (found[1][..., :600] == 0).all()


@every_type
@pytest.mark.parametrize("slope", [-40.0, 2.0, 40.0])
def test_logits_that_rise_or_fall_along_the_row(slope: float, backend: str, dtype: torch.dtype) -> None:
    """What sums are relative to rises from block to block, by little or by more than exponentials reach."""
    case = Case(3, 4, 2, 2100)
    given = problem(case, backend, dtype)
    ramp = torch.linspace(0, slope, case.K, dtype=dtype, device=given.student.device)
    given = given._replace(student=given.student + ramp, teacher=given.teacher + ramp)
    truth, plain = by_autograd(case, given.to(torch.float64)), by_autograd(case, given.to(given.centre.dtype))
    for x, y, z in zip(evaluate(case, backend, given), plain, truth, strict=True):
        assert_accurate(x, y, z, x.dtype, case.K)


@every_backend
@pytest.mark.parametrize("offset", [2e8, 6.1e8, -1.7e9])
def test_logits_so_large_that_their_products_are_rounded_by_more_than_exponentials_reach(
    backend: str, offset: float
) -> None:
    given = problem(DINO, backend)
    far = torch.full_like(given.student, offset)
    loss = distillation_loss(far, given.teacher, backend=backend)[0].item()
    assert loss == pytest.approx(math.log(DINO.K), rel=1e-5)
    loss = distillation_loss(far, far[: DINO.T], backend=backend)[0].item()
    assert loss == pytest.approx(math.log(DINO.K), rel=1e-5)


@every_backend
def test_the_gradient_is_0_where_probabilities_are_equal(backend: str) -> None:
    given = problem(Case(1, 1, 3, 1), backend)
    assert (evaluate(Case(1, 1, 3, 1), backend, given)[1] == 0).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
@pytest.mark.parametrize("K", [65536, 65543])
def test_gradients_larger_than_the_caches(backend: str, K: int) -> None:
    """They are stored another way where rows begin at whole vectors."""
    case = Case(1, 1, 140, K)
    given = problem(case, backend)
    student = given.student.requires_grad_()
    with poisoned_allocations():
        (found,) = torch.autograd.grad(loss_of(case, backend, given, student), student)
    p, q = (given.student / 0.1).softmax(-1), ((given.teacher - given.centre) / 0.04).softmax(-1)
    torch.testing.assert_close(found, (p - q) / (0.1 * case.N), rtol=1e-4, atol=1e-8)


@every_backend
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures(backend: str, temperature: float) -> None:
    given = problem(DINO, backend, spread=5.0)
    temperatures = temperature, temperature
    names = {"student_temperature": temperature, "teacher_temperature": temperature}
    found = distillation_loss(*given[:2], **names, centre=given.centre, backend=backend)[0]
    plain, truth = (
        definition(given.to(kind), DINO.all_pairs, "mean", temperatures) for kind in (torch.float32, torch.float64)
    )
    assert_accurate(found, plain, truth, torch.float32, DINO.K)


@every_backend
def test_a_common_offset_changes_nothing(backend: str) -> None:
    """Logits far from 0 lose what their type loses, and no more: the offset cancels before sums are rounded."""
    given = problem(DINO, backend)
    far = given._replace(student=(given.student + 512).contiguous(), teacher=given.teacher - 512)
    truth, plain = by_autograd(DINO, far.to(torch.float64)), by_autograd(DINO, far)
    for x, y, z in zip(evaluate(DINO, backend, far), plain, truth, strict=True):
        assert_accurate(x, y, z, torch.float32, DINO.K)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
def test_threads_do_not_decide_the_bits(backend: str) -> None:
    case = Case(2, 3, 21, 2050)
    given = problem(case, backend)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            mean = distillation_loss(given.student, given.teacher, backend=backend)[1]
            found.append((*evaluate(case, backend, given, "none"), mean, sinkhorn_centre(given.teacher, 0.1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@every_backend
def test_backward_twice_gives_equal_gradients(backend: str) -> None:
    given = problem(DINO, backend)
    student = given.student.requires_grad_()
    loss = loss_of(DINO, backend, given, student)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@every_backend
def test_saved_sums_of_another_layout(backend: str) -> None:
    given = problem(DINO, backend)
    scales = torch.tensor([10.0, 25.0], device=given.student.device).unbind()
    pairs = [i for pair in DINO.all_pairs for i in pair]
    args = [given.student], [given.teacher], given.centre, *scales, pairs
    losses, _, *sums = function.distillation_loss_op(*args, [True], backend)
    expected, found = (
        function.distillation_loss_backward_op(torch.ones_like(losses), *args, *map(layout, sums), [True], backend)[0]
        for layout in (Tensor.clone, LAYOUTS["transposed"])
    )
    assert torch.equal(found, expected)


@every_backend
def test_a_second_differentiation_raises(backend: str) -> None:
    given = problem(DINO, backend)
    for student in (given.student.requires_grad_(), [x.detach().requires_grad_() for x in given.student]):
        first = student if isinstance(student, Tensor) else student[0]
        (gradient,) = torch.autograd.grad(loss_of(DINO, backend, given, student), first, create_graph=True)
        with pytest.raises(RuntimeError, match="distillation_loss has no double backward"):
            gradient.sum().backward()


@every_backend
def test_functional_gradients_and_vmap(backend: str) -> None:
    given = problem(DINO, backend)
    _, expected = evaluate(DINO, backend, given)
    found = torch.func.grad(partial(loss_of, DINO, backend, given))(given.student)
    torch.testing.assert_close(found, -expected)
    of_list = torch.func.grad(lambda *x: loss_of(DINO, backend, given, list(x)), argnums=(0, 1, 2, 3, 4))
    torch.testing.assert_close(torch.stack(of_list(*given.student)), -expected)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(partial(loss_of, DINO, backend, given))(given.student[None])


@not_interpreted
@every_backend
def test_opcheck(backend: str) -> None:
    given = problem(Case(2, 3, 2, 9), backend)
    scales = torch.tensor(10.0), torch.tensor(25.0)
    student = [x.clone().requires_grad_() for x in given.student]
    pairs = [0, 1, 1, 0, 1, 2]
    args = student, [given.teacher], given.centre, *scales, pairs, [True, False, True], backend
    torch.library.opcheck(function.distillation_loss_op, args)
    _, _, *sums = function.distillation_loss_op(*args)
    given_back = torch.ones(2), [x.detach() for x in student], [given.teacher], None, *scales, pairs, *sums
    torch.library.opcheck(function.distillation_loss_backward_op, (*given_back, [True, False, True], backend))
    torch.library.opcheck(function.column_logsums_op, ([given.teacher], scales[0], given.centre, backend))


@not_interpreted
@every_backend
def test_compiled_whole(backend: str) -> None:
    given = problem(DINO, backend)
    student = [x.clone().requires_grad_() for x in given.student]

    def both(*student: Tensor) -> tuple[Tensor, Tensor]:
        centre = sinkhorn_centre(given.teacher, 0.05, backend=backend)
        loss, mean = distillation_loss(list(student), given.teacher, centre=centre, backend=backend)
        return 3 * loss, mean

    expected, found = both(*student), torch.compile(both, fullgraph=True)(*student)
    torch.testing.assert_close(found, expected)
    for x, y in zip(*(torch.autograd.grad(loss, student) for loss, _ in (found, expected)), strict=True):
        torch.testing.assert_close(x, y)


@not_interpreted
def test_what_cannot_be_served_raises() -> None:
    x, K = torch.randn(2, 3, 4), 4
    learned = torch.tensor(0.1, requires_grad=True)
    for message, args, named in (
        ("student must be .N, K. or .views", (x[0, 0], x), {}),
        ("student must be a tensor or a sequence", ([], x), {}),
        ("student must be .* of one N and K", ([x[0], x[0, :2]], x), {}),
        ("each of student .* one dtype", ([x[0], x[0].double()], x), {}),
        ("teacher must have rows and columns", (x, x[..., 1:]), {}),
        ("teacher and student must have one dtype", (x, x.double()), {}),
        ("without an empty dimension", (x[:, :0], x[:, :0]), {}),
        ("teacher must not require grad", (x, x.clone().requires_grad_()), {}),
        ("centre must be None or a real tensor .4.", (x, x), {"centre": torch.zeros(1, K)}),
        ("centre must not require grad", (x, x), {"centre": torch.zeros(K, requires_grad=True)}),
        ("weights must be None or a real tensor .3.", (x, x), {"weights": torch.zeros(4)}),
        ("student_temperature must be positive", (x, x), {"student_temperature": 0}),
        ("teacher_temperature must not require grad", (x, x), {"teacher_temperature": learned}),
        ("pairs must be .* got .0, 2.", (x, x), {"pairs": [(0, 2)]}),
        ("pairs must name at least one", (x, x), {"pairs": []}),
        ("reduction must be one of", (x, x), {"reduction": "batchmean"}),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_loss(*args, **named)
    for message, args, named in (
        ("teacher must not require grad", (x.clone().requires_grad_(), 0.1), {}),
        ("temperature must be positive", (x, -1.0), {}),
        ("iterations must be at least 1", (x, 0.1), {"iterations": 0}),
        ("iterations must be an integer", (x, 0.1), {"iterations": 1.5}),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn_centre(*args, **named)


def sinkhorn_knopp(x: Tensor, iterations: int) -> Tensor:
    """SwAV's assignments [N, K] for x = logits / epsilon: prototypes, then samples, of one matrix of sum 1."""
    q = (x.double() - x.max()).exp().T
    q = q / q.sum()
    K, N = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / K
        q = q / q.sum(0, keepdim=True) / N
    return (q * N).T


@every_type
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 40, 16), (2, 3, 1), (1, 1, 9), (2, 9, 4097), (2, 70, 7)], ids=str)
def test_sinkhorn_centre_gives_the_assignments_of_swav(backend: str, dtype: torch.dtype, shape: tuple) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64).to(device_of(backend), dtype)
    epsilon = 0.2
    for iterations in (1, 3):
        centre = sinkhorn_centre(teacher, epsilon, iterations=iterations, backend=backend)
        assert centre.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        found = ((teacher.double() - centre.double()) / epsilon).softmax(-1).flatten(0, 1)
        expected = sinkhorn_knopp(teacher.double().flatten(0, 1) / epsilon, iterations)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


@every_backend
def test_sinkhorn_centre_of_columns_that_underflow(backend: str) -> None:
    """Columns far below all others: exponentials relative to anything but their own greatest would vanish."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(2, 6, 300, generator=generator, dtype=torch.float64)
    teacher[..., ::3] -= 40
    found = sinkhorn_centre(list(teacher.float().to(device_of(backend))), 0.05, backend=backend)
    expected = sinkhorn_centre(teacher.float().double(), 0.05, backend="reference")
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@every_backend
def test_sinkhorn_centre_over_ranks(backend: str) -> None:
    """Half of the samples on either of two ranks, which reduce in turn."""
    generator = torch.Generator().manual_seed(4)
    halves = torch.randn(2, 8, 50, generator=generator).to(device_of(backend))
    other = [sinkhorn_logsums(halves, i, backend) for i in range(1, 4)]
    step = iter(other)
    found = sinkhorn_centre(halves[0], 0.1, reduce=lambda v: torch.logaddexp(v, next(step)), backend=backend)
    torch.testing.assert_close(found, sinkhorn_centre(halves, 0.1, backend=backend), rtol=1e-5, atol=1e-6)


@every_backend
def test_sinkhorn_centre_of_a_rank_without_samples(backend: str) -> None:
    sent = []
    teacher = torch.empty(2, 0, 50, device=device_of(backend))
    centre = sinkhorn_centre(teacher, 0.5, reduce=lambda v: (sent.append(v), torch.ones_like(v))[1], backend=backend)
    assert torch.equal(torch.stack(sent), torch.full_like(torch.stack(sent), -torch.inf)) and len(sent) == 3
    torch.testing.assert_close(centre, torch.full_like(centre, 0.5))


def sinkhorn_logsums(halves: Tensor, iteration: int, backend: str) -> Tensor:
    """What the second of two ranks sends in an iteration, from the centre that both had before."""
    x = halves[1] / 0.1
    if iteration > 1:
        v = sinkhorn_centre(halves, 0.1, iterations=iteration - 1, backend=backend) / 0.1
        x = x - (x - v).logsumexp(1, keepdim=True)
    return x.logsumexp(0)
