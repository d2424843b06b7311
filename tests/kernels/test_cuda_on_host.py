"""The index arithmetic, ranking and packing of the CUDA kernels, run on the host thread by thread.

What only a device can show, such as races, is not seen here.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsv_kernels.ops.masking import reference
from hsv_kernels.ops.patches import packed_strides, patch_strides
from hsv_kernels.ops.reconstruction import reference as reconstruction
from hsv_kernels.ops.tensors import dtype_code
from tests.kernels.cases import assert_accurate, poisoned_allocations

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' shared headers; an access that is less aligned than its type says so on standard error."""
    path = tmp_path_factory.mktemp("native") / "cuda_on_host.so"
    options = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-fsanitize=alignment",
        "-Wno-unknown-pragmas",
        "-DHSV_ISA=host",
    ]
    source = ROOT / "tests/native/cuda_on_host.cpp"
    subprocess.run([COMPILER, *options, f"-I{ROOT / 'csrc'}", source, "-o", path], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(autouse=True)
def aligned(capfd: pytest.CaptureFixture) -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert "runtime error" not in capfd.readouterr().err


def call(function: ctypes._CFuncPtr, *arguments: Tensor | tuple[int, ...] | int | None) -> int:
    """Tensors as addresses, tuples as arrays of int64."""

    def convert(x: Tensor | tuple[int, ...] | int | None) -> object:
        if isinstance(x, Tensor):
            return ctypes.c_void_p(x.data_ptr())
        if isinstance(x, tuple):
            return (ctypes.c_int64 * len(x))(*x)
        return None if x is None else ctypes.c_int64(x)

    return function(*map(convert, arguments))


@pytest.mark.parametrize(("L", "K"), [(1, 1), (64, 16), (196, 49), (197, 196), (4096, 3601)])
def test_ranking_keeps_what_the_definition_keeps(library: ctypes.CDLL, L: int, K: int) -> None:
    """Seed 24 has two equal keys at the 3,601st place of 4,096."""
    for seed in (24, 0, 2**63 - 1, *range(1, 100 if L < 1000 else 3)):
        offset, first = seed % 7, seed % 5
        found = torch.empty(2, K, dtype=torch.int64), torch.empty(2, L, dtype=torch.int64), torch.empty(2, L)
        call(library.masks, seed, offset, first, 2, L, K, *found)
        expected = reference.random_masking(torch.tensor(seed), torch.tensor(offset), 2, L, K, first)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def planar(x: Tensor) -> Tensor:
    return x.contiguous()


def pixels(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def within(x: Tensor, columns: int, pixel: int = 0) -> Tensor:
    """The same values within wider rows, from an element number `pixel` on."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + columns), float("nan"), dtype=x.dtype)
    return wide[..., pixel : pixel + x.shape[-1]].copy_(x)


WIDE = 0
PATCHES = [
    # C, H, W, p, q, layout, values of a plane at a time: WIDE for as many as 16 bytes hold
    pytest.param(3, 32, 48, 16, 16, planar, WIDE, id="planar"),
    pytest.param(3, 32, 48, 16, 16, pixels, WIDE, id="channels-last"),
    pytest.param(1, 32, 48, 8, 16, planar, WIDE, id="one channel"),
    pytest.param(3, 16, 32, 8, 8, lambda x: within(x, 8), WIDE, id="rows of wider images"),
    pytest.param(3, 16, 32, 8, 8, lambda x: within(x, 3), 1, id="odd rows"),
    pytest.param(3, 16, 32, 8, 8, lambda x: within(x, 8, 1), 1, id="odd beginning"),
    pytest.param(4, 16, 32, 8, 8, pixels, WIDE, id="four interleaved channels"),
    pytest.param(5, 16, 32, 8, 8, planar, 1, id="five planes"),
    pytest.param(3, 28, 42, 14, 14, planar, 1, id="narrow patches"),
    pytest.param(3, 5, 7, 5, 7, planar, 1, id="odd sizes"),
    pytest.param(3, 4, 6, 1, 1, pixels, 1, id="pixels"),
]
Layout = Callable[[Tensor], Tensor]
each_layout = pytest.mark.parametrize(("C", "H", "W", "p", "q", "layout", "width"), PATCHES)


@each_layout
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
def test_patches_are_gathered_and_scattered(
    library: ctypes.CDLL, C: int, H: int, W: int, p: int, q: int, layout: Layout, width: int, dtype: torch.dtype
) -> None:
    B, L, size = 3, (H // p) * (W // q), dtype.itemsize
    K = (L + 1) // 2
    images, ids = layout(torch.randn(B, C, H, W).to(dtype)), torch.rand(B, L).argsort(1)[:, :K]
    shape, strides = (p, q, C), patch_strides(images, p, q)
    with poisoned_allocations():
        rows, back = torch.empty(B, K, p * q * C, dtype=dtype), torch.empty_like(images)
    values = call(library.gather, size, images, strides, None, ids, *ids.stride(), B, K, L, shape, rows)
    assert values == (width or 16 // size)
    assert torch.equal(rows, reference.gather_patches(images, ids, p, q))

    to = patch_strides(back, p, q)
    call(library.scatter, size, rows, rows.stride(), ids, *ids.stride(), B, K, L, shape, back, to)
    assert torch.equal(back, reference.scatter_patches(rows, ids, C, H, W, p, q))
    apart = rows.mT.contiguous().mT
    call(library.scatter, size, apart, apart.stride(), ids, *ids.stride(), B, K, L, shape, back.fill_(torch.nan), to)
    assert torch.equal(back, reference.scatter_patches(rows, ids, C, H, W, p, q))


@pytest.mark.parametrize(("L", "K", "D", "width"), [(50, 12, 64, WIDE), (7, 7, 8, WIDE), (9, 1, 13, 1), (5, 2, 3, 1)])
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
def test_tokens_are_restored(library: ctypes.CDLL, L: int, K: int, D: int, width: int, dtype: torch.dtype) -> None:
    B, size, ids = 3, dtype.itemsize, torch.rand(3, L).argsort(1)
    tokens, token = torch.randn(B, K, D).to(dtype), torch.randn(D).to(dtype)
    with poisoned_allocations():
        out, visible = torch.empty(B, L, D, dtype=dtype), torch.empty_like(tokens)
    shape, strides = (1, 1, D), packed_strides(tokens, 1, D)
    values = call(library.gather, size, tokens, strides, token, ids, *ids.stride(), B, L, K, shape, out)
    assert values == (width or 16 // size)
    assert torch.equal(out, reference.restore_tokens(tokens, ids, token))

    to = packed_strides(visible, 1, D)
    call(library.scatter, size, out, out.stride(), ids, *ids.stride(), B, L, K, shape, visible, to)
    assert torch.equal(visible, tokens)


@each_layout
@pytest.mark.parametrize("types", [(BRAIN, SINGLE), (BRAIN, BRAIN), (HALF, HALF), (SINGLE, SINGLE)], ids=str)
def test_masked_mse(
    library: ctypes.CDLL,
    C: int,
    H: int,
    W: int,
    p: int,
    q: int,
    layout: Layout,
    width: int,
    types: tuple[torch.dtype, torch.dtype],
) -> None:
    B, L, n = 2, (H // p) * (W // q), p * q * C
    images, pred = layout(torch.randn(B, C, H, W).to(types[1])), torch.randn(B, L, n).to(types[0])
    mask, weights = (torch.rand(B, L) < 0.7) * torch.rand(B, L), torch.randn(B, L)
    with poisoned_allocations():
        losses, mean, rstd = (torch.empty(B, L) for _ in range(3))
        gradient = torch.empty_like(pred)
    values = call(
        library.masked_mse,
        *(dtype_code(pred), pred, pred.stride(), dtype_code(images), images, patch_strides(images, p, q), (p, q, C)),
        *(mask, weights, B, L, losses, mean, rstd, gradient),
    )
    assert values in (1, 8) and (width > 0 or values == 8)

    truth, plain = (
        (forward := reconstruction.forward(pred.to(dtype), images.to(dtype), mask.to(dtype), p, q, True))[:1]
        + (reconstruction.backward(weights.to(dtype), pred.to(dtype), images, mask.to(dtype), *forward[1:], p, q),)
        for dtype in (torch.float64, torch.float32)
    )
    assert_accurate(losses, plain[0], truth[0], SINGLE, n)
    assert_accurate(gradient, plain[1], truth[1], types[0], n)
    assert (gradient[mask == 0] == 0).all()
