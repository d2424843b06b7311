"""negative_cosine on every backend of this machine against its definition in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels import negative_cosine
from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.cosine import function
from tests.kernels.cases import (
    LAYOUTS,
    assert_accurate,
    device_of,
    incoming,
    poisoned_allocations,
    serves,
    usable_backends,
)

BACKENDS = usable_backends("cosine")
HALVES = (torch.bfloat16, torch.float16)
TYPED = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in BACKENDS
    for dtype in (torch.float32, torch.float64, *HALVES)
    if serves("cosine", name, dtype)
]
SHAPES = [(1, 1), (3, 2), (2, 7), (5, 16), (4, 33), (7, 100), (2, 515), (1, 2048)]
every_type = pytest.mark.parametrize(("backend", "dtype"), TYPED)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_double = pytest.mark.parametrize("backend", [name for name in BACKENDS if serves("cosine", name, torch.float64)])
on_cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])


def problem(n: int, dim: int, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of different norms."""
    generator = torch.Generator().manual_seed(100 * n + dim)
    p, z = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    p, z = (x * torch.linspace(0.1, 5, n, dtype=torch.float64)[:, None] for x in (p, z.flip(0)))
    return p.to(device_of(backend), dtype), z.to(device_of(backend), dtype)


def definition(p: Tensor, z: Tensor, eps: float = 1e-8) -> Tensor:
    """−cos of each row, [N]."""
    return -(F.normalize(p, eps=eps) * F.normalize(z, eps=eps)).sum(1)


def evaluate(p: Tensor, z: Tensor, backend: str, wanted: str = "pz", **options: Any) -> list[Tensor]:
    """Losses and the gradients that are wanted."""
    leaves = {"p": p.detach().requires_grad_("p" in wanted), "z": z.detach().requires_grad_("z" in wanted)}
    losses = negative_cosine(**leaves, backend=backend, **{"reduction": "none", **options})
    return [losses.detach(), *torch.autograd.grad(losses, [leaves[name] for name in wanted], incoming(losses))]


def by_autograd(p: Tensor, z: Tensor, eps: float = 1e-8) -> list[Tensor]:
    """Losses and gradients of the definition, differentiated by PyTorch."""
    p, z = (x.detach().requires_grad_() for x in (p, z))
    losses = definition(p, z, eps)
    return [losses.detach(), *torch.autograd.grad(losses, (p, z), incoming(losses))]


@every_type
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_match_the_definition(shape: tuple[int, int], backend: str, dtype: torch.dtype) -> None:
    p, z = problem(*shape, backend, dtype)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    found = evaluate(p, z, backend)
    truth, plain = by_autograd(p.double(), z.double()), by_autograd(p.to(single), z.to(single))
    assert [x.dtype for x in found] == [single, dtype, dtype]
    assert_accurate(found[0], plain[0], truth[0], single, shape[1])
    # at D = 1 the gradient is 0: the error is relative to its two terms
    scales = [(incoming(found[0]).double().abs() / x.double().norm(dim=1)).max().item() for x in (p, z)]
    for x, y, exact, scale in zip(found[1:], plain[1:], truth[1:], scales, strict=True):
        assert_accurate(x, y, exact, dtype, shape[1], scale)
        if dtype in HALVES:  # one rounding, at the end
            margin = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * scale + 1e-7
            assert ((x.double() - exact).abs() <= margin).all()


@every_backend
@pytest.mark.parametrize("wanted", ["p", "z"])
def test_one_gradient_alone_is_the_same(wanted: str, backend: str) -> None:
    p, z = problem(5, 33, backend)
    both = evaluate(p, z, backend)
    losses, gradient = evaluate(p, z, backend, wanted)
    assert torch.equal(losses, both[0]) and torch.equal(gradient, both[1 + "pz".index(wanted)])
    dp, dz = kernels_of("cosine", backend).backward(
        *(incoming(losses), p, z, *function.negative_cosine_op(p, z, 1e-8, backend), 1e-8),
        *(name == wanted for name in "pz"),
    )
    assert (dp is None) == (wanted == "z") and (dz is None) == (wanted == "p")


@every_backend
def test_nothing_is_recorded_without_a_wanted_gradient(backend: str) -> None:
    p, z = problem(3, 8, backend)
    assert negative_cosine(p, z, backend=backend).grad_fn is None
    with torch.no_grad():
        assert negative_cosine(p.requires_grad_(), z, backend=backend).grad_fn is None


@every_type
def test_rows_below_eps(backend: str, dtype: torch.dtype) -> None:
    """A zero row, one below eps, one above; eps is the norm of the first two, in value and in gradient."""
    eps = 0.01
    p, z = problem(4, 24, backend, dtype)
    p[0], p[1], z[2] = 0, p[1] / 10_000, z[2] / 10_000
    found, truth = evaluate(p, z, backend, eps=eps), by_autograd(p.double(), z.double(), eps)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    plain = by_autograd(p.to(single), z.to(single), eps)
    assert found[0][0] == 0 and (found[1][0] != 0).any() and (found[2][0] == 0).all()
    for x, y, exact in zip(found, plain, truth, strict=True):
        for row in range(4):
            assert_accurate(x[row], y[row], exact[row], single if x.dim() == 1 else dtype, 24)


@every_backend
def test_gradients_of_tiny_rows(backend: str) -> None:
    """1 / (‖p‖ ‖z‖) is beyond float32; the gradients, of length 1 / ‖p‖, are not."""
    p, z = problem(4, 24, backend)
    p[0], z[0], p[2], z[2], p[3] = 0, z[0] * 1e-15, 0, 0, p[3] * 1e15
    found, truth = evaluate(p, z, backend, eps=1e-25), by_autograd(p.double(), z.double(), 1e-25)
    assert truth[1][0].norm() > 1e24
    for x, exact in zip(found, truth, strict=True):
        scale = exact.abs() if exact.dim() == 1 else exact.abs().amax(1, keepdim=True)
        assert ((x - exact).abs() <= 1e-5 * scale).all()


@in_double
def test_values_are_those_of_cosine_similarity(backend: str) -> None:
    p, z = problem(6, 40, backend, torch.float64)
    p[0], p[1] = 0, p[1] * 1e-10
    torch.testing.assert_close(
        negative_cosine(p, z, reduction="none", backend=backend), -F.cosine_similarity(p, z), rtol=1e-13, atol=1e-15
    )


@every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["p", "z"])
def test_what_is_not_finite_shows_in_its_row_and_nowhere_else(name: str, value: float, backend: str) -> None:
    p, z = problem(5, 40, backend)
    {"p": p, "z": z}[name][3, 17] = value
    losses, dp, dz = evaluate(p, z, backend)
    hit = torch.arange(5, device=p.device) == 3
    for x in (losses, dp.sum(1), dz.sum(1)):
        assert torch.equal(x.isnan(), hit)


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, backend: str) -> None:
    p, z = problem(6, 37, backend)
    expected = evaluate(p, z, backend)
    for given in ((LAYOUTS[layout](p), z), (p, LAYOUTS[layout](z))):
        for x, y in zip(evaluate(*given, backend), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@every_backend
def test_expanded_rows_and_gradients(backend: str) -> None:
    p, z = problem(6, 37, backend)
    p, z = p[:1].expand_as(p), z[:, :1].expand_as(z)
    for x, y in zip(evaluate(p, z, backend), evaluate(p.contiguous(), z.contiguous(), backend), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    leaf = z.contiguous().requires_grad_()
    losses = negative_cosine(p, leaf, reduction="none", backend=backend)
    one_by_one = torch.autograd.grad(losses, leaf, torch.ones_like(losses), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(losses.sum(), leaf)[0], one_by_one)


@every_backend
def test_nothing_stays_unwritten(backend: str) -> None:
    p, z = problem(5, 33, backend)
    expected = evaluate(p, z, backend)
    with poisoned_allocations():
        found = evaluate(p, z, backend)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@on_cpu
def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    p, z = problem(301, 700, backend)
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)  # the fixture one_thread brings the number back
        found.append(evaluate(p, z, backend))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@in_double
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, backend: str) -> None:
    p, z = problem(3, 5, backend, torch.float64)
    p[1] *= 1e-3  # below eps
    torch.autograd.gradcheck(
        lambda p, z: negative_cosine(p, z, reduction=reduction, eps=0.05, backend=backend),
        (p.requires_grad_(), z.requires_grad_()),
        eps=1e-7,
    )


@every_backend
def test_reductions(backend: str) -> None:
    p, z = problem(5, 9, backend)
    losses = definition(p, z)
    for reduction, expected in (("mean", losses.mean()), ("sum", losses.sum()), ("none", losses)):
        torch.testing.assert_close(negative_cosine(p, z, reduction=reduction, backend=backend), expected)


@every_backend
def test_double_backward_raises(backend: str) -> None:
    p, z = problem(3, 8, backend)
    (dp,) = torch.autograd.grad(negative_cosine(p.requires_grad_(), z, backend=backend), p, create_graph=True)
    with pytest.raises(RuntimeError, match="negative_cosine has no double backward"):
        dp.square().sum().backward()


@every_backend
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    p, z = problem(4, 20, backend)
    with torch.autocast(device_of(backend).type, dtype=torch.bfloat16):
        found = evaluate(p, z, backend)
    assert all(torch.equal(x, y) for x, y in zip(found, evaluate(p, z, backend), strict=True))


@every_backend
def test_operators_are_registered_rightly(backend: str) -> None:
    p, z = problem(3, 8, backend)
    torch.library.opcheck(function.negative_cosine_op, (p.clone().requires_grad_(), z, 1e-8, backend))
    losses, inv_norm = function.negative_cosine_op(p, z, 1e-8, backend)
    for needs in ((True, True), (True, False), (False, True)):
        inputs = (incoming(losses), p, z, losses, inv_norm, 1e-8, *needs, backend)
        torch.library.opcheck(function.negative_cosine_backward_op, inputs)


@every_backend
@pytest.mark.filterwarnings("ignore")
def test_compiles_as_one_graph(backend: str) -> None:
    p, z = problem(4, 20, backend)
    expected = evaluate(p, z, backend, "p", reduction="mean")
    compiler = "inductor" if backend == "cpu" else "aot_eager"  # one is enough of the slow one
    double = torch.compile(lambda p, z: 2 * negative_cosine(p, z, backend=backend), fullgraph=True, backend=compiler)
    loss = double(p.requires_grad_(), z)
    loss.backward()
    torch.testing.assert_close(loss, 2 * expected[0])
    torch.testing.assert_close(p.grad, -2 * expected[1])  # evaluate weighs a single loss by −1


@every_backend
def test_functional_gradient(backend: str) -> None:
    p, z = problem(4, 20, backend)
    found = torch.func.grad(lambda p: negative_cosine(p, z, backend=backend))(p)
    torch.testing.assert_close(found, -evaluate(p, z, backend, "p", reduction="mean")[1])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda p: negative_cosine(p, z, backend=backend))(p[None])


ROWS = torch.ones(4, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"p": [1.0]}, "p must be a tensor; got list"),
        ({"p": torch.ones(4, 3, dtype=torch.int64)}, "p must be float32, .* got torch.int64"),
        ({"p": torch.ones(4)}, r"p must be \[N, D\] .* got \[4\]"),
        ({"p": torch.ones(0, 3), "z": torch.ones(0, 3)}, r"without an empty dimension; got \[0, 3\]"),
        ({"z": torch.ones(5, 3)}, r"z must have the shape of p, \[4, 3\]; got \[5, 3\]"),
        ({"z": torch.ones(4, 3, dtype=torch.float64)}, "z and p must have one dtype; got torch.float64"),
        ({"z": torch.ones(4, 3, device="meta")}, "z and p must be on one device; got meta and cpu"),
        ({"eps": 0.0}, "eps must be positive and finite; got 0.0"),
        ({"eps": 1e-60}, "eps must be in .* the range of torch.float32; got 1e-60"),
        ({"eps": torch.tensor(1e-8)}, r"eps must be a number; got a tensor of shape \[\]"),
        ({"reduction": "batch"}, "reduction must be one of mean, sum, none; got 'batch'"),
        ({"backend": "gpu"}, "backend must be one of auto, reference, cpu, triton, cuda; got 'gpu'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        negative_cosine(**{"p": ROWS, "z": ROWS, **arguments})
