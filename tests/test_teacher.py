"""update_teacher against the loop over parameters that it stands for."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hsv_kernels import update_teacher


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 4))


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A float32 teacher and a student of `dtype`, with parameters and buffers of their own."""
    torch.manual_seed(0)
    teacher, student = network(), network().to(dtype)
    student(torch.randn(6, 3, dtype=dtype))
    return teacher, student


def averages(teacher: nn.Module, student: nn.Module, momentum: float) -> dict[str, Tensor]:
    """What the parameters of the teacher are to become, in float64."""
    students = dict(student.named_parameters())
    return {
        name: momentum * x.detach().double() + (1 - momentum) * students[name].detach().double()
        for name, x in teacher.named_parameters()
    }


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.999, 1.0, 1])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_averages_parameters_and_copies_buffers(dtype: torch.dtype, as_tensor: bool, momentum: float) -> None:
    teacher, student = pair(dtype)
    expected, before = averages(teacher, student, momentum), copy.deepcopy(student.state_dict())
    update_teacher(teacher, student, torch.tensor(float(momentum)) if as_tensor else momentum)
    for name, x in teacher.named_parameters():
        torch.testing.assert_close(x.detach().double(), expected[name], rtol=1e-6, atol=1e-7)
        assert x.requires_grad and x.grad_fn is None
    for name, x in teacher.named_buffers():
        assert torch.equal(x, student.get_buffer(name).to(x.dtype))
    assert teacher[1].num_batches_tracked == 1
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_a_teacher_may_keep_its_buffers() -> None:
    teacher, student = pair()
    update_teacher(teacher, student, 0.5, buffers=False)
    assert (teacher[1].running_mean == 0).all() and not (student[1].running_mean == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9)], ids=["number", "tensor"])
def test_calls_do_not_grow_with_the_parameters(momentum: float | Tensor, dtype: torch.dtype) -> None:
    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: torch._ops.OpOverload, types: tuple[type, ...], args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if func.overloadpacket is not torch.ops.aten.empty_like:  # no launch
                called.append(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 9):
        called: list = []
        modules = [nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).to(x) for x in (torch.float32, dtype)]
        with Counter():
            update_teacher(*modules, momentum)
        counts.append(len(called))
    assert counts[0] == counts[1] <= 5


def test_shared_parameters_move_once() -> None:
    teacher, student = pair()
    for module in (teacher, student):
        module[3].weight = module[0].weight
    expected = averages(teacher, student, 0.5)
    update_teacher(teacher, student, 0.5)
    torch.testing.assert_close(teacher[0].weight.detach().double(), expected["0.weight"], rtol=1e-6, atol=1e-7)
    assert teacher[3].weight is teacher[0].weight


def test_frozen_and_inference_parameters_and_layouts() -> None:
    teacher, student = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    teacher.requires_grad_(False)
    expected = averages(teacher, student, 0.25)
    update_teacher(teacher, student, 0.25)
    for name, x in teacher.named_parameters():
        torch.testing.assert_close(x.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not x.requires_grad


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
def test_a_student_within_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        teacher, student = pair()
        expected = averages(teacher, student, 0.5)
        update_teacher(teacher, DistributedDataParallel(student), 0.5)
        torch.testing.assert_close(teacher[0].weight.detach().double(), expected["0.weight"], rtol=1e-6, atol=1e-7)
    finally:
        dist.destroy_process_group()


def test_modules_that_differ_are_named() -> None:
    teacher, student = pair()
    for one, other, owner in ((teacher, nn.Sequential(*student[:3]), "teacher"), (teacher[:3], student, "student")):
        with pytest.raises(ValueError, match=rf"equal parameters; '3.bias' is the {owner}'s"):
            update_teacher(one, other, 0.9)
    with pytest.raises(ValueError, match=r"parameter '0.weight' must have one shape .* \[4, 3\] .* and \[3, 4\]"):
        update_teacher(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 3)), 0.9)
    student[1].register_buffer("extra", torch.zeros(()))
    with pytest.raises(ValueError, match=r"equal buffers; '1.extra' is the student's and not the teacher's"):
        update_teacher(teacher, student, 0.9)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), True, "0.9", torch.ones(1), torch.tensor(1)])
def test_momenta_that_are_refused(momentum: object) -> None:
    teacher, student = pair()
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\] or a 0-dim floating tensor; got"):
        update_teacher(teacher, student, momentum)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
