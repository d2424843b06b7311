"""Where the groups lie that Triton's kernels move: addresses and claimed alignment, for layouts at random."""

import random

import pytest
import torch
from torch import Tensor

from hsv_kernels.backends import triton_problem
from hsv_kernels.ops.masking.cpu import packed_strides, patch_strides
from hsv_kernels.ops.masking.reference import patchify

if triton_problem():
    pytest.skip(triton_problem(), allow_module_level=True)

from hsv_kernels.ops.triton_patches import Layout, layout_of, row_alignment


def somewhere(shape: tuple[int, ...], dtype: torch.dtype, choose: random.Random) -> Tensor:
    """A tensor of this shape: dimensions in any order in memory, within a larger buffer, at any beginning."""
    order = choose.sample(range(len(shape)), len(shape))
    step = [choose.choice((1, 1, 1, 2)) for _ in order]
    first = [choose.choice((0, 0, 1, 2, 8)) for _ in order]
    room = [choose.choice((0, 0, 3, 8)) for _ in order]
    sizes = [shape[d] * s + f + r for d, s, f, r in zip(order, step, first, room, strict=True)]
    parts = [slice(f, f + shape[d] * s, s) for d, s, f in zip(order, step, first, strict=True)]
    return torch.empty(sizes, dtype=dtype)[tuple(parts)].permute([order.index(d) for d in range(len(shape))])


def offsets(x: Tensor) -> Tensor:
    """Of each element of x, from its first."""
    places = [torch.arange(size) * step for size, step in zip(x.shape, x.stride(), strict=True)]
    return sum(place.view(-1, *[1] * (x.dim() - 1 - d)) for d, place in enumerate(places))


def beginnings(layout: Layout, B: int, L: int) -> Tensor:
    """Of every group, by the formula of the kernels: [B, L, G]."""
    batch, grid, grid_row, grid_column, row, column, channel = layout.strides
    b, l, o = torch.arange(B), torch.arange(L), torch.arange(layout.groups) * layout.I * layout.V
    y, x, c = o // (layout.Q * layout.C), o // layout.C % layout.Q, o % layout.C
    corner = l // grid * grid_row + l % grid * grid_column
    return (b * batch)[:, None, None] + corner[:, None] + (y * row + x * column + c * channel)


def check(layout: Layout, x: Tensor, wanted: Tensor) -> None:
    """Groups hold the values `wanted` [B, L, n] in order, and each access is as aligned as the kernels claim."""
    I, V, A = layout.I, layout.V, layout.A
    begin = beginnings(layout, *wanted.shape[:2])
    value = torch.arange(I * V)
    within = value % I * layout.strides[6] + value // I * layout.strides[5]
    assert torch.equal((begin[..., None] + within).flatten(2), wanted)
    planes = begin[..., None] + torch.arange(I) * layout.strides[6]
    assert V % A == 0 and (begin % A == 0).all()
    assert ((x.data_ptr() // x.element_size() + planes) % A == 0).all()


@pytest.mark.parametrize("seed", range(60))
def test_images(seed: int) -> None:
    choose = random.Random(seed)
    B, C, p, q = (choose.choice(sizes) for sizes in ((1, 2), (1, 2, 3, 3, 4, 5), (1, 3, 8, 14), (1, 2, 7, 8, 14, 16)))
    H, W = p * choose.choice((1, 2)), q * choose.choice((1, 3))
    images = somewhere((B, C, H, W), choose.choice((torch.bfloat16, torch.float32)), choose)
    if choose.random() < 0.3:
        images = images[:, :, :1].expand(B, C, H, W)
    wanted = patchify(offsets(images), p, q)
    for narrowest in (None, 2, 4):
        check(layout_of(images, patch_strides(images, p, q), (p, q, C), narrowest), images, wanted)


@pytest.mark.parametrize("strides", [(1024, 129, 16, 1), (1025, 128, 16, 1), (1024, 136, 17, 1), (1024, 136, 32, 2)])
def test_planes_of_odd_strides(strides: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        images = torch.empty(4096, dtype=dtype).as_strided((2, 3, 8, 16), strides)
        check(layout_of(images, patch_strides(images, 8, 8), (8, 8, 3)), images, patchify(offsets(images), 8, 8))


@pytest.mark.parametrize("seed", range(30))
def test_tokens(seed: int) -> None:
    choose = random.Random(seed)
    D = choose.choice((1, 2, 3, 16, 24, 33))
    rows = somewhere((2, choose.choice((1, 5)), D), choose.choice((torch.bfloat16, torch.float32)), choose)
    check(layout_of(rows, packed_strides(rows, 1, D), (1, 1, D)), rows, offsets(rows))
    for V in (1, 2, 4, 8):
        aligned = row_alignment(rows, V)
        assert aligned == 1 or rows.stride(2) == 1
        runs = rows.data_ptr() // rows.element_size() + offsets(rows)[..., ::V]
        assert V % aligned == 0 and (runs % aligned == 0).all()


def test_usual_images_and_tokens_move_16_bytes() -> None:
    for dtype, V in ((torch.bfloat16, 8), (torch.float32, 4)):
        images = torch.empty(2, 3, 32, 48, dtype=dtype)
        for x, planes in ((images, 3), (images.contiguous(memory_format=torch.channels_last), 1)):
            layout = layout_of(x, patch_strides(x, 16, 16), (16, 16, 3))
            assert (planes, V, V) == (layout.I, layout.V, layout.A)
        tokens = torch.empty(2, 5, 768, dtype=dtype)
        assert layout_of(tokens, packed_strides(tokens, 1, 768), (1, 1, 768)).V == V
