"""The distillation loss in Triton: a program works on one block of classes, for all views of a sample at once.

Forward reads each logit once. The softmax of a block is known up to a factor that the other blocks decide, so a program
keeps for each view the greatest logit m of its block and l = Σ exp((x − m) / τ), and for each student and
teacher d = Σ exp((t − m_t) / τ_t) (s − m_s) / τ_s; a second kernel merges the blocks. All terms of that sum have one
sign: nothing cancels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.distillation.reference import Problem, views
from hsv_kernels.ops.distillation.triton_sinkhorn import column_logsums
from hsv_kernels.ops.distillation.triton_sinkhorn import configurations as sinkhorn_configurations
from hsv_kernels.ops.distillation.triton_views import LOWEST, greatest, groups_of, runs, stacked
from hsv_kernels.ops.triton_utils import LN2, LOG2E, Configuration, processors_of, round_to, triton_type

__all__ = ["backward", "column_logsums", "configurations", "forward"]

#: Teachers × classes that a program holds.
BLOCK = 4096

#: Of 4,096 numbers and what the kernels keep beside them, 128 threads would spill many.
WARPS = 8


@triton.jit
def load_teachers(
    p_teacher, p_centre, i_n, o_k, K, T, stride_t, stride_n, stride_k, CENTRED: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Logits and logits less the centre, both [BT, BK]; −inf where there are none."""
    o_t = tl.arange(0, BT).to(tl.int64)
    m_k = o_k < K
    o_x = o_t[:, None] * stride_t + i_n * stride_n + o_k[None, :] * stride_k
    b_raw = tl.load(p_teacher + o_x, mask=(o_t < T)[:, None] & m_k[None, :], other=float("-inf")).to(tl.float32)
    if CENTRED:
        return b_raw, b_raw - tl.load(p_centre + o_k, mask=m_k, other=0)[None, :]
    return b_raw, b_raw


@triton.jit
def forward_kernel(
    p_student, p_teacher, p_centre, p_student_scale, p_teacher_scale, p_columns, p_teacher_parts, p_student_parts,
    N, K, S, T, ROWS, student_s, student_n, student_k, teacher_t, teacher_n, teacher_k,
    CENTRED: tl.constexpr, FIRST: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(m, l) of each teacher and (m, l, d of each teacher) of each student, of one block and ROWS samples.

    FIRST of several launches for the same teachers also writes what concerns these alone, their sum over the samples
    among it.
    """
    blocks = tl.cdiv(K, BK)
    i = tl.program_id(0).to(tl.int64)
    i_k, i_group = i % blocks, i // blocks
    o_k, o_t = i_k * BK + tl.arange(0, BK), tl.arange(0, BT).to(tl.int64)
    student_scale = tl.load(p_student_scale) * LOG2E
    teacher_scale = tl.load(p_teacher_scale) * LOG2E

    b_columns = tl.zeros((BK,), tl.float32)
    for i_n in range(i_group * ROWS, tl.minimum(i_group * ROWS + ROWS, N)):
        b_raw, b_x = load_teachers(
            p_teacher, p_centre, i_n, o_k, K, T, teacher_t, teacher_n, teacher_k, CENTRED, BT
        )  # [BT, BK]
        b_m = greatest(b_x, 1)
        b_e = tl.exp2((b_x - b_m[:, None]) * teacher_scale)
        if FIRST:
            b_columns += tl.sum(tl.where((o_t < T)[:, None], b_raw, 0), 0)
            p_part = p_teacher_parts + (o_t * N + i_n) * 2 * blocks + i_k
            tl.store(p_part, b_m, mask=o_t < T)
            tl.store(p_part + blocks, tl.sum(b_e, 1), mask=o_t < T)

        for i_s in range(S):
            o_x = tl.cast(i_s, tl.int64) * student_s + i_n * student_n + o_k * student_k
            b_s = tl.load(p_student + o_x, mask=o_k < K, other=float("-inf")).to(tl.float32)  # [BK]
            most = greatest(b_s, 0)
            b_d = (b_s - most) * student_scale
            p_own = p_student_parts + (tl.cast(i_s, tl.int64) * N + i_n) * (2 + T) * blocks + i_k
            tl.store(p_own, most)
            tl.store(p_own + blocks, tl.sum(tl.exp2(b_d), 0))
            b_dot = tl.sum(tl.where(b_e == 0, 0, b_e * b_d[None, :]), 1)
            tl.store(p_own + (2 + o_t) * blocks, b_dot, mask=o_t < T)
    if FIRST:
        tl.store(p_columns + i_group * K + o_k, b_columns, mask=o_k < K)


@triton.jit
def merged(b_m, b_l, scale, AXIS: tl.constexpr):
    """The greatest of all blocks, exp2 of how far each block's lies below it, and the sum (NaN where it is 0)."""
    b_most = tl.max(b_m, AXIS)
    b_below = tl.exp2((b_m - tl.expand_dims(b_most, AXIS)) * scale)
    b_sum = tl.sum(b_below * b_l, AXIS)
    return b_most, b_below, tl.where(b_sum == 0, float("nan"), b_sum)


@triton.jit
def merge_kernel(
    p_student_parts, p_teacher_parts, p_counts, p_student_scale, p_teacher_scale, p_losses, p_student_sums,
    p_teacher_sums, N, S, T, blocks, PAIRS: tl.constexpr, BT: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Loss of one sample, and (m, l) of its views over all classes; counts [S, T] says how often a pair is named."""
    i_n = tl.program_id(0).to(tl.int64)
    o_t, o_b = tl.arange(0, BT).to(tl.int64), tl.arange(0, BB)
    m_t, m_b = o_t < T, o_b < blocks
    m_tb = m_t[:, None] & m_b[None, :]
    student_scale = tl.load(p_student_scale) * LOG2E
    teacher_scale = tl.load(p_teacher_scale) * LOG2E

    p_part = p_teacher_parts + ((o_t * N + i_n) * 2 * blocks)[:, None] + o_b[None, :]
    b_m = tl.load(p_part, mask=m_tb, other=LOWEST)  # [BT, BB]
    b_l = tl.load(p_part + blocks, mask=m_tb, other=0)
    b_most, b_below, b_sum = merged(b_m, b_l, teacher_scale, 1)
    tl.store(p_teacher_sums + o_t * N + i_n, b_most, mask=m_t)
    tl.store(p_teacher_sums + (T + o_t) * N + i_n, b_sum, mask=m_t)

    b_loss = tl.zeros((BT,), tl.float32)
    for s in range(S):
        i_s = tl.cast(s, tl.int64)
        p_own = p_student_parts + (i_s * N + i_n) * (2 + T) * blocks + o_b
        b_own = tl.load(p_own, mask=m_b, other=LOWEST)  # [BB]
        most, _, total = merged(b_own, tl.load(p_own + blocks, mask=m_b, other=0), student_scale, 0)
        tl.store(p_student_sums + i_s * N + i_n, most)
        tl.store(p_student_sums + (S + i_s) * N + i_n, total)

        b_dot = tl.load(p_own[None, :] + ((2 + o_t) * blocks)[:, None], mask=m_tb, other=0)
        b_away = b_l * ((most - b_own) * student_scale)[None, :] - b_dot
        b_away = tl.sum(tl.where((b_l == 0) | (b_below == 0), 0, b_below * b_away), 1) / b_sum
        b_count = tl.load(p_counts + i_s * T + o_t, mask=m_t, other=0)
        b_loss += tl.where(b_count > 0, b_count * (tl.log2(total) + b_away), 0)
    tl.store(p_losses + i_n, tl.sum(b_loss, 0) * (LN2 / PAIRS))


@triton.jit
def backward_kernel(
    p_weights, p_student, p_teacher, p_centre, p_student_scale, p_teacher_scale, p_counts, p_student_sums,
    p_teacher_sums, p_gradient, N, K, S, T, VIEWS, student_s, student_n, student_k, teacher_t, teacher_n, teacher_k,
    CENTRED: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """weight · Σ_t (softmax(s) − q_t) of one block, for S of the VIEWS students of one sample."""
    blocks = tl.cdiv(K, BK)
    i = tl.program_id(0).to(tl.int64)
    i_n, o_k, o_t = i // blocks, i % blocks * BK + tl.arange(0, BK), tl.arange(0, BT).to(tl.int64)
    m_t = o_t < T
    student_scale = tl.load(p_student_scale) * LOG2E
    teacher_scale = tl.load(p_teacher_scale) * LOG2E
    weight = tl.load(p_weights + i_n)

    b_most = tl.load(p_teacher_sums + o_t * N + i_n, mask=m_t, other=0)
    b_sum = tl.load(p_teacher_sums + (T + o_t) * N + i_n, mask=m_t, other=1)
    _, b_x = load_teachers(p_teacher, p_centre, i_n, o_k, K, T, teacher_t, teacher_n, teacher_k, CENTRED, BT)
    b_q = tl.exp2((b_x - b_most[:, None]) * teacher_scale) * (1 / b_sum)[:, None]  # [BT, BK]

    for s in range(S):
        i_s = tl.cast(s, tl.int64)
        b_count = tl.load(p_counts + i_s * T + o_t, mask=m_t, other=0)
        count = tl.sum(b_count, 0)
        most = tl.load(p_student_sums + i_s * N + i_n)
        total = tl.load(p_student_sums + (VIEWS + i_s) * N + i_n)
        o_x = i_s * student_s + i_n * student_n + o_k * student_k
        b_s = tl.load(p_student + o_x, mask=o_k < K, other=0).to(tl.float32)  # [BK]

        b_target = tl.sum(tl.where(b_count[:, None] > 0, b_count[:, None] * b_q, 0), 0)
        b_gradient = weight * (tl.exp2((b_s - most) * student_scale) * (count / total) - b_target)
        b_gradient = tl.where(count > 0, b_gradient, 0)
        p_out = p_gradient + (i_s * N + i_n) * K + o_k
        tl.store(p_out, round_to(b_gradient, p_gradient.dtype.element_ty), mask=o_k < K)


@triton.jit
def counts_kernel(p_counts, COUNTS: tl.constexpr, SIZE: tl.constexpr):
    """Numbers known to the host, written without a copy from there, which a CUDA graph could not repeat."""
    for i in tl.static_range(SIZE):
        tl.store(p_counts + i, COUNTS[i] + 0.0)


class Tile(NamedTuple):
    """Teachers and classes of a program's block, and the number of such blocks in a row."""

    BT: int
    BK: int
    blocks: int


def tile_of(T: int, K: int) -> Tile:
    BT = triton.next_power_of_2(T)
    BK = max(128, min(triton.next_power_of_2(K), BLOCK // BT))
    return Tile(BT, BK, triton.cdiv(K, BK))


def forward(given: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], mean of the teacher's logits [K], and for students and teachers (m, Σ exp((x − m) / τ))."""
    student, teacher, centre, student_scale, teacher_scale, pairs = given
    targets, S = stacked(views(teacher)), len(views(student))
    T, N, K = targets.shape
    tile, new = tile_of(T, K), teacher_scale.new_empty
    rows, groups = groups_of(N, tile.blocks, processors_of(targets))
    columns, losses = new(groups, K), new(N)
    student_parts, teacher_parts = new(S, N, 2 + T, tile.blocks), new(T, N, 2, tile.blocks)
    student_sums, teacher_sums = new(2, S, N), new(2, T, N)
    constants = (targets, None if centre is None else centre.contiguous(), student_scale, teacher_scale)
    with torch.cuda.device_of(targets):
        for first, some in runs(views(student)):
            forward_kernel[tile.blocks * groups,](
                *(some, *constants, columns, teacher_parts, student_parts[first:]),
                *(N, K, len(some), T, rows, *some.stride(), *targets.stride()),
                **{"CENTRED": centre is not None, "FIRST": first == 0, "BT": tile.BT, "BK": tile.BK},
                num_warps=WARPS,
            )
        merge_kernel[N,](
            *(student_parts, teacher_parts, counts_of(pairs, S, T, losses), student_scale, teacher_scale),
            *(losses, student_sums, teacher_sums, N, S, T, tile.blocks),
            **{"PAIRS": len(pairs) // 2, "BT": tile.BT, "BB": triton.next_power_of_2(tile.blocks)},
        )
    return losses, columns.sum(0) / (T * N), student_sums, teacher_sums


def backward(
    gradient: Tensor, given: Problem, student_sums: Tensor, teacher_sums: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of the wanted among `student`, of their shapes and type and contiguous; a launch for each."""
    student, teacher, centre, student_scale, teacher_scale, pairs = given
    targets, (_, S, N) = stacked(views(teacher)), student_sums.shape
    student_sums, teacher_sums = student_sums.contiguous(), teacher_sums.contiguous()
    T, _, K = targets.shape
    tile = tile_of(T, K)
    weights = gradient * student_scale / (len(pairs) // 2)
    constants = (targets, None if centre is None else centre.contiguous(), student_scale, teacher_scale)
    found, first = [], 0
    with torch.cuda.device_of(targets):
        counts = counts_of(pairs, S, T, weights)
        for tensor, needed in zip(student, wanted, strict=True):
            some = tensor if tensor.dim() == 3 else tensor[None]
            if needed:
                found.append(tensor.new_empty(tensor.shape))
                backward_kernel[N * tile.blocks,](
                    *(weights, some, *constants, counts[first:], student_sums[:, first:], teacher_sums),
                    *(found[-1], N, K, len(some), T, S, *some.stride(), *targets.stride()),
                    **{"CENTRED": centre is not None, "BT": tile.BT, "BK": tile.BK},
                    num_warps=WARPS,
                )
            first += len(some)
    return found


def counts_of(pairs: Sequence[int], S: int, T: int, like: Tensor) -> Tensor:
    """How often each pair is named, [S, T] in the type of `like`."""
    counts = [0] * (S * T)
    for t, s in zip(pairs[::2], pairs[1::2], strict=True):
        counts[s * T + t] += 1
    found = like.new_empty(S, T)
    counts_kernel[1,](found, COUNTS=tuple(counts), SIZE=S * T, num_warps=1)
    return found


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: DINO's views, one view of each, with and without a centre."""
    singles = ("p_student_scale", "p_teacher_scale", "p_teacher_parts", "p_student_parts", "p_counts", "p_losses")
    singles += ("p_centre", "p_columns", "p_weights", "p_student_sums", "p_teacher_sums")
    pointers = dict.fromkeys(singles, "*fp32")
    sizes = dict.fromkeys(("N", "K", "S", "T", "ROWS", "VIEWS", "blocks"), "i32")
    strides = dict.fromkeys(("student_s", "student_n", "teacher_t", "teacher_n"), "i32")
    near = {"student_k": 1, "teacher_k": 1}
    for dtype, T, centred in (
        *((dtype, 2, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((torch.bfloat16, T, centred) for T, centred in ((2, False), (1, True))),
    ):
        logits = dict.fromkeys(("p_student", "p_teacher", "p_gradient"), f"*{triton_type(dtype)}")
        tile = tile_of(T, 65_536)
        given = {**logits, **pointers, **sizes, **strides}
        constants = {**near, "CENTRED": centred, "BT": tile.BT, "BK": tile.BK}
        if not centred:
            given.pop("p_centre")
            constants["p_centre"] = None
        yield _configuration(forward_kernel, given, {**constants, "FIRST": True}, WARPS)
        yield _configuration(backward_kernel, given, constants, WARPS)
    later = {**constants, "FIRST": False}  # of separate students the second and later
    yield _configuration(forward_kernel, given, later, WARPS)
    for T in (1, 2):
        tile = tile_of(T, 65_536)
        constants = {"PAIRS": 18 // (3 - T), "BT": tile.BT, "BB": triton.next_power_of_2(tile.blocks)}
        yield _configuration(merge_kernel, {**pointers, **sizes}, constants)
    yield Configuration(counts_kernel, {"p_counts": "*fp32"}, {"COUNTS": (0, 1, 1, 0), "SIZE": 4}, 1, 1)
    yield from sinkhorn_configurations()


def _configuration(
    kernel: triton.JITFunction, given: dict[str, str], constants: dict, num_warps: int = 4
) -> Configuration:
    """With of `given` what the kernel takes."""
    names = [parameter.name for parameter in kernel.params]
    return Configuration(kernel, {name: given[name] for name in names if name in given}, constants, num_warps, 3)
