"""The compiled CPU kernels at unusual sizes: around vectors and panels, 65,536 rows, addresses beyond 32 bits."""

import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsv_kernels import gather_patches, gather_tokens, masked_mse, nt_xent, restore_tokens, similarity_logsumexp
from hsv_kernels.backends import compiled_module
from tests.kernels.cases import assert_accurate, peak_memory, poisoned_allocations

if isinstance(compiled_module(), str):
    pytest.skip(compiled_module(), allow_module_level=True)

pytestmark = pytest.mark.compiled
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 31, 33, 95, 97)
DIMS = (1, 2, 15, 17, 31, 33, 127, 129, 1000)


def available_memory() -> int:
    """Bytes that this machine can hand out without swapping; Linux."""
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def check(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, scale: float = 0.0) -> None:
    """run(*inputs, backend) of the kernels and its gradients obey the error rule; scalars among the inputs are learned.

    `scale` says what errors of gradients are relative to where all of them are smaller.
    """
    dtype, dim = inputs[0].dtype, max(inputs[0].shape[1], 16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for backend, computed in (("cpu", dtype), ("reference", wide), ("reference", torch.float64)):
        given = [x.to(computed if x.dim() else torch.float64).requires_grad_() for x in inputs]
        with poisoned_allocations():
            out = run(*given, backend)
            results.append([out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))])
    for found, plain, truth in zip(*results, strict=True):
        least = scale if found.dim() != 1 else 0.0
        assert_accurate(found, plain, truth, dtype, dim, max(least, truth.abs().max().item()) if least else None)


def losses(z0: Tensor, z1: Tensor, temperature: Tensor, backend: str) -> Tensor:
    return nt_xent(z0, z1, temperature, reduction="none", backend=backend)


def losses_of_number(z0: Tensor, z1: Tensor, backend: str) -> Tensor:
    return nt_xent(z0, z1, 0.2, reduction="none", backend=backend)


def square(q: Tensor, scale: Tensor, backend: str) -> Tensor:
    return similarity_logsumexp(q, scale=scale, exclude_self=True, backend=backend)


def queries_against_keys(q: Tensor, k: Tensor, scale: Tensor, backend: str) -> Tensor:
    """n queries, 2n + 1 keys, column i + 1 left out."""
    return similarity_logsumexp(
        q, torch.cat([k, q.detach(), k[:1]]), scale=scale, exclude_self=True, self_offset=1, backend=backend
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", ROWS)
def test_contrast_around_vectors(rows: int, dim: int, dtype: torch.dtype) -> None:
    z0, z1 = normal(2, rows, dim, dtype=dtype)
    scale = 0.0
    if dim == 1:  # rows are ±1 and their gradient vanishes: errors are relative to the terms of the projection
        z0, z1, scale = z0 + z0.sign(), z1 + z1.sign(), 10.0
    grad = torch.linspace(-1, 2, 2 * rows)
    check(losses, [z0, z1, torch.tensor(0.2)], grad, scale)
    check(losses_of_number, [z0, z1], grad, scale)
    check(square, [z0 / dim**0.5, torch.tensor(0.7)], grad[:rows], scale)
    check(queries_against_keys, [z0 / dim**0.25, z1 / dim**0.25, torch.tensor(-0.7)], grad[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_tokens_around_vectors(dim: int, dtype: torch.dtype) -> None:
    tokens, token = normal(3, 5, dim, dtype=dtype).requires_grad_(), normal(dim, dtype=dtype).requires_grad_()
    ids = torch.tensor([[4, 1, 0, 2, 3], [0, 1, 2, 3, 4], [3, 4, 2, 1, 0]])
    for backend in ("cpu", "reference"):
        restored = restore_tokens(gather_tokens(tokens, ids[:, :2], backend=backend), ids, token, backend=backend)
        grad = normal(*restored.shape, dtype=dtype)
        results = [restored, *torch.autograd.grad(restored, (tokens, token), grad)]
        if backend == "cpu":
            found = results
    assert torch.equal(found[0], results[0]) and torch.equal(found[1], results[1])
    torch.testing.assert_close(found[2], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_masked_mse_around_vectors(dim: int, channels: int, dtype: torch.dtype) -> None:
    """Patches of one line of `dim` pixels."""
    pred, images = normal(2, 3, dim * channels, dtype=dtype), normal(2, channels, 3, dim, dtype=dtype)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])

    def run(pred: Tensor, backend: str) -> Tensor:
        given = images if backend == "cpu" else images.to(pred.dtype)
        norm_pix = dim * channels > 2  # of two values and fewer nothing is left but the sign
        return masked_mse(pred, given, mask, (1, dim), norm_pix=norm_pix, reduction="none", backend=backend)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for backend, computed in (("cpu", dtype), ("reference", wide), ("reference", torch.float64)):
        given = pred.to(computed).requires_grad_()
        with poisoned_allocations():
            out = run(given, backend)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), given)])
    for found, plain, truth in zip(*results, strict=True):
        assert_accurate(found, plain, truth, found.dtype, dim * channels)


@pytest.mark.slow
def test_65536_rows_in_linear_memory() -> None:
    """The memory that contracts allow, where an M × M matrix takes 16 GiB and its indices need more than 31 bits."""
    n, dim, temperature = 32768, 32, 0.1
    z0, z1 = (z.requires_grad_() for z in normal(2, n, dim))
    anchors = torch.tensor([0, 7, 12345, n - 1, n, 2 * n - 1])
    grad = torch.zeros(2 * n).index_copy(0, anchors, torch.linspace(1, 2, 6))
    found: list[Tensor] = []

    def step() -> None:
        losses = nt_xent(z0, z1, temperature, reduction="none", backend="cpu")
        found[:] = [losses.detach()[anchors], *torch.autograd.grad(losses, (z0, z1), grad)]

    def of_anchors(dtype: torch.dtype) -> list[Tensor]:
        given = [z.detach().to(dtype).requires_grad_() for z in (z0, z1)]
        z = torch.nn.functional.normalize(torch.cat(given), dim=1)
        logits = (z[anchors] @ z.T / temperature).scatter(1, anchors[:, None], -torch.inf)
        losses = torch.nn.functional.cross_entropy(logits, (anchors + n) % (2 * n), reduction="none")
        return [losses.detach(), *torch.autograd.grad(losses, given, grad[anchors].to(dtype))]

    nt_xent(z0[:64], z1[:64], temperature, backend="cpu").backward()  # what is allocated once
    torch.set_num_threads(2)
    rows = 2 * n
    assert peak_memory(step) <= 4 * rows * dim * 4 + 8 * 2**20
    for x, plain, truth in zip(found, of_anchors(torch.float32), of_anchors(torch.float64), strict=True):
        assert_accurate(x, plain, truth, torch.float32, dim)


@pytest.mark.slow
def test_queue_of_65536_keys_in_linear_memory() -> None:
    """MoCo's form: frozen keys, the positive apart; a similarity matrix takes 16 MiB twice."""
    n, m, dim = 64, 65536, 64
    q, positive, k = normal(n, dim), normal(n, dim) + normal(n, dim), normal(m, dim)
    grad = torch.linspace(-1, 2, n)
    found: list[Tensor] = []

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in (q, positive)]
        out = similarity_logsumexp(given[0], k.to(dtype), scale=0.3, positive=given[1], backend=backend)
        return [*(x.detach() for x in out), *torch.autograd.grad(out, given, [grad.to(dtype)] * 2)]

    run(torch.float32, "cpu")  # what is allocated once
    assert peak_memory(lambda: found.extend(run(torch.float32, "cpu"))) <= 8 * 2**20
    plain, truth = run(torch.float32, "reference"), run(torch.float64, "reference")
    for results in zip(found, plain, truth, strict=True):
        assert_accurate(*results, torch.float32, dim)


def far_apart(x: Tensor) -> Tensor:
    """The values of `x`, its first dimension more than 2^31 elements apart, in memory that is hardly ever touched."""
    step = 2**31 + 64
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, (len(x) - 1) * step * x.element_size() + x[0].nbytes, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (step, *x[0].contiguous().stride()))
    return view.copy_(x)


def test_inputs_beyond_32_bits() -> None:
    ids = torch.tensor([[1, 3], [2, 0]])
    restore = torch.tensor([[2, 0, 3, 1], [1, 2, 0, 3]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    token, rows, tokens, images, pred = (
        normal(*shape, dtype=torch.bfloat16) for shape in ((5,), (2, 7), (2, 4, 5), (2, 3, 4, 6), (2, 4, 18))
    )
    calls = {
        "nt_xent": lambda x: nt_xent(x, x.flip(0), 0.2, reduction="none", backend="cpu"),
        "gather_tokens": lambda x: gather_tokens(x, ids, backend="cpu"),
        "restore_tokens": lambda x: restore_tokens(x[:, :2], restore, token, backend="cpu"),
        "gather_patches": lambda x: gather_patches(x, ids, (2, 3), backend="cpu"),
        "masked_mse": lambda x: masked_mse(x, images, mask, (2, 3), reduction="none", backend="cpu"),
        "masked_mse of images": lambda x: masked_mse(pred, x, mask, (2, 3), backend="cpu"),
    }
    given = [rows, tokens, tokens, images, pred, images]
    for x, (name, call) in zip(given, calls.items(), strict=True):
        expected, found = call(x), call(far_apart(x))
        assert torch.equal(found, expected), name
        if name == "masked_mse of images":
            continue
        x, grad = x.clone().requires_grad_(), normal(*expected.shape, dtype=expected.dtype)
        gradients = [torch.autograd.grad(call(x), x, g)[0] for g in (grad, far_apart(grad))]
        assert torch.equal(*gradients), name


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 8 * 2**30, reason="the gradient takes 4 GiB")
def test_gradients_beyond_32_bits() -> None:
    rows, dim = 2**14, 2**16 + 1
    tokens = torch.zeros(1, dtype=torch.bfloat16).expand(2, rows, dim).requires_grad_()
    out = gather_tokens(tokens, torch.tensor([[0], [rows - 1]]), backend="cpu")
    (gradient,) = torch.autograd.grad(out, tokens, torch.ones(1, dtype=torch.bfloat16).expand_as(out))
    assert gradient.numel() > 2**31
    assert gradient[0, 0].all() and gradient[1, -1].all()
    assert not gradient[0, 1].any() and not gradient[0, -1].any() and not gradient[1, :2].any()
