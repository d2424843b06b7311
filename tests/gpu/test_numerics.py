"""Values and gradients at real sizes against float64, addresses beyond 31 bits, a million rows, and memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import truth
from bench.providers import TEMPERATURE, eager_nt_xent, eager_queue
from hsv_kernels import (
    distillation_loss,
    gather_patches,
    gather_tokens,
    masked_mse,
    negative_cosine,
    nt_xent,
    random_masking,
    restore_tokens,
    similarity_logsumexp,
    sinkhorn_centre,
)
from hsv_kernels.backends import OPERATIONS, why_not
from tests.kernels.cases import assert_accurate

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
DTYPES = (BF16, torch.float16, torch.float32)
MIB, GIB = 2**20, 2**30


def backends_of(family: str) -> list[str]:
    return [name for name in OPERATIONS[family] if name != "cpu"]


def skip_without(family: str, backend: str) -> None:
    if reason := why_not(family, backend, CUDA, torch.float32):
        pytest.skip(reason)


def needs_memory(gib: float) -> None:
    """Skips the test on a device with less free memory."""
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of the device's memory; {free:.0f} are free")


def normal(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=dtype, requires_grad=grad)


def loss_scale() -> Tensor:
    """The incoming gradient of a loss scaler: without one float16 has no digits for the gradient of a mean."""
    return torch.full((), 1024.0, device=CUDA)


def differentiate(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    value = function(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves, loss_scale())]


def obeys_the_error_rule(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], exact: truth.Truth, inputs: tuple[Tensor, ...]
) -> None:
    """`function` against float64, at most twice as wrong as `plain` in float32 on the same rounded inputs."""
    wide = tuple(x.detach().float().requires_grad_(x.requires_grad) for x in inputs)
    results = differentiate(function, inputs), differentiate(plain, wide), exact(inputs, loss_scale())
    for found, near, true in zip(*results, strict=True):
        assert_accurate(found, near, true, inputs[0].dtype, inputs[0].shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, dim", [(4096, 64), (8192, 128), (8190, 256), (4098, 512), (4096, 1000)])
def test_nt_xent(m: int, dim: int, dtype: torch.dtype) -> None:
    views = normal(m // 2, dim, dtype=dtype), normal(m // 2, dim, dtype=dtype)
    obeys_the_error_rule(lambda a, b: nt_xent(a, b, TEMPERATURE, backend="triton"), eager_nt_xent, truth.nt_xent, views)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m, dim", [(256, 65536, 128), (4096, 65536, 128), (300, 10007, 256)])
def test_queue(n: int, m: int, dim: int, dtype: torch.dtype) -> None:
    q, positive, queue = (F.normalize(normal(size, dim, dtype=dtype, grad=False)) for size in (n, n, m))

    def loss(q: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
        found = similarity_logsumexp(q, queue, scale=1 / TEMPERATURE, positive=positive, backend="triton")
        return F.softplus(found[0]).mean()

    obeys_the_error_rule(loss, eager_queue, truth.queue, (q.requires_grad_(), positive, queue))


@pytest.mark.parametrize("batch, patches, keep", [(4096, 196, 49), (256, 1024, 256), (7, 5000, 1), (3, 100, 100)])
@pytest.mark.parametrize("backend", backends_of("masking"))
def test_masks_are_the_reference_bits(backend: str, batch: int, patches: int, keep: int) -> None:
    skip_without("masking", backend)
    settings = {"num_keep": keep, "seed": 2**62 + 12345, "offset": 2**40 + 7, "first_index": 3, "device": CUDA}
    found = random_masking(batch, patches, **settings, backend=backend)
    for x, y in zip(found, random_masking(batch, patches, **settings, backend="reference"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends_of("masking"))
def test_gathers_move_every_bit(backend: str, dtype: torch.dtype) -> None:
    skip_without("masking", backend)
    images, tokens = normal(256, 3, 224, 224, dtype=dtype), normal(256, 196, 384, dtype=dtype)
    keep, _, _ = random_masking(256, 196, num_keep=49, seed=1, device=CUDA)
    for gather, x in (
        (lambda x, b: gather_patches(x, keep, 16, backend=b), images),
        (lambda x, b: gather_tokens(x, keep, backend=b), tokens),
    ):
        out = gather(x, backend)
        upstream = torch.randn_like(out)
        expected = gather(x, "reference")
        assert torch.equal(out, expected)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (out, expected)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends_of("reconstruction"))
def test_masked_mse(backend: str, dtype: torch.dtype) -> None:
    skip_without("reconstruction", backend)
    pred, images = normal(256, 196, 768, dtype=dtype), normal(256, 3, 224, 224, dtype=torch.float32, grad=False)
    mask = (torch.rand(256, 196, device=CUDA).argsort(1) < 147).float()
    obeys_the_error_rule(
        lambda *x: masked_mse(*x, 16, backend=backend),
        lambda *x: masked_mse(*x, 16, backend="reference"),
        truth.masked_mse,
        (pred, images, mask),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, classes", [(32, 65_536), (5, 100_003), (300, 8192)])
def test_distillation_loss(batch: int, classes: int, dtype: torch.dtype) -> None:
    student, teacher = normal(5, batch, classes, dtype=dtype), normal(2, batch, classes, dtype=dtype, grad=False)
    centre = normal(classes, dtype=torch.float32, grad=False)
    obeys_the_error_rule(
        lambda s, t, c: distillation_loss(s, t, centre=c, backend="triton")[0],
        lambda s, t, c: distillation_loss(s, t, centre=c, backend="reference")[0],
        truth.distillation_loss,
        (student, teacher, centre),
    )
    _, mean = distillation_loss(student, teacher, centre=centre, backend="triton")
    torch.testing.assert_close(mean, teacher.double().mean((0, 1)).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, classes", [(512, 3000), (16_384, 4096), (5, 100_003)])
def test_sinkhorn_centre(batch: int, classes: int, dtype: torch.dtype) -> None:
    teacher = normal(2, batch, classes, dtype=dtype, grad=False)
    found = sinkhorn_centre(teacher, 0.05, backend="triton")
    exact = sinkhorn_centre(teacher.double(), 0.05, backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, dim", [(512, 2048), (4096, 256), (1003, 1030)])
def test_negative_cosine(batch: int, dim: int, dtype: torch.dtype) -> None:
    obeys_the_error_rule(
        lambda p, z: negative_cosine(p, z, backend="triton"),
        lambda p, z: negative_cosine(p, z, backend="reference"),
        truth.negative_cosine,
        (normal(batch, dim, dtype=dtype), normal(batch, dim, dtype=dtype)),
    )


def some_anchors(m: int) -> tuple[Tensor, Tensor]:
    """Rows at the ends and in between, and an incoming gradient [m] that is zero elsewhere."""
    anchors = torch.tensor([0, 7, m // 3, m // 2 - 1, m // 2, m - 1], device=CUDA)
    return anchors, torch.zeros(m, device=CUDA).index_copy(0, anchors, torch.linspace(1, 2, 6, device=CUDA))


def losses_of(anchors: Tensor, grad: Tensor, views: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Losses [6] of the anchors and the gradients of both views, in `dtype`, from these rows of the logits alone."""
    given = [x.detach().to(dtype).requires_grad_() for x in views]
    z = F.normalize(torch.cat(given))
    logits = (z[anchors] @ z.T / TEMPERATURE).scatter(1, anchors[:, None], -torch.inf)
    losses = F.cross_entropy(logits, (anchors + len(z) // 2) % len(z), reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, given, grad[anchors].to(dtype))]


@pytest.mark.parametrize(
    "m, dim, most", [(32768, 128, None), (131072, 256, None), (1 << 20, 128, 3 * GIB)], ids=["32K", "128K", "1M"]
)
def test_rows_without_a_matrix(m: int, dim: int, most: int | None) -> None:
    """Extra memory, gradients included: 4·M·D·4 bytes, 8·M·4 for each of at most D / 8 splits, and 8 MiB."""
    needs_memory(64 * m * dim / GIB)
    views = [normal(m // 2, dim, dtype=BF16) for _ in range(2)]
    anchors, grad = some_anchors(m)
    nt_xent(*(x[:256] for x in views), TEMPERATURE, backend="triton").backward()  # compiles
    for x in views:
        x.grad = None

    def step() -> list[Tensor]:
        losses = nt_xent(*views, TEMPERATURE, reduction="none", backend="triton")
        return [losses.detach()[anchors], *torch.autograd.grad(losses, views, grad)]

    found, extra = with_peak(step)
    assert extra <= min(20 * m * dim + 8 * MIB, most or float("inf"))
    plain, true = (losses_of(anchors, grad, views, dtype) for dtype in (torch.float32, torch.float64))
    for x, near, exact in zip(found, plain, true, strict=True):
        assert_accurate(x, near, exact, BF16, dim)


def with_peak(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    """The results, and how far the memory in use rose above what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = function()
    torch.cuda.synchronize()
    return results, torch.cuda.max_memory_allocated() - before


def test_queue_without_a_matrix() -> None:
    """The keys are frozen: nothing of the size of n × m, and nothing of the queue's."""
    n, m, dim = 4096, 1 << 19, 128
    q, positive, queue = (normal(rows, dim, dtype=BF16, grad=False) for rows in (n, n, m))
    q.requires_grad_()

    def step() -> list[Tensor]:
        d, _ = similarity_logsumexp(q, queue, scale=0.1, positive=positive, backend="triton")
        return [*torch.autograd.grad(d.sum(), q)]

    step()  # compiles
    found, extra = with_peak(step)
    assert extra <= 20 * n * dim + 32 * MIB < min(2 * n * m, 2 * m * dim)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("backend", backends_of("masking"))
def test_gathers_take_no_memory_but_their_results(backend: str) -> None:
    skip_without("masking", backend)
    images = normal(256, 3, 224, 224, dtype=BF16)
    keep, _, _ = random_masking(256, 196, num_keep=49, seed=1, device=CUDA)
    upstream = normal(256, 49, 768, dtype=BF16, grad=False)

    def step() -> list[Tensor]:
        out = gather_patches(images, keep, 16, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, images, upstream)]

    step()  # compiles
    found, extra = with_peak(step)
    assert extra <= sum(x.nbytes for x in found) + 2 * MIB


@pytest.mark.parametrize("backend", backends_of("reconstruction"))
def test_masked_mse_takes_no_memory_but_its_gradient(backend: str) -> None:
    skip_without("reconstruction", backend)
    pred, images = normal(256, 196, 768, dtype=BF16), normal(256, 3, 224, 224, dtype=torch.float32, grad=False)
    mask = (torch.rand(256, 196, device=CUDA).argsort(1) < 147).float()
    step = lambda: differentiate(lambda x: masked_mse(x, images, mask, 16, backend=backend), (pred,))  # noqa: E731
    step()  # compiles
    found, extra = with_peak(step)
    assert extra <= found[1].nbytes + 4 * MIB


def test_distillation_takes_no_memory_but_its_gradient() -> None:
    """And what merges the blocks of classes: a few numbers for each block of 2,048 of each view."""
    student, teacher = normal(10, 32, 65_536, dtype=BF16), normal(2, 32, 65_536, dtype=BF16, grad=False)
    step = lambda: differentiate(lambda s: distillation_loss(s, teacher, backend="triton")[0], (student,))  # noqa: E731
    step()  # compiles
    found, extra = with_peak(step)
    assert extra <= found[1].nbytes + 32 * MIB


def test_distillation_beyond_2_31_elements() -> None:
    needs_memory(48)
    batch, classes, last = 3300, 65_536, slice(-2, None)
    student, teacher = normal(10, batch, classes, dtype=BF16), normal(2, batch, classes, dtype=BF16, grad=False)
    assert student.numel() > 2**31
    weights = torch.zeros(batch, device=CUDA)
    weights[last] = 1
    settings = {"reduction": "sum"}
    loss, _ = distillation_loss(student, teacher, weights=weights, **settings, backend="triton")
    (gradient,) = torch.autograd.grad(loss, student)
    small = student.detach()[:, last].clone().requires_grad_()
    expected, _ = distillation_loss(small, teacher[:, last], **settings, backend="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    (exact,) = torch.autograd.grad(expected, small)
    torch.testing.assert_close(gradient[:, last], exact, rtol=2e-2, atol=1e-5)
    assert not gradient[:, :-2].any()


def test_nt_xent_of_rows_far_apart() -> None:
    """Views into rows of 2^17 values: their last element is beyond 2^31."""
    needs_memory(24)
    n, dim = 20_000, 40
    wide = torch.empty(n, 1 << 17, dtype=BF16, device=CUDA)
    assert wide.numel() > 2**31
    views = [wide[:, :dim].normal_(), wide[:, -dim:].normal_()]
    close = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    far = [x.requires_grad_() for x in (wide.detach()[:, :dim], wide.detach()[:, -dim:])]
    found, expected = (
        differentiate(lambda a, b: nt_xent(a, b, TEMPERATURE, backend="triton"), tuple(x)) for x in (far, close)
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", backends_of("masking"))
def test_gathers_beyond_2_31_elements(backend: str) -> None:
    skip_without("masking", backend)
    needs_memory(48)
    batch, last = 14_400, slice(-2, None)
    keep, restore, _ = random_masking(batch, 196, num_keep=49, seed=3, device=CUDA)
    images = normal(batch, 3, 224, 224, dtype=BF16)
    assert images.numel() > 2**31
    out = gather_patches(images, keep, 16, backend=backend)
    assert torch.equal(out[last], gather_patches(images[last], keep[last], 16, backend="reference"))
    (gradient,) = torch.autograd.grad(out, images, out.detach())
    small = images.detach()[last].requires_grad_()
    again = gather_patches(small, keep[last], 16, backend="reference")
    assert torch.equal(gradient[last], torch.autograd.grad(again, small, again.detach())[0])
    del images, gradient

    tokens, token = out.detach(), normal(768, dtype=BF16, grad=False)
    restored = restore_tokens(tokens, restore, token, backend=backend)
    assert restored.numel() > 2**31
    assert torch.equal(restored[last], restore_tokens(tokens[last], restore[last], token, backend="reference"))


@pytest.mark.parametrize("backend", backends_of("reconstruction"))
def test_masked_mse_beyond_2_31_elements(backend: str) -> None:
    skip_without("reconstruction", backend)
    needs_memory(48)
    batch, last = 14_400, slice(-2, None)
    pred, images = normal(batch, 196, 768, dtype=BF16), normal(batch, 3, 224, 224, dtype=BF16, grad=False)
    assert pred.numel() > 2**31
    mask = (torch.rand(batch, 196, device=CUDA) < 0.75).float()
    losses = masked_mse(pred, images, mask, 16, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(losses, pred, torch.ones_like(losses))
    small = pred.detach()[last].requires_grad_()
    expected = masked_mse(small, images[last], mask[last], 16, reduction="none", backend="reference")
    torch.testing.assert_close(losses[last], expected, rtol=1e-4, atol=1e-5)
    (exact,) = torch.autograd.grad(expected, small, torch.ones_like(expected))
    torch.testing.assert_close(gradient[last], exact, rtol=2e-2, atol=1e-5)
