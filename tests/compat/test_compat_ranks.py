"""Two ranks: gradients are lightly's and solo-learn's for equal batches, and the value is the mean of theirs."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parity import leaves
from torch import Tensor, nn

from hsv_kernels.compat import lightly as ours
from hsv_kernels.compat import pytorch_metric_learning, solo
from hsv_kernels.distributed import all_gather_rows

WORLD, ROWS = 2, 4


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    mp.spawn(_rank, (str(tmp_path / "store"),), nprocs=WORLD)


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    from lightly import loss as theirs

    dist.init_process_group("gloo", f"file://{store}", timedelta(minutes=1), WORLD, rank)
    for arguments in ((0.2, 0, True), (-0.5, 0, True), (0.2, (16, 8), True)):
        losses = []
        for library in (theirs, ours):
            torch.manual_seed(0)
            losses.append(library.NTXentLoss(*arguments))
        for step in range(2):
            _check(*losses, leaves((ROWS, 8), (ROWS, 8), seed=10 * step + rank))
        if losses[1].memory_bank is not None:
            torch.testing.assert_close(losses[1].memory_bank.keys, losses[0].memory_bank.bank)
    _dino(theirs, rank)
    _ibot(theirs, rank)
    _against_one_process(rank)
    _metric_learning(rank)
    dist.destroy_process_group()


def _check(original: nn.Module, loss: nn.Module, x: list[Tensor], *arguments: object) -> None:
    """Equal gradients on this rank, and a value that is the mean over ranks."""
    found = []
    for module in (original, loss):
        value = module(*arguments or x)
        found.append((value.detach(), torch.autograd.grad(value, x)))
    expected = found[0][0].clone()
    dist.all_reduce(expected)
    torch.testing.assert_close(found[1][0], expected / WORLD)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def _dino(theirs: object, rank: int) -> None:
    modules = [library.DINOLoss(8) for library in (theirs, ours)]
    for step in range(3):
        x = leaves((ROWS, 8), (ROWS, 8), (ROWS, 8), seed=10 * step + rank)
        teacher = [v.detach() for v in x[:2]]
        _check(*(lambda t, s, m=m: m(t, s) for m in modules), x, teacher, x)
        torch.testing.assert_close(modules[1].center, modules[0].center)


def _ibot(theirs: object, rank: int) -> None:
    """As many masked patches on each rank, in other places: with other counts lightly's centre leans to one rank."""
    modules = [library.IBOTPatchLoss(8) for library in (theirs, ours)]
    mask = torch.zeros(2, 2, 4, dtype=torch.bool)
    mask.view(-1)[[0, 5, 6] if rank else [9, 10, 12]] = True
    teacher, student = leaves((3, 8), (3, 8), seed=rank)
    _check(*(lambda t, s, k, m=m: m(t, s, k) for m in modules), [student], teacher.detach(), student, mask)
    torch.testing.assert_close(modules[1].center.value, modules[0].center.value)


def _metric_learning(rank: int) -> None:
    """The library's wrapper gives WORLD times the loss, and the gradients of ours over the rows of all ranks."""
    wrappers = pytest.importorskip("pytorch_metric_learning.utils.distributed")
    from pytorch_metric_learning import losses

    (x,), labels = leaves((ROWS, 8), seed=rank), torch.arange(ROWS) // 2
    for name in ("NTXentLoss", "SupConLoss"):
        expected = wrappers.DistributedLossWrapper(getattr(losses, name)())(x, labels)
        value = getattr(pytorch_metric_learning, name)()(all_gather_rows(x), all_gather_rows(labels))
        torch.testing.assert_close(WORLD * value, expected, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(loss, x)[0] for loss in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def _against_one_process(rank: int) -> None:
    """solo-learn's functions give a rank WORLD times its rows of the whole batch's gradient, uneven batches too."""
    z, k = leaves((6, 8), (6, 8))
    whole = z, k.detach(), torch.tensor([0, 1, 2, 2, 0, 1])
    for call in (_simclr, _mocov3):
        expected, expected_gradient = _alone(call, *whole)
        for sizes in ((3, 3), (2, 4)):
            mine = [x.detach().split(sizes)[rank] for x in whole]
            mine[0].requires_grad_()
            value = call(*mine)
            (gradient,) = torch.autograd.grad(value, mine[0])
            torch.testing.assert_close(value.detach(), expected)
            torch.testing.assert_close(gradient, WORLD * expected_gradient.split(sizes)[rank], rtol=1e-4, atol=1e-6)


def _simclr(z: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    return solo.simclr_loss_func(z, ids)


def _mocov3(z: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    return solo.mocov3_loss_func(z, k)


def _alone(call: Callable[..., Tensor], z: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient as in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        value = call(z, *others)
        return value.detach(), torch.autograd.grad(value, z)[0]
