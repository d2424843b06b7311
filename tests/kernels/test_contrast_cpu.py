"""The compiled contrast kernels themselves: threads, numbers at the edge, memory."""

import math
import os
import threading

import pytest
import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.contrast import reference
from hsv_kernels.ops.tensors import computed_type
from tests.kernels.cases import LAYOUTS, assert_accurate, error, poisoned_allocations

if isinstance(compiled_module(), str):
    pytest.skip(compiled_module(), allow_module_level=True)

from hsv_kernels.ops.contrast import cpu

pytestmark = pytest.mark.compiled

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# N, D: a single pair, less than a panel, a panel, odd, several tiles, parts of unequal size.
SHAPES = [(1, 5), (2, 1), (3, 7), (16, 32), (33, 257), (97, 20), (290, 33)]


def views(n: int, dim: int, dtype: torch.dtype, kind: str = "random") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + dim)
    z0, noise = torch.randn(2, n, dim, generator=generator)
    z1 = {"random": noise, "easy": z0 + 0.1 * noise, "antipodal": -z0 + 1e-3 * noise, "same": z0}[kind]
    return z0.to(dtype), z1.to(dtype)


def scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=computed_type(like.dtype))


def by_reference(z0: Tensor, z1: Tensor, temperature: float, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """losses, dz0, dz1 and dtemperature of the definition, computed in `dtype`."""
    inputs = [x.to(dtype).requires_grad_() for x in (z0, z1, torch.tensor(temperature, dtype=dtype))]
    losses = reference.nt_xent(*inputs)
    return [losses.detach(), *torch.autograd.grad(losses, inputs, grad.to(dtype))]


def by_kernel(
    z0: Tensor,
    z1: Tensor,
    temperature: float,
    grad: Tensor,
    fixed_shift: bool | None,
    threads: int,
    bfloat16: bool = False,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    torch.set_num_threads(threads)  # here, because each thread of Python has a number of its own
    tau = scalar(temperature, z0)
    losses, *saved = cpu.nt_xent_forward(z0, z1, tau, fixed_shift, bfloat16, keep)
    return losses, *cpu.nt_xent_backward(grad, z0, z1, tau, *saved, True, True, fixed_shift, bfloat16)


def check(
    z0: Tensor,
    z1: Tensor,
    temperature: float,
    fixed_shift: bool,
    threads: int,
    scale: float = 1.0,
    learned: bool = True,
    bfloat16: bool = False,
    keep: bool = False,
) -> None:
    grad = scale * torch.rand(2 * len(z0), generator=torch.Generator().manual_seed(3))
    with poisoned_allocations():
        found = by_kernel(z0, z1, temperature, grad, fixed_shift, threads, bfloat16, keep)
    plain = by_reference(z0, z1, temperature, grad, scalar(0, z0).dtype)
    truth = by_reference(z0, z1, temperature, grad, torch.float64)
    if z0.shape[1] == 1:  # the gradient of x / |x| is 0
        plain[1:3] = truth[1:3] = [torch.zeros_like(z0)] * 2
    products = torch.bfloat16 if bfloat16 else z0.dtype
    dim = max(z0.shape[1], 16)  # for shorter sums the rounding of the exponents counts more than the bound allows
    for x, p, t in list(zip(found, plain, truth, strict=True))[: None if learned else 3]:
        assert_accurate(x, p, t, torch.bfloat16 if products == torch.bfloat16 else x.dtype, dim)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("fixed_shift", [True, False])
@pytest.mark.parametrize(("n", "dim"), SHAPES)
def test_every_shape_and_team(n: int, dim: int, fixed_shift: bool, threads: int) -> None:
    for dtype in DTYPES:
        check(*views(n, dim, dtype), 0.1, fixed_shift, threads)


@pytest.mark.parametrize("fixed_shift", [True, False])
@pytest.mark.parametrize("kind", ["random", "easy", "antipodal", "same"])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5])
def test_temperatures(kind: str, temperature: float, fixed_shift: bool) -> None:
    if fixed_shift and temperature < 0.02:
        pytest.skip("outside of the fixed shift's range")
    # The temperature's gradient is a difference of nearly equal sums where all similarities are nearly equal.
    check(*views(40, 48, torch.float32, kind), temperature, fixed_shift, 2, scale=65536.0, learned=kind != "same")


def test_parts_of_several_tiles() -> None:
    check(*views(850, 24, torch.float32), 0.1, True, 2)
    check(*views(850, 24, torch.float32), 0.1, False, 1)
    check(*views(850, 24, torch.bfloat16), 0.1, True, 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("n", "dim"), [*SHAPES, (470, 12)])
def test_kept_exponentials_change_nothing(n: int, dim: int, threads: int) -> None:
    for dtype in DTYPES:
        z0, z1 = views(n, dim, dtype)
        grad = torch.rand(2 * n, generator=torch.Generator().manual_seed(5))
        with poisoned_allocations():
            expected, found = (by_kernel(z0, z1, 0.1, grad, True, threads, keep=keep) for keep in (False, True))
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.parametrize("fixed_shift", [True, False])
@pytest.mark.parametrize(("n", "dim"), SHAPES)
def test_bfloat16_products_of_float32_rows(n: int, dim: int, fixed_shift: bool) -> None:
    for threads in (1, 2):
        check(*views(n, dim, torch.float32), 0.1, fixed_shift, threads, bfloat16=True, keep=fixed_shift)


def test_the_kernel_chooses_the_shift() -> None:
    """By a bound on the logits: to the bit what that shift gives, for a temperature that only the kernel reads too."""
    z0, z1 = views(60, 24, torch.float32)
    for temperature, fixed_shift in ((0.1, True), (0.012, False)):
        expected, found = (by_kernel(z0, z1, temperature, torch.ones(120), shift, 2) for shift in (fixed_shift, None))
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    for scale, fixed_shift in ((0.1, True), (10.0, False)):  # of rows whose squares are about 24
        expected, found = (cpu.square_logsumexp_forward(z0, torch.tensor(scale), True, s) for s in (fixed_shift, None))
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.parametrize("fixed_shift", [True, False])
def test_small_losses_keep_their_digits(fixed_shift: bool) -> None:
    z0, z1 = views(128, 256, torch.float32, "easy")
    grad = torch.full((256,), 1 / 256)
    found = by_kernel(z0, z1, 0.05, grad, fixed_shift, 2)
    truth = by_reference(z0, z1, 0.05, grad, torch.float64)
    assert truth[0].max() < 1e-4
    assert ((found[0] - truth[0]) / truth[0]).abs().max() <= 1e-5
    assert all(error(x, t) <= 1e-5 for x, t in zip(found[1:], truth[1:], strict=True))


@pytest.mark.parametrize("scale", [-1.5, 0.0, 0.25, 20.0])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (2, 1), (45, 7), (401, 65)])
def test_square_logsumexp(n: int, dim: int, exclude_self: bool, scale: float) -> None:
    torch.set_num_threads(2)
    grad = torch.rand(n, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        q, plain, truth = views(n, dim, dtype)[0], [], []
        for results, wide in ((plain, scalar(0, q).dtype), (truth, torch.float64)):
            inputs = [x.to(wide).requires_grad_() for x in (q, torch.tensor(scale))]
            lse = reference.similarity_logsumexp(inputs[0], None, inputs[1], exclude_self, 0, None, None, None)
            results += [lse.detach(), *torch.autograd.grad(lse, inputs, grad.to(wide))]
        with poisoned_allocations():
            lse, sums = cpu.square_logsumexp_forward(q, scalar(scale, q), exclude_self)
            found = [lse, *cpu.square_logsumexp_backward(grad, q, scalar(scale, q), sums, exclude_self, True, True)]
        for x, p, t in zip(found, plain, truth, strict=True):
            assert_accurate(x, p, t, dtype if dtype == torch.bfloat16 else x.dtype, max(dim, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_equal_bits(layout: str) -> None:
    for dtype in DTYPES:
        z0, z1 = views(37, 19, dtype)
        grad = torch.rand(74)
        expected = by_kernel(z0, z1, 0.1, grad, True, 2)
        found = by_kernel(LAYOUTS[layout](z0), LAYOUTS[layout](z1), 0.1, LAYOUTS[layout](grad), True, 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_repeats_are_equal_to_the_bit(threads: int) -> None:
    z0, z1 = views(290, 33, torch.float32)
    grad = torch.rand(580)
    for fixed_shift in (True, False):
        first, *others = (by_kernel(z0, z1, 0.1, grad, fixed_shift, threads) for _ in range(4))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_what_is_not_needed_is_not_computed() -> None:
    (z0, z1), tau = views(50, 16, torch.float32), torch.tensor(0.1)
    _, *saved = cpu.nt_xent_forward(z0, z1, tau, True)
    arguments = (torch.ones(100), z0, z1, tau, *saved)
    dz0, dz1, dtau = cpu.nt_xent_backward(*arguments, True, True)
    assert cpu.nt_xent_backward(*arguments, False, False) == (None, None, None)
    only_z = cpu.nt_xent_backward(*arguments, True, False)
    assert torch.equal(only_z[0], dz0) and torch.equal(only_z[1], dz1) and only_z[2] is None
    only_tau = cpu.nt_xent_backward(*arguments, False, True)
    assert only_tau[:2] == (None, None) and torch.equal(only_tau[2], dtau)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F8001FF, -1, -0x400000 + 0x1C3])
@pytest.mark.parametrize("fixed_shift", [True, False])
def test_nan_of_any_payload_comes_through(bits: int, fixed_shift: bool) -> None:
    for n in (1, 20):
        z0, z1 = views(n, 9, torch.float32)
        z1[n // 2].view(torch.int32)[4] = bits
        assert z1.isnan().sum() == 1
        for x in by_kernel(z0, z1, 0.1, torch.ones(2 * n), fixed_shift, 2)[: 4 if n > 1 else 1]:
            assert x.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperature_gives_nan(temperature: float) -> None:
    losses, *gradients = by_kernel(*views(5, 4, torch.float32), temperature, torch.ones(10), False, 1)
    assert losses.isnan().all() and all(x.isnan().all() for x in gradients)


def test_single_pair_has_no_loss() -> None:
    for dtype in DTYPES:
        for x in by_kernel(*views(1, 6, dtype), 0.1, torch.ones(2), True, 2):
            assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-8, 1e-10])
def test_temperatures_that_leave_one_candidate(temperature: float) -> None:
    """Logits of 1e10: a rounded lse would be off by more than the distance between candidates."""
    z0, z1 = views(64, 32, torch.float32)
    grad = torch.ones(128)
    found = by_kernel(z0, z1, temperature, grad, None, 2)
    truth = by_reference(z0, z1, temperature, grad, torch.float64)
    for x, t in zip(found[:3], truth[:3], strict=True):
        assert error(x, t) <= 1e-5


@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e6])
def test_rows_that_nothing_normalised(size: float) -> None:
    q, scale = size * views(300, 32, torch.float32)[0], torch.tensor(1.3)
    for exclude_self in (True, False):
        lse, sums = cpu.square_logsumexp_forward(q, scale, exclude_self)
        dq, _ = cpu.square_logsumexp_backward(torch.ones(300), q, scale, sums, exclude_self, True, False)
        given = q.double().requires_grad_()
        truth = reference.similarity_logsumexp(given, None, 1.3, exclude_self, 0, None, None, None)
        assert error(lse, truth) <= 1e-6
        assert error(dq, torch.autograd.grad(truth.sum(), given)[0]) <= 1e-5


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_incoming_gradients_of_any_size(size: float) -> None:
    z0, z1 = views(40, 24, torch.float32, "easy")
    expected, found = (by_kernel(z0, z1, 1 / 55, torch.full((80,), grad), True, 2)[1:] for grad in (1.0, size))
    for x, y in zip(expected, found, strict=True):
        torch.testing.assert_close(y.double() / size, x.double(), rtol=1e-5, atol=1e-6 * x.abs().max().item())


def test_rows_whose_candidates_are_minus_infinity() -> None:
    q = torch.tensor([[1e20], [-1e20]])
    assert cpu.square_logsumexp_forward(q, torch.tensor(1.0), True)[0].tolist() == [-math.inf, -math.inf]


def test_norms_at_the_edge() -> None:
    z0, z1 = views(12, 8, torch.float32)
    z0[3], z1[5] = 0, 1e-14 * z1[5]
    check(z0, z1, 0.1, True, 2)
    expected = by_kernel(*views(12, 8, torch.float32), 0.1, torch.ones(24), True, 1)[0]
    for factor in (1e30, 1e-8):  # squares leave float32's range
        found = by_kernel(z0 := views(12, 8, torch.float32)[0] * factor, z1, 0.1, torch.ones(24), True, 1)
        assert all(x.isfinite().all() for x in found)
    found = by_kernel(*(x * 1e25 for x in views(12, 8, torch.float32)), 0.1, torch.ones(24), True, 1)[0]
    torch.testing.assert_close(found, expected)


def test_half_precision_is_read_and_rounded_exactly() -> None:
    """All finite float16 values, subnormals too, in; gradients from overflow down to subnormals out."""
    values = torch.arange(0, 31744, 13, dtype=torch.int16).view(torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        q = values.to(dtype)[:, None] * torch.tensor([1, -1], dtype=dtype)
        expected, found = (cpu.nt_xent_forward(x, x.flip(0), torch.tensor(1.0), True)[2] for x in (q.float(), q))
        assert error(found, expected) <= (1e-2 if dtype == torch.bfloat16 else 0)  # bfloat16 products

        q, scale = torch.randn(60, 5).to(dtype), torch.tensor(0.5)
        sums = cpu.square_logsumexp_forward(q, scale, True)[1]
        for size in (1e-7, 1e-3, 1.0, 7e4, 1e38):
            dq, dq32 = (
                cpu.square_logsumexp_backward(
                    *(torch.full((60,), 0.7 * size), x, scale, sums, True, True, False),
                    bfloat16=dtype == torch.bfloat16,
                )[0]
                for x in (q, q.float())
            )
            assert dq.dtype == dtype and torch.equal(dq, dq32.to(dtype))


def test_two_python_threads_at_once() -> None:
    cases = [(*views(n, 40, torch.float32), 0.1, torch.ones(2 * n), True, 2) for n in (200, 230)]
    expected = [by_kernel(*case) for case in cases]
    wrong = []

    def work(case: tuple, want: tuple[Tensor, ...]) -> None:
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(by_kernel(*case), want, strict=True)):
                wrong.append(case)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_forked_child_computes_alone() -> None:
    case = (*views(150, 40, torch.float32), 0.1, torch.ones(300), True)
    alone = by_kernel(*case, 1)
    by_kernel(*case, 2)  # the pool of threads exists, in the parent alone
    child = os.fork()
    if child == 0:
        equal = all(torch.equal(a, b) for a, b in zip(by_kernel(*case, 2), alone, strict=True))
        os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_workspace_is_bounded() -> None:
    """Gradients and workspace together: at most 4·M·D·4 bytes, some values per row and a tile per thread."""
    n, dim, threads = 4096, 128, 2
    z = torch.empty(n, dim)
    torch.set_num_threads(threads)
    for fixed_shift in (True, False):
        problem = cpu._problem((z, z), 10.0, True, fixed_shift, False)
        rows, tiles = 2 * n * dim * 4, threads * 160 * 1024
        assert compiled_module().contrast_workspace(problem, False) <= rows + 2 * n * 20 + tiles
        gradients = 2 * n * dim * 4
        assert compiled_module().contrast_workspace(problem, True) + gradients <= 4 * rows + 2 * n * 24 + tiles
