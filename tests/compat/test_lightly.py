"""hsv_kernels.compat.lightly against the installed lightly, in values, gradients, state and errors."""

import copy
import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import assert_same, error_of, leaves
from torch import Tensor, nn

from hsv_kernels import use_backend
from hsv_kernels.compat import lightly as ours

pytest.importorskip("lightly")
from lightly import loss as theirs
from lightly.models import utils

LOSSES = ["NTXentLoss", "NegativeCosineSimilarity", "DINOLoss", "IBOTPatchLoss"]
HELPERS = [name for name in ours.__all__ if name not in LOSSES]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_of_losses(name: str, method: str) -> None:
    assert _parameters(getattr(getattr(ours, name), method)) == _parameters(getattr(getattr(theirs, name), method))


@pytest.mark.parametrize("name", HELPERS)
def test_signatures_of_helpers(name: str) -> None:
    assert _parameters(getattr(ours, name)) == _parameters(getattr(utils, name))


def _parameters(function: object) -> list[tuple[str, object, object]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.5, 0.1, -0.3, 0.02])
def test_nt_xent(batch: int, temperature: float) -> None:
    x = leaves((batch, 24), (batch, 24))
    modules = theirs.NTXentLoss(temperature), ours.NTXentLoss(temperature)
    assert_same(*modules, *x, rtol=1e-4, atol=1e-5)


def test_nt_xent_of_strided_rows_and_of_one_view_with_a_gradient() -> None:
    (a, b) = leaves((24, 6), (6, 48))
    views = a.T, b[:, ::2].detach()
    assert_same(theirs.NTXentLoss(), ours.NTXentLoss(), *views, inputs=[a])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("size", [0, (6, 8)])
def test_nt_xent_with_a_learned_temperature(size: int | tuple[int, int], shape: tuple[int, ...]) -> None:
    x, temperature = leaves((5, 8), (5, 8)), torch.full(shape, 0.3, requires_grad=True)
    assert_same(*_banks(size, temperature), *x, inputs=[*x, temperature])


def test_temperatures_of_numpy() -> None:
    for temperature in (np.float32(0.25), np.float64(0.25), 1):
        assert_same(*(m.NTXentLoss(temperature) for m in (theirs, ours)), *leaves((5, 8), (5, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_nearer_the_truth(dtype: torch.dtype) -> None:
    x = leaves((64, 32), (64, 32), dtype=dtype)
    truth = theirs.NTXentLoss(0.1)(*(v.double() for v in x))
    error = abs(ours.NTXentLoss(0.1)(*x).double() - truth)
    assert error <= max(abs(theirs.NTXentLoss(0.1)(*x).double() - truth), 1e-3 * truth)


def _banks(size: int | tuple[int, int], temperature: float | Tensor = 0.2) -> tuple[nn.Module, nn.Module]:
    """Two losses whose banks begin with the same keys."""
    torch.manual_seed(0)
    original = theirs.NTXentLoss(temperature, memory_bank_size=size)
    torch.manual_seed(0)
    return original, ours.NTXentLoss(temperature, memory_bank_size=size)


@pytest.mark.parametrize("temperature", [0.2, -0.5])
def test_nt_xent_with_a_bank_over_steps(temperature: float) -> None:
    modules = _banks((12, 16), temperature)
    for step in range(7):
        assert_same(*modules, *leaves((4, 16), (4, 16), seed=step))
        torch.testing.assert_close(modules[1].memory_bank.keys, modules[0].memory_bank.bank)


def test_bank_stays_where_out0_requires_no_gradient() -> None:
    original, loss = _banks((8, 16))
    x = [v.detach() for v in leaves((4, 16), (4, 16))]
    torch.testing.assert_close(loss(*x), original(*x))
    torch.testing.assert_close(loss.memory_bank.keys, original.memory_bank.bank)
    assert loss.memory_bank.cursor == 0


def test_bank_keeps_what_lightly_drops() -> None:
    """Batches of 5 in a bank of 8: lightly drops the last rows of the second batch."""
    original, loss = _banks((8, 16))
    batches = [leaves((5, 16), (5, 16), seed=step) for step in range(2)]
    for x in batches:
        original(*x), loss(*x)
    pushed = F.normalize(torch.cat([x[1].detach() for x in batches]))
    order = torch.tensor([8, 9, 2, 3, 4, 5, 6, 7])
    torch.testing.assert_close(loss.memory_bank.keys, pushed[order])
    torch.testing.assert_close(original.memory_bank.bank, pushed[:8])


def test_batch_larger_than_the_bank() -> None:
    _, loss = _banks((4, 16))
    x = leaves((10, 16), (10, 16))
    loss(*x).backward()
    assert set(map(tuple, loss.memory_bank.keys.tolist())) == set(map(tuple, F.normalize(x[1].detach())[-4:].tolist()))


def test_bank_is_saved_and_lightly_state_dicts_load() -> None:
    original, loss = _banks((8, 16))
    loss(*leaves((5, 16), (5, 16)))
    resumed = ours.NTXentLoss(memory_bank_size=(8, 16))
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.memory_bank.keys, loss.memory_bank.keys)
    assert resumed.memory_bank.cursor == 5
    assert not original.state_dict()
    wrapped = nn.ModuleDict({"loss": resumed})
    wrapped.load_state_dict(nn.ModuleDict({"loss": original}).state_dict())
    assert torch.equal(resumed.memory_bank.keys, loss.memory_bank.keys)


@pytest.mark.parametrize("size", [0, (6, 16), (8, 4)])
def test_bank_of_another_size_is_left_out(size: int | tuple[int, int]) -> None:
    _, saved = _banks((8, 16))
    loss = ours.NTXentLoss(memory_bank_size=size)
    before = copy.deepcopy(loss.state_dict())
    wrapped = nn.ModuleDict({"loss": loss})
    wrapped.load_state_dict(nn.ModuleDict({"loss": saved}).state_dict())
    assert loss.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bank_stays_where_nothing_is_recorded(mode: Callable) -> None:
    modules = _banks((8, 16))
    x = leaves((4, 16), (4, 16))
    with mode():
        values = [module(*x) for module in modules]
    torch.testing.assert_close(values[1], values[0])
    assert modules[1].memory_bank.cursor == 0
    assert_same(*modules, *x)
    torch.testing.assert_close(modules[1].memory_bank.keys, modules[0].memory_bank.bank)


def test_bank_takes_one_key_for_all() -> None:
    modules = _banks((8, 16))
    assert_same(*modules, *leaves((4, 16), (1, 16)))
    torch.testing.assert_close(modules[1].memory_bank.keys, modules[0].memory_bank.bank)


@pytest.mark.parametrize("size", [0, (8, 16)])
def test_nt_xent_at_infinite_temperature(size: int | tuple[int, int]) -> None:
    assert_same(*_banks(size, torch.inf), *leaves((4, 16), (4, 16)))


def test_bank_with_the_reference_backend() -> None:
    modules = _banks((8, 16))
    with use_backend("reference"):
        assert_same(*modules, *leaves((4, 16), (4, 16)))


@pytest.mark.parametrize(("dim", "shapes"), [(1, [(5, 8), (5, 8)]), (2, [(1, 4, 8), (3, 1, 8)]), (1, [(2, 5, 3)] * 2)])
def test_negative_cosine_similarity(dim: int, shapes: list[tuple[int, ...]]) -> None:
    modules = [m.NegativeCosineSimilarity(dim) for m in (theirs, ours)]
    assert_same(*modules, *leaves(*shapes))


@pytest.mark.parametrize("eps", [0, 1e-50, torch.inf])
def test_negative_cosine_similarity_of_any_eps(eps: float) -> None:
    x = leaves((5, 8), (5, 8))
    assert_same(*(m.NegativeCosineSimilarity(eps=eps) for m in (theirs, ours)), *x)
    zeros = torch.cat([x[0].detach(), torch.zeros(1, 8)]), torch.ones(6, 8)
    values = [m.NegativeCosineSimilarity(eps=eps)(*zeros) for m in (theirs, ours)]
    torch.testing.assert_close(values[1], values[0], equal_nan=True)


@pytest.mark.parametrize(("shape", "eps"), [((2, 3), -1), ((2, 3), torch.nan), ((), 1e-8), ((3,), 1e-8)])
def test_errors_of_negative_cosine_similarity(shape: tuple[int, ...], eps: float) -> None:
    x = torch.ones(shape)
    assert len({error_of(lambda m=m: m.NegativeCosineSimilarity(eps=eps)(x, x)) for m in (theirs, ours)}) == 1


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_negative_cosine_similarity_of_nothing(shape: tuple[int, int]) -> None:
    values = [m.NegativeCosineSimilarity()(torch.ones(shape), torch.ones(shape)) for m in (theirs, ours)]
    torch.testing.assert_close(values[1], values[0], equal_nan=True)


@pytest.mark.parametrize(("teachers", "students"), [(2, 6), (1, 2), (2, 1), (2, 2)])
def test_dino_over_steps(teachers: int, students: int) -> None:
    options = {"warmup_teacher_temp": 0.03, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}
    modules = [m.DINOLoss(40, **options) for m in (theirs, ours)]
    for step in range(5):
        t = [x.detach() for x in leaves(*[(4, 40)] * teachers, seed=step)]
        s = leaves(*[(4, 40)] * students, seed=100 + step)
        how = ({"epoch": step}, {"teacher_temp": 0.05}, {})[step % 3]
        assert_same(*modules, t, s, inputs=s, **how)
        torch.testing.assert_close(modules[1].center, modules[0].center)


def test_dino_state_dicts_go_both_ways_and_teachers_get_no_gradient() -> None:
    original, loss = theirs.DINOLoss(8), ours.DINOLoss(8)
    t, s = leaves((2, 8), (2, 8)), leaves((2, 8), (2, 8), seed=1)
    loss(t, s).backward()
    assert all(x.grad is None for x in t)
    original.load_state_dict(loss.state_dict())
    loss.load_state_dict(original.state_dict())
    torch.testing.assert_close(loss(t, s), original(t, s))


def test_schedules_of_dino() -> None:
    torch.testing.assert_close(*(m.DINOLoss(8, 0.03, 0.07, 3).teacher_temp_schedule for m in (theirs, ours)))


def test_dino_of_views_of_several_dtypes() -> None:
    a, b = leaves((4, 40), (4, 40))
    half = b.detach().bfloat16().requires_grad_()
    teacher = [x.detach() for x in leaves((4, 40), (4, 40), seed=1)]
    modules = [m.DINOLoss(40) for m in (theirs, ours)]
    assert_same(*modules, teacher, [half, a], inputs=[half, a], rtol=1e-3)
    assert_same(*modules, [teacher[0].bfloat16(), teacher[1]], [a, b], inputs=[a, b])
    torch.testing.assert_close(modules[1].center, modules[0].center)


TEMPERATURES = {
    "parameter": nn.Parameter(torch.tensor(0.06)),
    "one value": torch.tensor([0.06]),
    "integer": torch.tensor(1),
    "numpy": np.float16(0.0625),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES.keys())
def test_temperatures_of_the_teacher(temperature: object) -> None:
    views, (teacher, student, mask) = leaves((4, 40), (4, 40)), _masked(0)
    targets = [x.detach() for x in views]
    assert_same(*(m.DINOLoss(40) for m in (theirs, ours)), targets, views, temperature, inputs=views)
    assert_same(*(m.IBOTPatchLoss(40, temperature) for m in (theirs, ours)), teacher, student, mask)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_learned_temperatures_of_the_student(shape: tuple[int, ...]) -> None:
    temperature = torch.full(shape, 0.3, requires_grad=True)
    views, (teacher, student, mask) = leaves((4, 40), (4, 40)), _masked(0)
    modules = [m.DINOLoss(40, student_temp=temperature) for m in (theirs, ours)]
    assert_same(*modules, [x.detach() for x in views], views, inputs=[*views, temperature])
    modules = [m.IBOTPatchLoss(40, student_temp=temperature) for m in (theirs, ours)]
    assert_same(*modules, teacher, student, mask, inputs=[student, temperature])


def test_training_after_inference_mode() -> None:
    """A step in inference mode, then one with gradients, the teacher's logits still made in that mode."""
    views, (teacher, student, mask) = leaves((4, 40), (4, 40)), _masked(0)
    for name, make, inputs in (
        ("DINOLoss", lambda: ([x * 1 for x in views], views), views),
        ("IBOTPatchLoss", lambda: (teacher * 1, student, mask), [student]),
    ):
        modules = [getattr(m, name)(40) for m in (theirs, ours)]
        with torch.inference_mode():
            arguments = make()
            values = [module(*arguments) for module in modules]
        torch.testing.assert_close(values[1], values[0])
        for _ in range(2):
            assert_same(*modules, *arguments, inputs=inputs)
        torch.testing.assert_close(list(modules[1].buffers()), list(modules[0].buffers()))


@pytest.mark.parametrize("size", [0, (8, 16)])
def test_targets_made_in_inference_mode(size: int | tuple[int, int]) -> None:
    (x,) = leaves((4, 16))
    with torch.inference_mode():
        target = x.roll(1, 0) + 1
    assert_same(*_banks(size), x, target)
    assert_same(theirs.NegativeCosineSimilarity(), ours.NegativeCosineSimilarity(), x, target)


def _masked(step: int, K: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher's and student's logits of the masked of 3 × 4 × 4 patches; the first image has none."""
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(step)) < 0.4
    mask[0] = False
    rows = int(mask.sum())
    teacher, student = leaves((rows, K), (rows, K), seed=step)
    return teacher.detach(), student, mask


def test_ibot_over_steps() -> None:
    modules = [m.IBOTPatchLoss(40, teacher_temp=0.06) for m in (theirs, ours)]
    for step in range(4):
        teacher, student, mask = _masked(step)
        how = {"teacher_temp": 0.05} if step == 1 else {}
        assert_same(*modules, teacher, student, mask, **how)
        torch.testing.assert_close(modules[1].center.value, modules[0].center.value)
    modules[0].load_state_dict(modules[1].state_dict())


def test_ibot_of_a_teacher_in_float32_and_a_student_in_bfloat16() -> None:
    """The teacher is not rounded: near lightly's value for a student whose logits are widened first."""
    teacher, student, mask = _masked(0)
    student = student.detach().bfloat16().requires_grad_()
    original, loss = (m.IBOTPatchLoss(40) for m in (theirs, ours))
    for _ in range(2):
        assert_same(lambda t, s, m: original(t, s.float(), m), loss, 30 * teacher, student, mask)
        torch.testing.assert_close(loss.center.value, original.center.value)


def test_self_distillation_of_nothing() -> None:
    views, mask = [torch.zeros(0, 8)] * 2, torch.zeros(0, 2, 2, dtype=torch.bool)
    for library, lost in ((theirs, True), (ours, False)):
        for module, arguments in ((library.DINOLoss(8), (views, views)), (library.IBOTPatchLoss(8), (*views, mask))):
            for buffer in module.buffers():
                buffer.fill_(0.5)
            assert module(*arguments).isnan() == lost
            assert all(buffer.isnan().any() if lost else (buffer == 0.5).all() for buffer in module.buffers())


def test_ibot_without_masked_patches_leaves_the_centre_as_it_is() -> None:
    teacher, student, mask = torch.zeros(0, 40), torch.zeros(0, 40), torch.zeros(3, 4, 4, dtype=torch.bool)
    for module, lost in ((theirs.IBOTPatchLoss(40), True), (ours.IBOTPatchLoss(40), False)):
        assert module(teacher, student, mask) == 0
        assert module.center.value.isnan().any() == lost


@pytest.mark.parametrize(
    "arguments", [(0,), (1e-9,), (-1e-9,), (1, 5), (1, -1), (1, (3,)), (1, (1, 2, 3)), (1, (8.0, 16))]
)
def test_errors_of_construction(arguments: tuple) -> None:
    assert error_of(lambda: ours.NTXentLoss(*arguments)) is error_of(lambda: theirs.NTXentLoss(*arguments))


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (size, shapes)
        for size in (0, (8, 16))
        for shapes in (
            ((16,), (16,)),
            ((4, 16), (16,)),
            ((4, 16), (3, 16)),
            ((4, 16), (4, 3)),
            ((4, 16, 1), (4, 16, 1)),
        )
    ]
    + [(0, ((0, 16), (0, 16))), ((8, 16), ((4, 3), (4, 3)))],
)
def test_errors_of_shapes(size: int | tuple[int, int], shapes: tuple[tuple[int, ...], ...]) -> None:
    calls = (lambda m=m: m.NTXentLoss(memory_bank_size=size)(*map(torch.ones, shapes)) for m in (theirs, ours))
    assert len({error_of(call) for call in calls}) == 1


@pytest.mark.parametrize(("teachers", "students", "width"), [(1, 1, 8), (2, 2, 9)])
def test_errors_of_dino(teachers: int, students: int, width: int) -> None:
    views = [torch.ones(2, width)]
    calls = (lambda m=m: m.DINOLoss(8)(views * teachers, views * students) for m in (theirs, ours))
    assert len({error_of(call) for call in calls}) == 1


@pytest.mark.parametrize(
    ("teachers", "students"), [([], []), ([], [(2, 8)]), ([(2, 8)], []), ([(2, 3, 8)] * 2,) * 2, ([(8,)] * 2,) * 2]
)
def test_errors_of_dino_views(teachers: list[tuple[int, ...]], students: list[tuple[int, ...]]) -> None:
    views = [[torch.ones(shape) for shape in shapes] for shapes in (teachers, students)]
    assert {error_of(lambda m=m: m.DINOLoss(8)(*views)) for m in (theirs, ours)} == {RuntimeError}


def test_errors_of_centres_and_masks() -> None:
    for name in ("DINOLoss", "IBOTPatchLoss"):
        assert error_of(lambda n=name: getattr(ours, n)(8, center_mode="median")) is ValueError
        assert error_of(lambda n=name: getattr(theirs, n)(8, center_mode="median")) is ValueError
    teacher, student, mask = _masked(0)
    calls = (lambda m=m: m.IBOTPatchLoss(40)(teacher[:-1], student[:-1], mask) for m in (theirs, ours))
    assert {error_of(call) for call in calls} == {RuntimeError}


@pytest.mark.parametrize(("teachers", "width"), [(4, 40), (5, 41)])
def test_errors_of_ibot(teachers: int, width: int) -> None:
    teacher, student = torch.ones(teachers, width), torch.ones(5, width)
    mask = torch.arange(8).reshape(1, 2, 4) < 5
    calls = (lambda m=m: m.IBOTPatchLoss(40)(teacher, student, mask) for m in (theirs, ours))
    assert {error_of(call) for call in calls} == {RuntimeError}


@pytest.mark.parametrize("mask_class_token", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("size", [(3, 197), (2, 5), (2, 1), (2, 0), (0, 5)])
def test_random_token_mask(size: tuple[int, int], ratio: float, mask_class_token: bool) -> None:
    keep, mask = ours.random_token_mask(size, ratio, mask_class_token)
    expected = utils.random_token_mask(size, ratio, mask_class_token)
    assert [x.shape for x in (keep, mask)] == [x.shape for x in expected]
    assert torch.equal(torch.cat([keep, mask], dim=1).sort().values, torch.arange(size[1]).expand(size))
    if not mask_class_token and size[1]:
        assert (keep[:, 0] == 0).all()


def test_random_token_mask_is_uniform_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    keep, _ = ours.random_token_mask((4000, 9), 0.75)
    frequency = keep[:, 1:].flatten().bincount(minlength=9)[1:] / 4000
    assert (frequency - 0.25).abs().max() < 0.035  # five standard deviations
    torch.manual_seed(0)
    assert torch.equal(ours.random_token_mask((4000, 9), 0.75)[0], keep)


def _summed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar whose gradient differs from place to place."""
    return lambda *arguments: function(*arguments).sin().sum()


def test_token_helpers() -> None:
    tokens, value, mask_token = leaves((2, 5, 3), (2, 2, 3), (1, 1, 3))
    index, twice = torch.tensor([[0, 2], [1, 4]]), torch.tensor([[1, 1], [0, 0]])
    for name, arguments in (
        ("get_at_index", (tokens, index)),
        ("get_at_index", (tokens, twice)),
        ("set_at_index", (tokens, index, value)),
        ("mask_at_index", (tokens, index, mask_token)),
        ("mask_bool", (tokens, torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1]]), mask_token)),
        ("prepend_class_token", (tokens, mask_token)),
        ("repeat_token", (mask_token, (2, 5))),
    ):
        assert_same(_summed(getattr(utils, name)), _summed(getattr(ours, name)), *arguments)
    assert torch.equal(ours.set_at_index(tokens, index, 1), utils.set_at_index(tokens, index, 1))
    assert torch.equal(ours.expand_index_like(index, tokens), utils.expand_index_like(index, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("channels", [3, 4])
def test_patchify(dtype: torch.dtype, channels: int) -> None:
    images = (torch.rand(2, channels, 6, 6) * 255).to(dtype)
    patches = ours.patchify(images, 3)
    assert torch.equal(patches, utils.patchify(images, 3))
    assert torch.equal(ours.unpatchify(patches, 3, channels), images)
    assert {error_of(lambda m=m: m.patchify(images, 4)) for m in (ours, utils)} == {AssertionError}
    assert {error_of(lambda m=m: m.unpatchify(patches[:, :3], 3, channels)) for m in (ours, utils)} == {AssertionError}


def test_errors_of_token_helpers() -> None:
    tokens, index = torch.ones(5, 3), torch.tensor([[0, 2], [1, 4]])
    for name, arguments, error in (
        ("patchify", (torch.ones(3, 8, 8), 4), ValueError),
        ("get_at_index", (tokens, index), RuntimeError),
        ("repeat_token", (tokens[None, :1], (2,)), ValueError),
        ("repeat_token", (tokens[None, :1], (2, 5, 1)), ValueError),
    ):
        assert {error_of(lambda m=m, n=name, a=arguments: getattr(m, n)(*a)) for m in (ours, utils)} == {error}


def test_patchify_takes_what_is_not_square() -> None:
    assert ours.patchify(torch.zeros(1, 3, 4, 6), 2).shape == (1, 6, 12)


@pytest.mark.slow
def test_losses_with_state_under_compile() -> None:
    x = leaves((4, 16), (4, 16))
    teacher = [v.detach() for v in x]
    for loss, arguments, full in (
        (ours.NTXentLoss(memory_bank_size=(8, 16)), x, False),
        (ours.DINOLoss(16), (teacher, x), True),
        (ours.DINOLoss(16, 0.03), (teacher, x, None, 1), True),
    ):
        twin = copy.deepcopy(loss)
        for _ in range(2):
            assert_same(loss, torch.compile(twin, backend="aot_eager", fullgraph=full), *arguments, inputs=x)
        assert all(torch.equal(a, b) for a, b in zip(loss.buffers(), twin.buffers(), strict=True))


@pytest.mark.slow
def test_random_token_mask_is_one_graph() -> None:
    def mask() -> tuple[Tensor, Tensor]:
        return ours.random_token_mask((2, 9), 0.5)

    keep, removed = torch.compile(mask, fullgraph=True, backend="aot_eager")()
    assert torch.equal(torch.cat([keep, removed], dim=1).sort().values, torch.arange(9).expand(2, 9))
