"""NT-Xent and the square logsumexp on every backend against float64: values, gradients, layouts."""

import importlib
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hsv_kernels import backends, nt_xent, similarity_logsumexp
from hsv_kernels.backends import interpreting
from tests.kernels.cases import (
    LAYOUTS,
    TILED,
    assert_accurate,
    device_of,
    error,
    poisoned_allocations,
    serves,
    take_tiles_of,
    usable_backends,
)

BACKENDS = usable_backends("contrast")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS_AND_DTYPES = [(b, d) for b in BACKENDS for d in DTYPES if serves("contrast", b, d)]
#: [N, D]: one pair, no second dimension, sub-tile, odd, more than one tile, D in several chunks, groups of several
#: tiles, D beyond what tiles hold.
SHAPES = [(1, 5), (2, 1), (3, 7), (37, 19), (67, 64), (19, 130), (131, 33), (225, 16), (5, 257), (141, 260)]


def two_views(kind: str, n: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] of two views: random, antipodal, identical or easy (the views nearly equal)."""
    generator = torch.Generator().manual_seed(seed)
    z0, z1, noise = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    if kind == "antipodal":
        z1 = -z0 + 1e-3 * noise
    elif kind == "identical":
        z0 = z1 = z0[:1].expand(n, dim).clone()
    elif kind == "easy":
        z1 = z0 + 0.05 * noise
    return z0.to(dtype), z1.to(dtype)


def run_nt_xent(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, grad: Tensor, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """[losses, dz0, dz1] and, for a tensor, dtemperature, computed in `dtype`; a layout stays where the dtype does."""
    z0, z1 = (z.to(device_of(backend), dtype).detach().requires_grad_() for z in (z0, z1))
    inputs = [z0, z1]
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z0.device).detach().requires_grad_()
        inputs.append(temperature)
    losses = nt_xent(z0, z1, temperature, reduction="none", backend=backend)
    gradients = torch.autograd.grad(losses, inputs, grad.to(losses.device, losses.dtype))
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    return [losses.detach(), *gradients]


def run_logsumexp(
    q: Tensor, scale: float | Tensor, exclude_self: bool, grad: Tensor, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """[lse, dq] and, for a tensor, dscale, computed in `dtype`."""
    q = q.to(device_of(backend), dtype).detach().requires_grad_()
    inputs = [q]
    if isinstance(scale, Tensor):
        scale = scale.to(q.device).detach().requires_grad_()
        inputs.append(scale)
    lse = similarity_logsumexp(q, scale=scale, exclude_self=exclude_self, backend=backend)
    return [lse.detach(), *torch.autograd.grad(lse, inputs, grad.to(lse.device, lse.dtype))]


def check(
    run: Callable[..., list[Tensor]],
    *args: object,
    backend: str,
    dtype: torch.dtype,
    dim: int,
    scales: list[float | None] | None = None,
) -> None:
    """run(…) by `backend` in `dtype` obeys the error rule, output by output, and gives the same bits twice.

    `scales` says what the errors of the outputs are relative to, if not to the largest value.
    """
    truth = run(*args, backend="reference", dtype=torch.float64)
    plain = run(*args, backend="reference", dtype=torch.float32)
    with poisoned_allocations():
        found = run(*args, backend=backend, dtype=dtype)
        again = found if interpreting() else run(*args, backend=backend, dtype=dtype)
    for i, (kernel, repeat) in enumerate(zip(found, again, strict=True)):
        assert_accurate(kernel, plain[i], truth[i], dtype, dim, scales[i] if scales else None)
        assert torch.equal(kernel, repeat)


def incoming(rows: int) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("n, dim", SHAPES)
@pytest.mark.parametrize("learned", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_nt_xent_shapes(backend: str, dtype: torch.dtype, learned: bool, n: int, dim: int) -> None:
    z0, z1 = two_views("random", n, dim, dtype)
    temperature = torch.tensor(0.1, dtype=torch.float64) if learned else 0.1
    # in one dimension the rows are ±1 and their gradient vanishes: errors are relative to the terms of the projection
    steep = 10 / min(z0.abs().min().item(), z1.abs().min().item())
    scales = [None, steep, steep, None] if dim == 1 else None
    check(run_nt_xent, z0, z1, temperature, incoming(2 * n), backend=backend, dtype=dtype, dim=dim, scales=scales)


@pytest.mark.parametrize("temperature", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nt_xent_online_in_several_tiles(backend: str, temperature: float | Tensor) -> None:
    z0, z1 = two_views("random", 131, 33, torch.float32)
    check(run_nt_xent, z0, z1, temperature, incoming(262), backend=backend, dtype=torch.float32, dim=33)


@pytest.mark.parametrize("n, dim", [(131, 33), (129, 130)])
@pytest.mark.parametrize("temperature", [0.1, 0.01, torch.tensor(0.1)], ids=["fixed", "online", "device"])
@pytest.mark.parametrize("backend, architecture", [("triton", architecture) for architecture in TILED])
def test_nt_xent_tiles_of_each_architecture(
    backend: str, architecture: int, temperature: float | Tensor, n: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles higher than wide and wider than high, ragged at both ends, D in one chunk and in several."""
    take_tiles_of(architecture, monkeypatch)
    z0, z1 = two_views("random", n, dim, torch.bfloat16)
    check(run_nt_xent, z0, z1, temperature, incoming(2 * n), backend=backend, dtype=torch.bfloat16, dim=dim)


@pytest.mark.parametrize("kind", ["random", "antipodal", "identical", "easy"])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5, torch.tensor(0.01), torch.tensor(0.05), torch.tensor(0.5)])
@pytest.mark.parametrize("backend, dtype", [(b, d) for b, d in BACKENDS_AND_DTYPES if d != torch.float16])
def test_nt_xent_range(backend: str, dtype: torch.dtype, temperature: float | Tensor, kind: str) -> None:
    """With the incoming gradient of a loss scaler."""
    z0, z1 = two_views(kind, 21, 24, dtype)
    grad = 65536 * torch.ones(42)
    steep = 65536 / float(temperature)
    scales = [1.0, steep, steep, 42 * steep / float(temperature)] if kind == "identical" else None
    check(run_nt_xent, z0, z1, temperature, grad, backend=backend, dtype=dtype, dim=24, scales=scales)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_gradient_in_half(backend: str) -> None:
    """An incoming gradient beyond the range of float16, whose products with the rows' inverse norms are in it."""
    z0, z1 = (1000 * z for z in two_views("random", 21, 24, torch.float16))
    check(run_nt_xent, z0, z1, 0.2, 65536 * torch.ones(42), backend=backend, dtype=torch.float16, dim=24)


@pytest.mark.parametrize("size", [0.0, 1e-42])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vanishing_gradient_in_half(backend: str, size: float) -> None:
    """An incoming gradient whose quotient by the range of float16 is 0."""
    z0, z1 = two_views("random", 5, 16, torch.float16)
    k = z1.to(device_of(backend)).requires_grad_()
    found = run_nt_xent(z0, z1, 0.2, torch.full((10,), size), backend, torch.float16)[1:]
    found += run_logsumexp(z0, 0.1, True, torch.full((5,), size), backend, torch.float16)[1:]
    lse = similarity_logsumexp(z0.to(k.device), k, scale=0.1, backend=backend)
    found += torch.autograd.grad(lse, k, torch.full_like(lse, size))
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_one_chunk_of_similarities_at_a_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix products of wide rows: what one chunk of rows took is free before the next begins."""
    triton_square_matmul = importlib.import_module("hsv_kernels.ops.contrast.triton_square_matmul")
    monkeypatch.setattr(triton_square_matmul, "LARGEST_TILED_DIM", 0)
    product, seen = triton_square_matmul.product, []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        if b.shape[1] == 20:
            assert not any(x() is not None for x in seen)
        found = product(a, b)
        seen.extend(weakref.ref(x) for x in (a, found) if x.shape[1] == 20)
        return found

    monkeypatch.setattr(triton_square_matmul, "product", watched)
    z0, z1 = two_views("random", 10, 8, torch.float32)
    run_nt_xent(z0, z1, 0.2, incoming(20), backend, torch.float32)
    assert len(seen) == 6  # similarities and weights of three chunks


@pytest.mark.parametrize("temperature", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_easy_positives_keep_their_digits(backend: str, temperature: float | Tensor) -> None:
    z0, z1 = two_views("easy", 40, 256, torch.float32)
    grad = torch.full((80,), 1 / 80)
    truth = run_nt_xent(z0, z1, temperature, grad, "reference", torch.float64)
    found = run_nt_xent(z0, z1, temperature, grad, backend, torch.float32)
    assert truth[0].max() < 1e-4
    assert ((found[0].cpu() - truth[0]).abs() <= 1e-5 * truth[0]).all()
    assert all(error(x, t) <= 1e-5 for x, t in zip(found[1:], truth[1:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_close(backend: str) -> None:
    """Tighter than the error rule, which half precision meets by far."""
    for dtype, most in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        z0, z1 = two_views("random", 30, 48, dtype)
        truth = run_nt_xent(z0, z1, torch.tensor(0.2), incoming(60), "reference", torch.float64)
        found = run_nt_xent(z0, z1, torch.tensor(0.2), incoming(60), backend, dtype)
        assert all(error(x, t) <= most for x, t in zip(found, truth, strict=True)), dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_products_of_float32_embeddings(backend: str) -> None:
    z0, z1 = two_views("easy", 45, 48, torch.float32)
    inputs = [z.to(device_of(backend)).requires_grad_() for z in (z0, z1)]
    losses = nt_xent(*inputs, 0.2, reduction="none", dot_dtype=torch.bfloat16, backend=backend)
    found = [losses.detach(), *torch.autograd.grad(losses.sum(), inputs)]
    truth = run_nt_xent(z0, z1, 0.2, torch.ones(90), "reference", torch.float64)
    assert all(x.dtype == torch.float32 and error(x, t) <= 1e-2 for x, t in zip(found, truth, strict=True))
    exact = nt_xent(*inputs, 0.2, reduction="none", backend=backend)
    if backend != "cpu" or backends()["contrast"]["cpu"].endswith("avx512bf16"):
        assert not torch.equal(losses, exact)


@pytest.mark.parametrize("n, dim", [(1, 4), (2, 1), (37, 19), (65, 257)])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_square_logsumexp_shapes(backend: str, dtype: torch.dtype, exclude_self: bool, n: int, dim: int) -> None:
    q, _ = two_views("random", n, dim, dtype)
    scale = torch.tensor(0.3, dtype=torch.float64)
    check(run_logsumexp, q, scale, exclude_self, incoming(n), backend=backend, dtype=dtype, dim=dim)


@pytest.mark.parametrize("scale", [10.0, 1, 0.0, -3.0, torch.tensor(20.0), torch.tensor(0.0), torch.tensor(-5.0)])
@pytest.mark.parametrize("backend, dtype", [(b, d) for b, d in BACKENDS_AND_DTYPES if d in DTYPES[:2]])
def test_square_logsumexp_scales(backend: str, dtype: torch.dtype, scale: float | Tensor) -> None:
    q = two_views("random", 23, 12, dtype)[0] / 2
    check(run_logsumexp, q, scale, True, incoming(23), backend=backend, dtype=dtype, dim=12)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: str) -> None:
    z0, z1 = two_views("random", 19, 21, torch.float32)
    grad = incoming(38)
    arrange = LAYOUTS.get(layout, lambda x: x[..., :1].expand(x.shape))
    values = arrange(z0), arrange(z1), arrange(grad)
    plain = run_nt_xent(*(v.contiguous() for v in values[:2]), 0.1, values[2].contiguous(), backend, torch.float32)
    moved = [arrange(v.to(device_of(backend))) for v in (z0, z1, grad)]
    found = run_nt_xent(*moved[:2], 0.1, moved[2], backend, torch.float32)
    assert all(error(x, t) <= 1e-6 for x, t in zip(found, plain, strict=True))

    q = run_logsumexp(z0 if layout == "contiguous" else moved[0], 0.5, True, moved[2][:19], backend, torch.float32)
    p = run_logsumexp(values[0].contiguous(), 0.5, True, values[2][:19].contiguous(), backend, torch.float32)
    assert all(error(x, t) <= 1e-6 for x, t in zip(q, p, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_may_share_memory(backend: str) -> None:
    z = two_views("random", 9, 8, torch.float32)[0].to(device_of(backend)).requires_grad_()
    both = torch.cat([z, z + 1]).detach().requires_grad_()
    same, halves = nt_xent(z, z, 0.3, backend=backend), nt_xent(both[:9], both[9:], 0.3, backend=backend)
    (dz,) = torch.autograd.grad(same, z)
    (dboth,) = torch.autograd.grad(halves, both)
    parts = [x.double().requires_grad_() for x in (z.detach(), both.detach())]
    truth = nt_xent(parts[0], parts[0], 0.3, backend="reference"), nt_xent(*parts[1].chunk(2), 0.3, backend="reference")
    torch.testing.assert_close(dz.double(), torch.autograd.grad(truth[0], parts[0])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dboth.double(), torch.autograd.grad(truth[1], parts[1])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pair_has_no_loss(backend: str) -> None:
    z0, z1 = two_views("random", 1, 6, torch.float32)
    for temperature in (0.1, torch.tensor(0.1)):
        for value in run_nt_xent(z0, z1, temperature, torch.ones(2), backend, torch.float32):
            assert torch.equal(value, torch.zeros_like(value))
    lse, dq, dscale = run_logsumexp(z0, torch.tensor(2.0), True, torch.ones(1), backend, torch.float32)
    assert lse.item() == -torch.inf and not dq.any() and not dscale.any()


@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("n", [1, 2, 35])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_comes_through(backend: str, n: int, temperature: float | Tensor) -> None:
    z0, z1 = two_views("random", n, 20, torch.float32)
    z1[n - 1, 3] = torch.nan
    losses, dz0, dz1, *_ = run_nt_xent(z0, z1, temperature, torch.ones(2 * n), backend, torch.float32)
    assert losses.isnan().all()
    assert torch.cat([dz0, dz1]).isnan().any(1).all()
    if n > 1:
        lse, dq = run_logsumexp(z1, 1.0, True, torch.ones(n), backend, torch.float32)
        assert lse[:-1].isnan().all() and dq.isnan().any(1).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_tensor_out_of_range_gives_nan(backend: str, value: float) -> None:
    z0, z1 = two_views("random", 4, 6, torch.float32)
    found = run_nt_xent(z0, z1, torch.tensor(value), torch.ones(8), backend, torch.float32)
    assert found[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_tiny_rows(backend: str) -> None:
    """Below a norm of 1e-12 a row is divided by 1e-12 and its gradient is not projected."""
    z0, z1 = two_views("random", 6, 8, torch.float32)
    z0[2], z1[4] = 0, z1[4] * 1e-14
    check(run_nt_xent, z0, z1, 0.5, incoming(12), backend=backend, dtype=torch.float32, dim=8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reduction(backend: str, reduction: str) -> None:
    z0, z1 = (z.to(device_of(backend)) for z in two_views("random", 8, 5, torch.float32))
    losses = nt_xent(z0, z1, 0.2, reduction="none", backend=backend)
    expected = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    torch.testing.assert_close(nt_xent(z0, z1, 0.2, reduction=reduction, backend=backend), expected)
    assert losses.shape == (16,) and losses.dtype == torch.float32


@pytest.mark.parametrize("backend", [b for b in BACKENDS if serves("contrast", b, torch.float64)])
def test_gradcheck(backend: str) -> None:
    z0, z1 = (z.requires_grad_() for z in two_views("random", 4, 6))
    scalar = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for temperature in (scalar, 0.1, 0.012):
        assert torch.autograd.gradcheck(
            lambda a, b, t: nt_xent(a, b, t, reduction="none", backend=backend), (z0, z1, temperature)
        )
    for exclude_self in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, s, e: similarity_logsumexp(q, scale=s, exclude_self=e, backend=backend),
            (z0, scalar, exclude_self),
        )
