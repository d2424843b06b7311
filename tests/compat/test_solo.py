"""hsv_kernels.compat.solo against solo-learn's formulas.

solo-learn on the package index is years behind its repository and pins torch 1.9, so what stands here are the formulas
of its version 1.0.6 in plain PyTorch, written out with the whole matrices.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import assert_same, error_of, leaves
from torch import Tensor

from hsv_kernels.compat import solo


def simclr(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    z = F.normalize(z, dim=-1)
    similarity = (z @ z.T / temperature).exp()
    equal = indexes[:, None] == indexes[None, :]
    positive = (similarity * (equal & ~torch.eye(len(z), dtype=torch.bool))).sum(1)
    negative = (similarity * ~equal).sum(1)
    return -(positive / (positive + negative)).log().mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5, -0.5])
@pytest.mark.parametrize(
    "indexes", [[0, 1, 2, 0, 1, 2], [0, 1, 2] * 4, [5, 5, 5, 9, 9, 7, 7, 9], [3, 3]], ids=["2", "4", "classes", "one"]
)
def test_simclr(indexes: list[int], temperature: float) -> None:
    (z,) = leaves((len(indexes), 16))
    assert_same(simclr, solo.simclr_loss_func, z, torch.tensor(indexes), temperature, rtol=1e-4)


@pytest.mark.parametrize("ids", [torch.tensor([0.5, 2, -1] * 2), torch.tensor([True, False, True] * 2)])
def test_simclr_of_indexes_that_are_no_integers(ids: Tensor) -> None:
    (z,) = leaves((6, 16))
    assert_same(simclr, solo.simclr_loss_func, z, ids, rtol=1e-4)


def test_simclr_where_an_anchor_has_no_positive() -> None:
    (z,) = leaves((3, 16))
    ids = torch.tensor([0, 0, 1])
    assert solo.simclr_loss_func(z, ids) == simclr(z, ids) == torch.inf


def test_simclr_at_temperatures_where_the_exponential_overflows() -> None:
    (z,) = leaves((8, 16))
    ids = torch.arange(8) % 4
    assert simclr(z, ids, 0.01).isnan()
    torch.testing.assert_close(
        solo.simclr_loss_func(z, ids, 0.01), simclr(z.double(), ids, 0.01).float(), rtol=1e-4, atol=1e-5
    )


def mocov2plus(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    positive, negatives = torch.einsum("nc,nc->n", query, key), torch.einsum("nc,ck->nk", query, queue)
    logits = torch.cat([positive[:, None], negatives], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("temperature", [0.1, -0.2])
def test_mocov2plus(batch: int, temperature: float) -> None:
    q, k, queue = (F.normalize(x, dim=1).detach() for x in leaves((batch, 16), (batch, 16), (32, 16)))
    q, k = q.requires_grad_(), k.requires_grad_()
    assert_same(mocov2plus, solo.mocov2plus_loss_func, q, k, queue.T.contiguous(), temperature)
    assert_same(mocov2plus, solo.mocov2plus_loss_func, (2 * q).detach().requires_grad_(), k, queue.T, temperature)


@pytest.mark.parametrize(
    ("key", "queue"), [((1, 16), (16, 9)), ((4, 1), (1, 9)), ((1, 1), (16, 1)), ((4, 16), (16, 0))]
)
def test_mocov2plus_of_one_for_all(key: tuple[int, int], queue: tuple[int, int]) -> None:
    q, k, negatives = leaves((4, 16), key, queue)
    assert_same(mocov2plus, solo.mocov2plus_loss_func, q, k, negatives.detach(), rtol=1e-4, atol=1e-5)


def test_mocov2plus_while_the_queue_is_overwritten() -> None:
    q, k = leaves((4, 16), (4, 16))
    queue = torch.randn(16, 32)
    (expected,) = torch.autograd.grad(solo.mocov2plus_loss_func(q, k, queue), q)
    loss = solo.mocov2plus_loss_func(q, k, queue)
    queue.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected)


def mocov3(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(query)))


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("temperature", [0.2, 1.0, -0.2])
def test_mocov3(batch: int, temperature: float) -> None:
    assert_same(mocov3, solo.mocov3_loss_func, *leaves((batch, 16), (batch, 16)), temperature)


def test_mocov3_of_two_dtypes() -> None:
    q, k = leaves((6, 16), (6, 16))
    half = k.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(mocov3, solo.mocov3_loss_func, q, half, rtol=3e-2, atol=3e-3)
    assert {error_of(lambda f=f: f(q, half)) for f in (mocov3, solo.mocov3_loss_func)} == {RuntimeError}


def cosine(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    if simplified:
        return F.cosine_similarity(p, z.detach(), dim=-1).mean()
    return (F.normalize(p, dim=-1) * F.normalize(z, dim=-1).detach()).sum(dim=-1).mean()


@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("shape", [(1, 8), (6, 8), (2, 3, 8)])
def test_byol_and_simsiam(shape: tuple[int, ...], simplified: bool) -> None:
    x = leaves(shape, shape)
    assert_same(lambda *a: 2 - 2 * cosine(*a), solo.byol_loss_func, *x, simplified)
    assert_same(lambda *a: -cosine(*a), solo.simsiam_loss_func, *x, simplified)


@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("shapes", [((6, 1), (6, 8)), ((6, 8), (6, 1)), ((1, 8), (6, 8))])
def test_byol_of_one_for_all(shapes: tuple[tuple[int, int], ...], simplified: bool) -> None:
    assert_same(lambda *a: 2 - 2 * cosine(*a), solo.byol_loss_func, *leaves(*shapes), simplified)


def test_simsiam_of_two_dtypes_and_of_a_target_made_in_inference_mode() -> None:
    p, z = leaves((6, 8), (6, 8))
    with torch.inference_mode():
        target = z * 1
    assert_same(lambda *a: -cosine(*a), solo.simsiam_loss_func, p, target)
    half = p.detach().bfloat16().requires_grad_()
    assert_same(lambda p, z: -cosine(p.float(), z), solo.simsiam_loss_func, half, z, inputs=[half])


@pytest.mark.parametrize(("shape", "dtype"), [((0, 8), torch.float32), ((4, 8), torch.int64)])
def test_simsiam_of_what_torch_serves(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        assert solo.simsiam_loss_func(x, x).isnan() and cosine(x, x).isnan()
    else:
        assert {error_of(lambda f=f: f(x, x)) for f in (cosine, solo.simsiam_loss_func)} == {RuntimeError}


class DINO:
    def __init__(self, schedule: list[float], crops: int, K: int, student_temp: float | Tensor = 0.1) -> None:
        self.schedule, self.crops, self.center = schedule, crops, torch.zeros(1, K)
        self.student_temp = student_temp

    def __call__(self, student: Tensor, teacher: Tensor, epoch: int = 0) -> Tensor:
        targets = ((teacher - self.center) / self.schedule[epoch]).softmax(-1).chunk(2)
        logs = (student / self.student_temp).log_softmax(-1).chunk(self.crops)
        pairs = [(t, s) for t in range(2) for s in range(self.crops) if t != s]
        self.center = 0.9 * self.center + 0.1 * teacher.mean(0, keepdim=True)
        return sum(-(targets[t] * logs[s]).sum(-1).mean() for t, s in pairs) / len(pairs)


@pytest.mark.parametrize("crops", [2, 6])
def test_dino_over_steps(crops: int) -> None:
    loss = solo.DINOLoss(24, 0.03, 0.07, 3, 5, num_large_crops=crops)
    original = DINO([0.03, 0.05, 0.07, 0.07, 0.07], crops, 24)

    def step(student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        loss.epoch = epoch
        return loss(student, teacher)

    for epoch in range(5):
        student, teacher = leaves((crops * 4, 24), (8, 24), seed=epoch)
        assert_same(original, step, student, teacher.detach(), epoch)
        torch.testing.assert_close(loss.center, original.center)
    assert set(loss.state_dict()) == {"center"}
    loss.epoch = 5
    assert error_of(lambda: loss(student, teacher)) is IndexError


@pytest.mark.parametrize(
    "temperature",
    [torch.full((), 0.3, requires_grad=True), torch.full((1,), 0.3, requires_grad=True), np.float16(0.25)],
    ids=["parameter", "one value", "numpy"],
)
def test_temperatures_of_the_student(temperature: Tensor | np.float16) -> None:
    student, teacher = leaves((8, 24), (8, 24))
    inputs = [student] + [x for x in (temperature,) if isinstance(x, Tensor)]
    loss = solo.DINOLoss(24, 0.07, 0.07, 3, 5, student_temp=temperature)
    assert_same(DINO([0.07], 2, 24, temperature), loss, student, teacher.detach(), inputs=inputs)


def test_dino_after_inference_mode() -> None:
    student, teacher = leaves((8, 24), (8, 24))
    original, loss = DINO([0.07], 2, 24), solo.DINOLoss(24, 0.07, 0.07, 3, 5)
    with torch.inference_mode():
        made = teacher * 1
        torch.testing.assert_close(loss(student, made), original(student, made))
    for _ in range(2):
        assert_same(original, loss, student, made)
        torch.testing.assert_close(loss.center, original.center)


def test_dino_of_a_teacher_in_float32_and_a_student_in_bfloat16() -> None:
    student, teacher = leaves((8, 24), (8, 24), dtype=torch.bfloat16)
    teacher = 30 * teacher.detach().float() + 0.01
    original = DINO([0.07], 2, 24)
    assert_same(lambda s, t: original(s.float(), t), solo.DINOLoss(24, 0.07, 0.07, 3, 5), student, teacher)


@pytest.mark.parametrize(("key", "queue"), [((3, 16), (16, 9)), ((4, 15), (16, 9)), ((4, 16), (15, 9))])
def test_errors_of_mocov2plus(key: tuple[int, int], queue: tuple[int, int]) -> None:
    rows = torch.ones(4, 16), torch.ones(key), torch.ones(queue)
    assert error_of(lambda: mocov2plus(*rows)) is RuntimeError
    assert error_of(lambda: solo.mocov2plus_loss_func(*rows)) is RuntimeError


def test_errors_of_simclr() -> None:
    z, ids = torch.ones(6, 16), torch.arange(5)
    assert {error_of(lambda f=f: f(z, ids)) for f in (simclr, solo.simclr_loss_func)} == {RuntimeError}


@pytest.mark.parametrize("shape", [(6,), (6, 4, 4)])
def test_errors_of_shapes_of_simclr(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="z must be"):
        solo.simclr_loss_func(torch.ones(shape), torch.arange(6))


def test_errors_of_mocov3() -> None:
    assert error_of(lambda: solo.mocov3_loss_func(torch.ones(4, 16), torch.ones(4, 15))) is RuntimeError


@pytest.mark.parametrize("widths", [(25, 25), (24, 25), (25, 24)])
def test_errors_of_dino(widths: tuple[int, int]) -> None:
    student, teacher = (torch.ones(8, width) for width in widths)
    assert error_of(lambda: solo.DINOLoss(24, 0.03, 0.07, 3, 5)(student, teacher)) is RuntimeError
    assert error_of(lambda: DINO([0.07], 2, 24)(student, teacher, 0)) is RuntimeError


@pytest.mark.parametrize("rows", [(8, 12), (12, 8), (7, 8)])
def test_errors_of_rows_of_dino(rows: tuple[int, int]) -> None:
    student, teacher = (torch.ones(n, 24) for n in rows)
    losses = solo.DINOLoss(24, 0.07, 0.07, 3, 5), DINO([0.07], 2, 24)
    assert {error_of(lambda loss=loss: loss(student, teacher)) for loss in losses} == {RuntimeError}


@pytest.mark.slow
def test_dino_is_one_graph() -> None:
    student, teacher = leaves((8, 24), (8, 24))
    loss = solo.DINOLoss(24, 0.04, 0.07, 3, 5)
    twin = copy.deepcopy(loss)
    for loss.epoch in range(2):
        twin.epoch = loss.epoch
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        assert_same(loss, compiled, student, teacher.detach())
        torch.testing.assert_close(twin.center, loss.center)


@pytest.mark.slow
def test_moco_losses_are_one_graph_of_any_size() -> None:
    q, k, queue = (F.normalize(x, dim=1).detach() for x in leaves((4, 16), (4, 16), (32, 16)))
    q.requires_grad_()
    for loss, arguments in ((solo.mocov2plus_loss_func, (q, k, queue.T)), (solo.mocov3_loss_func, (q, k))):
        assert_same(loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager"), *arguments)
