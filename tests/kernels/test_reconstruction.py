"""masked_mse on every backend of this machine against its definition in float64, and denormalise_patches."""

import multiprocessing
import threading
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hsv_kernels import MaskedMSELoss, denormalise_patches, masked_mse
from hsv_kernels.ops.masking.reference import patchify
from hsv_kernels.ops.reconstruction import function, reference
from tests.kernels.cases import (
    LAYOUTS,
    assert_accurate,
    device_of,
    incoming,
    peak_memory,
    poisoned_allocations,
    usable_backends,
)

BACKENDS = usable_backends("reconstruction")
HALVES = [torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


class Case(NamedTuple):
    """Sizes of one problem; `masked` is the share of masked patches, None means weights between 0 and 2."""

    batch: int
    channels: int
    rows: int
    columns: int
    p: int
    q: int
    norm_pix: bool = True
    masked: float | None = 0.75

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.p, self.q

    @property
    def values(self) -> int:
        return self.p * self.q * self.channels


CASES = {
    "digits": Case(4, 1, 4, 4, 2, 2),
    "tiny patches": Case(2, 3, 2, 3, 2, 2),
    "two values": Case(2, 2, 3, 2, 1, 1),
    "one value": Case(2, 1, 3, 2, 1, 1, norm_pix=False),
    "one patch": Case(1, 3, 1, 1, 3, 5, masked=1.0),
    "five channels": Case(3, 5, 3, 2, 7, 3),
    "weights": Case(2, 3, 3, 3, 4, 8, masked=None),
    "pixels": Case(2, 3, 3, 3, 4, 8, norm_pix=False, masked=None),
    "cifar": Case(2, 3, 2, 3, 6, 4),
    "vit": Case(2, 3, 3, 2, 16, 16),
    "large patches": Case(1, 3, 2, 1, 32, 32, masked=1.0),
    "wide patches": Case(2, 3, 2, 2, 2, 48),
    "rows of half vectors": Case(2, 3, 2, 3, 3, 24),
    "patches above any block": Case(1, 3, 1, 2, 80, 96, masked=None),
    "one plane above any block": Case(1, 1, 2, 1, 96, 112, masked=1.0),
    "all visible": Case(2, 3, 2, 2, 4, 4, masked=0.0),
}
VIT = CASES["vit"]
SMALL = Case(2, 3, 3, 2, 4, 4, masked=0.6)
WEIGHTS = CASES["weights"]


class Problem(NamedTuple):
    pred: Tensor
    images: Tensor
    mask: Tensor

    def double(self) -> "Problem":
        return Problem(self.pred.double(), self.images.double(), self.mask.double())


def problem(case: Case, backend: str, dtype: torch.dtype = torch.float32, level: float = 0.0) -> Problem:
    """Normal predictions and images (of mean `level`) of `dtype`, where `backend` wants them."""
    generator = torch.Generator().manual_seed(sum(case[:6]))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    L, device = case.rows * case.columns, device_of(backend)
    pred = normal(case.batch, L, case.values)
    images = normal(case.batch, case.channels, case.rows * case.p, case.columns * case.q) + level
    chance = torch.rand(case.batch, L, generator=generator)
    mask = 2 * chance * (chance < 0.7) if case.masked is None else (chance < case.masked).float()
    return Problem(pred.to(device, dtype), images.to(device, dtype), mask.to(device))


def loss_of(case: Case, backend: str, given: Problem, reduction: str = "mean") -> Tensor:
    return masked_mse(*given, case.patch_size, norm_pix=case.norm_pix, reduction=reduction, backend=backend)


def evaluate(case: Case, backend: str, given: Problem, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Loss and the gradient of `pred`."""
    pred = given.pred.detach().requires_grad_()
    loss = loss_of(case, backend, given._replace(pred=pred), reduction)
    (gradient,) = torch.autograd.grad(loss, pred, incoming(loss))
    return loss.detach(), gradient


def by_autograd(case: Case, given: Problem, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Loss and gradient of the definition, differentiated by PyTorch."""
    pred = given.pred.detach().requires_grad_()
    loss = reference.masked_mse(pred, given.images, given.mask, case.p, case.q, case.norm_pix, reduction)
    (gradient,) = torch.autograd.grad(loss, pred, incoming(loss))
    return loss.detach(), gradient


def types_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, *HALVES] + ([torch.float64] if backend in ("reference", "cpu") else [])


TYPED = [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in BACKENDS for dtype in types_of(name)]
every_type = pytest.mark.parametrize(("backend", "dtype"), TYPED)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
in_double = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])


@every_type
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_match_the_definition(case: Case, backend: str, dtype: torch.dtype) -> None:
    given = problem(case, backend, dtype)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in REDUCTIONS:
        found = evaluate(case, backend, given, reduction)
        plain = by_autograd(case, given._replace(pred=given.pred.to(single)), reduction)
        truth = by_autograd(case, given.double(), reduction)
        assert (found[0].dtype, found[1].dtype) == (single, dtype)
        assert_accurate(found[0], plain[0], truth[0], single, case.values)
        assert_accurate(found[1], plain[1], truth[1], dtype, case.values)
        if dtype in HALVES:  # one rounding, at the end
            margin = 0.51 * torch.finfo(dtype).eps * truth[1].abs() + 1e-5 * truth[1].abs().max() + 1e-7
            assert ((found[1].double() - truth[1]).abs() <= margin).all()


@every_backend
@pytest.mark.parametrize("images", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_another_type(backend: str, images: torch.dtype) -> None:
    given = problem(SMALL, backend)
    given = given._replace(images=given.images.to(images))
    truth = by_autograd(SMALL, given.double())
    plain = by_autograd(SMALL, given._replace(images=given.images.float()))
    for found, expected, exact in zip(evaluate(SMALL, backend, given), plain, truth, strict=True):
        assert_accurate(found, expected, exact, torch.float32, SMALL.values)


@every_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_half_predictions_of_single_images(backend: str, layout: torch.memory_format) -> None:
    """Both sides are read 16 bytes at a time, which are not as many values of one as of the other."""
    given = problem(VIT, backend)
    given = given._replace(pred=given.pred.bfloat16(), images=given.images.contiguous(memory_format=layout))
    truth = by_autograd(VIT, given.double())
    plain = by_autograd(VIT, given._replace(pred=given.pred.float()))
    found = evaluate(VIT, backend, given)
    assert_accurate(found[0], plain[0], truth[0], torch.float32, VIT.values)
    assert_accurate(found[1], plain[1], truth[1], torch.bfloat16, VIT.values)


@in_double
def test_double_predictions_of_single_images(backend: str) -> None:
    given = problem(VIT, backend)
    found = evaluate(VIT, backend, given._replace(pred=given.pred.double()))
    for x, truth in zip(found, by_autograd(VIT, given.double()), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-12, atol=1e-14)


@every_backend
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_any_layout(backend: str, layout: str) -> None:
    for case in (WEIGHTS, CASES["digits"]):
        given = problem(case, backend)
        expected = evaluate(case, backend, given)
        if layout == "channels last":
            other = given._replace(images=given.images.contiguous(memory_format=torch.channels_last))
        else:
            other = Problem(*map(LAYOUTS[layout], given))
        for x, y in zip(evaluate(case, backend, other), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@every_backend
def test_expanded_inputs(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    expanded = Problem(*(x[:1].expand_as(x) for x in given))._replace(images=given.images[:, :1].expand(-1, 3, -1, -1))
    copied = Problem(*(x.contiguous() for x in expanded))
    for x, y in zip(evaluate(WEIGHTS, backend, expanded), evaluate(WEIGHTS, backend, copied), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_incoming_gradient(backend: str, layout: str) -> None:
    given = problem(WEIGHTS, backend)
    pred = given.pred.requires_grad_()
    loss = loss_of(WEIGHTS, backend, given, "none")
    expected = torch.autograd.grad(loss, pred, incoming(loss), retain_graph=True)[0]
    found = torch.autograd.grad(loss, pred, LAYOUTS[layout](incoming(loss)), retain_graph=True)[0]
    assert torch.equal(found, expected)
    of_sum = torch.autograd.grad(loss.sum(), pred, retain_graph=True)[0]
    assert torch.equal(of_sum, torch.autograd.grad(loss, pred, torch.ones_like(loss))[0])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_mask_of_any_type(backend: str, dtype: torch.dtype) -> None:
    given = problem(SMALL, backend)
    found = evaluate(SMALL, backend, given._replace(mask=given.mask.to(dtype)))
    for x, y in zip(found, evaluate(SMALL, backend, given), strict=True):
        assert torch.equal(x, y)


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_visible_patches_do_not_matter(backend: str, value: float) -> None:
    given = problem(SMALL, backend)
    visible = given.mask == 0
    assert visible.any()
    hidden = visible.reshape(SMALL.batch, 1, SMALL.rows, SMALL.columns)
    hidden = hidden.repeat_interleave(SMALL.p, 2).repeat_interleave(SMALL.q, 3)
    other = Problem(
        given.pred.masked_fill(visible[..., None], value), given.images.masked_fill(hidden, value), given.mask
    )
    for reduction in REDUCTIONS:
        found = evaluate(SMALL, backend, other, reduction)
        for x, y in zip(found, evaluate(SMALL, backend, given, reduction), strict=True):
            assert torch.equal(x, y)
    pred = other.pred.requires_grad_()
    loss = loss_of(SMALL, backend, other, "none")
    (gradient,) = torch.autograd.grad(loss, pred, torch.where(visible, value, 1.0))
    assert (gradient[visible] == 0).all() and gradient.isfinite().all()


@every_backend
@pytest.mark.parametrize("where", ["pred", "images", "mask"])
def test_nan_in_a_masked_patch_shows_there_and_nowhere_else(backend: str, where: str) -> None:
    case = WEIGHTS._replace(masked=1.0)
    given = problem(case, backend)
    {"pred": given.pred[0, 0], "images": given.images[0, 1, 2], "mask": given.mask[0]}[where][:1] = float("nan")
    losses, gradient = evaluate(case, backend, given, "none")
    hit = torch.zeros_like(losses, dtype=torch.bool)
    hit[0, 0] = True
    assert torch.equal(losses.isnan(), hit)
    assert gradient[0, 0].isnan().any() and gradient[~hit].isfinite().all()
    loss, _ = evaluate(case, backend, given)
    assert loss.isnan()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_masked_is_zero(backend: str, dtype: torch.dtype) -> None:
    case = CASES["all visible"]
    given = problem(case, backend, dtype)
    pred = torch.full_like(given.pred, float("nan")).requires_grad_()
    with poisoned_allocations():
        loss = loss_of(case, backend, given._replace(pred=pred))
        loss.backward()
    assert loss.item() == 0
    assert (pred.grad == 0).all()


@every_backend
def test_bright_images_keep_their_digits(backend: str) -> None:
    given = problem(VIT, backend, level=1e3)
    truth = by_autograd(VIT, given.double(), "none")
    plain = by_autograd(VIT, given, "none")
    for found, expected, exact in zip(evaluate(VIT, backend, given, "none"), plain, truth, strict=True):
        assert_accurate(found, expected, exact, torch.float32, VIT.values)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@every_backend
def test_constant_patches(backend: str) -> None:
    given = problem(SMALL, backend)
    given.images.fill_(0.5)
    loss, gradient = evaluate(SMALL, backend, given)
    expected = (given.pred.square().mean(-1) * given.mask).sum() / given.mask.sum()
    torch.testing.assert_close(loss, expected)
    assert gradient.isfinite().all()


@every_backend
def test_nothing_stays_unwritten(backend: str) -> None:
    for case in (CASES["digits"], WEIGHTS):
        given = problem(case, backend)
        expected = evaluate(case, backend, given)
        with poisoned_allocations():
            found = evaluate(case, backend, given)
            mean, rstd = function.masked_mse_op(*given, *case.patch_size, True, backend)[1:]
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
        assert mean.isfinite().all() and rstd.isfinite().all()


@every_backend
def test_repeats_are_equal_to_the_last_bit(backend: str) -> None:
    given = problem(WEIGHTS, backend, torch.bfloat16)
    first = evaluate(WEIGHTS, backend, given)
    for x, y in zip(evaluate(WEIGHTS, backend, given), first, strict=True):
        assert torch.equal(x, y)


@in_double
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_gradcheck(backend: str, reduction: str, norm_pix: bool) -> None:
    case = Case(2, 3, 2, 2, 1, 2, norm_pix=norm_pix, masked=None)
    given = problem(case, backend, torch.float64)
    torch.autograd.gradcheck(
        lambda pred: loss_of(case, backend, given._replace(pred=pred), reduction), given.pred.requires_grad_()
    )


@every_backend
def test_backward_twice_gives_equal_gradients(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    pred = given.pred.requires_grad_()
    loss = loss_of(WEIGHTS, backend, given)
    first = torch.autograd.grad(loss, pred, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, pred)[0]
    assert torch.equal(first, kept) and torch.equal(first, second)
    assert loss_of(WEIGHTS, backend, given._replace(pred=pred.detach())).grad_fn is None


@every_backend
def test_double_backward_raises(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    pred = given.pred.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(WEIGHTS, backend, given), pred, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()
    loss = loss_of(WEIGHTS, backend, given, "none")
    weight = torch.ones_like(loss, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss, pred, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), weight)


@every_backend
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    with torch.autocast(device_of(backend).type, dtype=torch.bfloat16):
        found = evaluate(WEIGHTS, backend, given)
    for x, y in zip(found, evaluate(WEIGHTS, backend, given), strict=True):
        assert torch.equal(x, y)


@every_backend
def test_operators_are_registered_rightly(backend: str) -> None:
    case = CASES["tiny patches"]
    given = problem(case, backend)
    for mask in (given.mask, given.mask.bool()):
        inputs = (given.pred.detach().requires_grad_(), given.images, mask, *case.patch_size, True, backend)
        torch.library.opcheck(function.masked_mse_op, inputs)
    losses, mean, rstd = function.masked_mse_op(*given, *case.patch_size, True, backend)
    inputs = (incoming(losses), given.pred.detach(), given.images, given.mask, mean, rstd, *case.patch_size, backend)
    torch.library.opcheck(function.masked_mse_backward_op, inputs)


@every_backend
@pytest.mark.filterwarnings("ignore")
def test_compiles_as_one_graph(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    expected = evaluate(WEIGHTS, backend, given)
    pred = given.pred.requires_grad_()
    compiler = "inductor" if backend == "cpu" else "aot_eager"  # one is enough of the slow one
    double = torch.compile(
        lambda pred: 2 * loss_of(WEIGHTS, backend, given._replace(pred=pred)), fullgraph=True, backend=compiler
    )
    loss = double(pred)
    loss.backward()
    torch.testing.assert_close(loss, 2 * expected[0])
    torch.testing.assert_close(pred.grad, 2 * expected[1] / incoming(loss))


@every_backend
def test_functional_gradient(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    loss, gradient = evaluate(WEIGHTS, backend, given)
    found = torch.func.grad(lambda pred: loss_of(WEIGHTS, backend, given._replace(pred=pred)))(given.pred)
    assert torch.equal(found * incoming(loss), gradient)


@every_backend
def test_vmap_raises(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    stacked = torch.stack([given.pred, given.pred])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda pred: loss_of(WEIGHTS, backend, given._replace(pred=pred)))(stacked)


@on_cpu
def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    before = torch.get_num_threads()
    many = Case(70, 1, 32, 16, 1, 2, masked=None)  # more patches than torch sums in one thread
    for case in (Case(20, 3, 4, 4, 16, 16), many):
        given = problem(case, backend)
        found = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                found.append(evaluate(case, backend, given))
        finally:
            torch.set_num_threads(before)
        for loss, gradient in found[1:]:
            assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


@on_cpu
def test_right_in_a_forked_worker(backend: str) -> None:
    case = VIT._replace(batch=16)  # work for several threads
    given = problem(case, backend)
    expected = evaluate(case, backend, given)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(
        target=lambda: sender.send([x.numpy() for x in evaluate(case, backend, given)]), daemon=True
    )
    worker.start()
    arrived = receiver.poll(60)
    found = receiver.recv() if arrived else None
    worker.kill()
    assert arrived, "the worker hung or died"
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(x), y)


@every_backend
def test_every_float16_is_read_exactly(backend: str) -> None:
    device = device_of(backend)
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).reshape(1, 1, 256, 256)
    mask, pred = torch.ones(1, 2**15, dtype=torch.bool, device=device), torch.zeros(1, 2**15, 2, device=device)
    found = masked_mse(pred, every.to(device), mask, (1, 2), norm_pix=False, reduction="none", backend=backend)
    expected = every.float().reshape(1, -1, 2).square().mean(-1)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0, equal_nan=True)


@on_cpu
def test_right_in_two_threads_at_once(backend: str) -> None:
    cases = [VIT._replace(batch=16), VIT._replace(batch=20, norm_pix=False)]
    problems = [problem(case, backend) for case in cases]
    expected = [evaluate(case, backend, given) for case, given in zip(cases, problems, strict=True)]
    wrong: list[Case] = []

    def repeat(i: int) -> None:
        for _ in range(20):
            found = evaluate(cases[i], backend, problems[i])
            if not all(torch.equal(x, y) for x, y in zip(found, expected[i], strict=True)):
                wrong.append(cases[i])

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@on_cpu
def test_memory(backend: str) -> None:
    case = Case(16, 3, 14, 14, 16, 16)
    given = problem(case, backend)
    pred = given.pred.requires_grad_()
    inputs = {x.data_ptr() for x in given}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss_of(case, backend, given).backward()
    kept = sum(x.numel() * x.element_size() for x in saved if x.data_ptr() not in inputs)
    assert kept <= 16 * given.mask.numel(), "more than a few numbers a patch are kept for backward"

    size = pred.numel() * pred.element_size()
    assert peak_memory(lambda: loss_of(case, backend, given)) < 0.2 * size, (
        "forward holds something of the target's size"
    )
    loss = loss_of(case, backend, given)
    assert peak_memory(lambda: torch.autograd.grad(loss, pred)) < 1.3 * size, "backward holds more than the gradient"


@every_backend
def test_module_is_the_function(backend: str) -> None:
    given = problem(WEIGHTS, backend)
    module = MaskedMSELoss(WEIGHTS.patch_size, norm_pix=False, reduction="sum", backend=backend)
    expected = masked_mse(*given, WEIGHTS.patch_size, norm_pix=False, reduction="sum", backend=backend)
    assert torch.equal(module(*given), expected)


PRED, IMAGES, MASK = torch.zeros(2, 4, 12), torch.zeros(2, 3, 4, 4), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pred": torch.zeros(2, 4, 11)}, r"pred must be \[2, 4, 12\].*got \[2, 4, 11\]"),
        ({"pred": torch.zeros(2, 3, 12)}, r"pred must be \[2, 4, 12\].*got \[2, 3, 12\]"),
        ({"pred": torch.zeros(2, 4, 12, dtype=torch.int32)}, "pred must be float32.*got torch.int32"),
        ({"pred": [1.0]}, "pred must be a tensor; got list"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "images must be float32.*got torch.uint8"),
        ({"images": torch.zeros(0, 3, 4, 4)}, r"images must be \[B, C, H, W\] without an empty dimension"),
        ({"images": torch.zeros(3, 4, 4)}, r"images must be \[B, C, H, W\]"),
        ({"images": torch.zeros(2, 3, 4, 4, requires_grad=True)}, "images must not require grad"),
        ({"images": torch.zeros(2, 3, 4, 4, device="meta")}, "images and pred must be on one device"),
        ({"mask": torch.ones(2, 5)}, r"mask must be a real tensor \[2, 4\]; got torch.float32 \[2, 5\]"),
        ({"mask": torch.ones(2, 4, dtype=torch.complex64)}, "mask must be a real tensor.*got torch.complex64"),
        ({"mask": None}, "mask must be a real tensor.*got NoneType"),
        ({"mask": torch.ones(2, 4, requires_grad=True)}, "mask must not require grad"),
        ({"patch_size": 3}, "patch_size must divide the image: height 4 and width 4 by 3 and 3"),
        ({"patch_size": 0}, "patch_size must divide the image"),
        ({"reduction": "median"}, "reduction must be one of mean, sum, none; got 'median'"),
        ({"backend": "tensorrt"}, "backend must be one of"),
        (
            {
                "pred": torch.zeros(2, 16, 1),
                "images": torch.zeros(2, 1, 4, 4),
                "mask": torch.ones(2, 16),
                "patch_size": 1,
            },
            "norm_pix needs at least two values in a patch; got 1",
        ),
    ],
)
def test_bad_input_is_named(changed: dict, message: str) -> None:
    given = {"pred": PRED, "images": IMAGES, "mask": MASK, "patch_size": 2, **changed}
    with pytest.raises(ValueError, match=message):
        masked_mse(**given)


def folded_by_loops(patches: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    images = torch.empty(len(patches), C, H, W, dtype=patches.dtype)
    for b, c, y, x in torch.cartesian_prod(*(torch.arange(size) for size in images.shape)).tolist():
        patch = patches[b, y // p * (W // q) + x // q]
        images[b, c, y, x] = patch[(y % p * q + x % q) * C + c]
    return images


@pytest.mark.parametrize(("C", "H", "W", "p", "q"), [(1, 6, 4, 3, 2), (3, 6, 12, 2, 4), (3, 4, 4, 4, 4)])
def test_denormalise_folds_patches_in_pixel_order(C: int, H: int, W: int, p: int, q: int) -> None:
    patches = torch.randn(2, (H // p) * (W // q), p * q * C)
    images = torch.rand(2, C, H, W)
    folded = denormalise_patches(patches, images, (p, q), norm_pix=False)
    assert torch.equal(folded, folded_by_loops(patches, C, H, W, p, q))


@pytest.mark.parametrize(("C", "H", "W", "p", "q"), [(1, 6, 4, 3, 2), (3, 6, 12, 2, 4), (3, 32, 48, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_denormalise_inverts_norm_pix(C: int, H: int, W: int, p: int, q: int, dtype: torch.dtype) -> None:
    images = torch.rand(2, C, H, W, dtype=torch.float64)
    patches = patchify(images, p, q)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    found = denormalise_patches(target.to(dtype), images.to(dtype), (p, q))
    assert found.dtype == dtype and found.shape == images.shape
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), images, rtol=8 * eps, atol=8 * eps)
    perfect = masked_mse(target, images, torch.ones(target.shape[:2]), (p, q), backend="reference")
    assert perfect.item() < 1e-20


def test_denormalise_names_bad_input() -> None:
    with pytest.raises(ValueError, match=r"pred must be \[2, 4, 12\].*got \[2, 4, 11\]"):
        denormalise_patches(torch.zeros(2, 4, 11), IMAGES, 2)
    with pytest.raises(ValueError, match="norm_pix needs at least two values"):
        denormalise_patches(torch.zeros(2, 16, 1), torch.zeros(2, 1, 4, 4), 1)
