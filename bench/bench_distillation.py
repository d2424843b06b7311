"""Self-distillation's cross-entropy over views, and Sinkhorn–Knopp, against the same formulas in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cases import DEVICE, QUICK, Case, Provider, Work
from bench.providers import Loss, compiled
from hsv_kernels import distillation_loss, sinkhorn_centre

STUDENT, TEACHER, EPSILON = 0.1, 0.04, 0.05  # temperatures
GLOBAL, CROPS = 2, 10
BATCH, CLASSES = (2, 300) if QUICK else (32, 65536)  # of DINO
PATCHES, PATCH_CLASSES = (8, 100) if QUICK else (2048, 8192)  # of iBOT: masked patches of a batch
SAMPLES, PROTOTYPES = (8, 30) if QUICK else (512, 3000)  # of SwAV


def hsv(centre: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    return distillation_loss(student, teacher, centre=centre)[0]


def eager(centre: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """The loss of each pair of views, from one softmax of each view in float32."""
    targets = ((teacher - centre) / TEACHER).softmax(-1)
    logs = (student.float() / STUDENT).log_softmax(-1)
    losses = [-(q * p).sum(-1).mean() for t, q in enumerate(targets) for s, p in enumerate(logs) if s != t]
    return sum(losses) / len(losses)


def published(centre: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """As DINO is published: a log-softmax for each pair."""
    targets = ((teacher - centre) / TEACHER).softmax(-1)
    views = student / STUDENT
    losses = [
        -(q * x.log_softmax(-1)).sum(-1).mean() for t, q in enumerate(targets) for s, x in enumerate(views) if s != t
    ]
    return sum(losses) / len(losses)


def rewritten(centre: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """lse − ⟨q, s⟩ for each student, the targets of the two teachers summed first."""
    q0, q1 = ((teacher - centre) / TEACHER).softmax(-1)
    targets = [(1, q1), (1, q0)] + [(2, q0 + q1)] * (CROPS - GLOBAL)
    loss = 0
    for (count, q), x in zip(targets, student / STUDENT, strict=True):
        loss = loss + (count * x.logsumexp(-1) - (q * x).sum(-1)).mean()
    return loss / (GLOBAL * (CROPS - 1))


def lightly(classes: int) -> Loss:
    from lightly.loss import DINOLoss

    module = DINOLoss(classes)

    def run(centre: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
        module.center = centre[None, None]  # the module moves it on after the loss
        return module(list(teacher), list(student))

    return run


def inputs(n: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A centre, the teacher's views and the student's, stacked as a head returns them; the latter require grad."""
    torch.manual_seed(0)
    centre = 0.1 * torch.randn(classes, device=DEVICE)
    teacher, student = (torch.randn(views, n, classes, dtype=dtype, device=DEVICE) for views in (GLOBAL, CROPS))
    return centre, teacher, student.requires_grad_()


def work_of(teacher: int, student: int, size: int) -> dict[str, Work]:
    """All logits, of `size` bytes, are read in either direction, with an exponential for each; the student's gradient
    is written.
    """
    logits = teacher + student
    forward, backward = size * logits, size * (logits + student)
    return {
        "forward": Work(bytes=forward, exponentials=logits),
        "backward": Work(bytes=backward, exponentials=logits),
        "both": Work(bytes=forward + backward, exponentials=2 * logits),
    }


def views_work(n: int, classes: int, size: int) -> dict[str, Work]:
    return work_of(GLOBAL * n * classes, CROPS * n * classes, size)


def views_case(n: int, classes: int) -> Case:
    return Case(
        operation="distillation_loss",
        shape={"N": n, "crops": CROPS, "K": classes},
        products="float32",
        inputs=partial(inputs, n, classes),
        providers={
            "hsv": Provider(lambda: hsv),
            "eager": Provider(lambda: eager),
            "torch.compile": Provider(compiled(eager)),
            "rewritten, compiled": Provider(compiled(rewritten)),
            "DINO": Provider(lambda: published, note="a log-softmax for each pair"),
            "lightly": Provider(partial(lightly, classes), note="moves the centre too"),
        },
        work=views_work(n, classes, 4),
        seconds=20,
    )


def hsv_patches(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    return distillation_loss(student, teacher, weights=weights, reduction="sum")[0]


def eager_patches(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """As in iBOT, its weights being 1 / (masked patches of the image) / images."""
    losses = -((teacher / TEACHER).softmax(-1) * (student / STUDENT).log_softmax(-1)).sum(-1)
    return (losses * weights).sum()


def patch_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    student, teacher = (torch.randn(PATCHES, PATCH_CLASSES, dtype=dtype, device=DEVICE) for _ in range(2))
    return student.requires_grad_(), teacher, torch.rand(PATCHES, device=DEVICE) / PATCHES


def patches_case() -> Case:
    return Case(
        operation="distillation_loss of patches",
        shape={"N": PATCHES, "K": PATCH_CLASSES},
        products="float32",
        inputs=patch_inputs,
        providers={
            "hsv": Provider(lambda: hsv_patches),
            "eager": Provider(lambda: eager_patches),
            "torch.compile": Provider(compiled(eager_patches)),
        },
        work=work_of(PATCHES * PATCH_CLASSES, PATCHES * PATCH_CLASSES, 4),
        seconds=6,
    )


def hsv_sinkhorn(logits: Tensor) -> Tensor:
    return sinkhorn_centre(logits, EPSILON)


def eager_sinkhorn(logits: Tensor) -> Tensor:
    """The same centre in float32, from the log-sums of columns and rows in turn; the rows of all views are samples."""
    x = logits.flatten(0, -2).float() / EPSILON
    v = x.logsumexp(0)
    for _ in range(2):
        v = (x - (x - v).logsumexp(1, keepdim=True)).logsumexp(0)
    return EPSILON * v


def published_sinkhorn(logits: Tensor) -> Tensor:
    """SwAV's assignments, from exponentials of the logits as they are."""
    q = (logits / EPSILON).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def sinkhorn_inputs(*shape: int, dtype: torch.dtype) -> tuple[Tensor]:
    torch.manual_seed(0)
    return (torch.rand(shape, dtype=dtype, device=DEVICE) - 0.5,)


def sinkhorn_case(n: int, classes: int) -> Case:
    values = n * classes
    return Case(
        operation="sinkhorn_centre",
        shape={"N": n, "K": classes},
        products="float32",
        inputs=lambda dtype: sinkhorn_inputs(n, classes, dtype=dtype),
        kinds=("forward",),
        providers={
            "hsv": Provider(lambda: hsv_sinkhorn),
            "eager": Provider(lambda: eager_sinkhorn),
            "torch.compile": Provider(compiled(eager_sinkhorn)),
            "SwAV": Provider(lambda: published_sinkhorn, note="gives the assignments", compared=False),
        },
        work={"forward": Work(bytes=12 * values, exponentials=3 * values)},
    )


CASES = [views_case(BATCH, CLASSES), patches_case(), sinkhorn_case(SAMPLES, PROTOTYPES)]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)
