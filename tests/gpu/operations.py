"""Every public operation on the device, forward and backward, as a function of tensors alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hsv_kernels import (
    distillation_loss,
    gather_patches,
    gather_tokens,
    masked_mse,
    negative_cosine,
    nt_xent,
    random_masking,
    restore_tokens,
    similarity_logsumexp,
    sinkhorn_centre,
)
from hsv_kernels.backends import OPERATIONS, Backend, BackendError

B, L, K, D = 5, 36, 9, 40  # ragged against every tile
PATCH, SIDE = 4, 24


@dataclass(frozen=True)
class Operation:
    """inputs(device) are fresh random tensors; function(*inputs, backend=…) takes them in that order."""

    name: str
    family: str
    inputs: Callable[[torch.device], list[Tensor]]
    function: Callable[..., Tensor | tuple[Tensor, ...]]


def normal(device: torch.device, *shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)


def ids(device: torch.device, number: int) -> Tensor:
    """Distinct numbers below L in each of B rows."""
    return torch.rand(B, L, device=device).argsort(1)[:, :number].contiguous()


def counters(device: torch.device) -> list[Tensor]:
    return [torch.randint(2**55, (), device=device) for _ in range(2)]


def two_views(device: torch.device) -> list[Tensor]:
    return [normal(device, 151, D), normal(device, 151, D)]


def queries(device: torch.device) -> list[Tensor]:
    rows = [torch.nn.functional.normalize(normal(device, n, D, grad=False)) for n in (67, 67, 301)]
    return [rows[0].requires_grad_(), rows[1], rows[2]]


def labelled(device: torch.device) -> list[Tensor]:
    """Queries, keys, a scale, a column of each query's positive, and labels of both."""
    q, k = normal(device, 67, D), normal(device, 97, D)
    columns = torch.randint(97, (67,), device=device)
    return [q, k, temperature(device), columns, *(torch.randint(5, (n,), device=device) for n in (67, 97))]


def predictions(device: torch.device) -> list[Tensor]:
    images = normal(device, B, 3, SIDE, SIDE, grad=False, dtype=torch.float32)
    mask = (torch.rand(B, L, device=device).argsort(1) < L - K).float()
    return [normal(device, B, L, PATCH * PATCH * 3), images, mask]


def crops(device: torch.device) -> list[Tensor]:
    """Two views of a student that are stacked, one that is not, a teacher's two, a centre, and weights of rows."""
    views = [normal(device, 2, 33, 5003), normal(device, 33, 5003), normal(device, 2, 33, 5003, grad=False)]
    return [*views, normal(device, 5003, grad=False, dtype=torch.float32), torch.rand(33, device=device)]


def temperature(device: torch.device) -> Tensor:
    return torch.rand((), device=device).add(0.1).requires_grad_()


ALL = [
    Operation("nt_xent", "contrast", two_views, lambda a, b, **k: nt_xent(a, b, 0.2, **k)),
    Operation(
        "nt_xent, wide rows",
        "contrast",
        lambda d: [normal(d, 151, 520), normal(d, 151, 520)],
        lambda a, b, **k: nt_xent(a, b, 0.2, **k),
    ),
    Operation("nt_xent, learned temperature", "contrast", lambda d: [*two_views(d), temperature(d)], nt_xent),
    Operation(
        "similarity_logsumexp, square",
        "contrast",
        lambda d: two_views(d)[:1],
        lambda q, **k: similarity_logsumexp(q, scale=0.3, exclude_self=True, **k),
    ),
    Operation(
        "similarity_logsumexp, queue",
        "contrast",
        queries,
        lambda q, positive, queue, **k: similarity_logsumexp(q, queue, scale=10.0, positive=positive, **k),
    ),
    Operation(
        "similarity_logsumexp, keys",
        "contrast",
        labelled,
        lambda q, k, scale, positive, q_labels, k_labels, **b: similarity_logsumexp(
            q,
            k,
            scale=scale,
            exclude_self=True,
            self_offset=3,
            positive=positive,
            q_labels=q_labels,
            k_labels=k_labels,
            **b,
        ),
    ),
    Operation(
        "random_masking",
        "masking",
        counters,
        lambda seed, offset, **k: random_masking(B, L, num_keep=K, seed=seed, offset=offset, device=seed.device, **k),
    ),
    Operation(
        "gather_patches",
        "masking",
        lambda d: [normal(d, B, 3, SIDE, SIDE), ids(d, K)],
        lambda images, keep, **k: gather_patches(images, keep, PATCH, **k),
    ),
    Operation("gather_tokens", "masking", lambda d: [normal(d, B, L, D), ids(d, K)], gather_tokens),
    Operation("restore_tokens", "masking", lambda d: [normal(d, B, K, D), ids(d, L), normal(d, D)], restore_tokens),
    Operation(
        "masked_mse",
        "reconstruction",
        predictions,
        lambda pred, images, mask, **k: masked_mse(pred, images, mask, PATCH, **k),
    ),
    Operation(
        "distillation_loss",
        "distillation",
        crops,
        lambda one, other, teacher, centre, weights, **k: distillation_loss(
            [one, other], teacher, centre=centre, weights=weights, **k
        ),
    ),
    Operation(
        "sinkhorn_centre",
        "distillation",
        lambda d: [normal(d, 2, 33, 5003, grad=False)],
        lambda teacher, **k: sinkhorn_centre(teacher, 0.05, **k),
    ),
    Operation(
        "negative_cosine",
        "cosine",
        lambda d: [normal(d, 151, 1030), normal(d, 151, 1030)],
        lambda p, z, **k: negative_cosine(p, z, reduction="none", **k),
    ),
]


def on_the_device() -> Iterator[pytest.param]:
    """(operation, backend) of all that runs on CUDA tensors."""
    for operation in ALL:
        for backend in OPERATIONS[operation.family]:
            if backend != "cpu":
                yield pytest.param(operation, backend, id=f"{operation.name}, {backend}")


def run(operation: Operation, inputs: list[Tensor], backend: Backend) -> list[Tensor]:
    """The results and, for inputs that require one, the gradients of a fixed combination of them.

    Skips the test where the backend does not serve the operation, with its reason.
    """
    try:
        found = operation.function(*inputs, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    results = list(found) if isinstance(found, tuple) else [found]
    leaves = [x for x in inputs if x.requires_grad]
    if leaves:
        roots = [x for x in results if x.requires_grad]
        upstream = [torch.linspace(-1, 2, x.numel(), device=x.device, dtype=x.dtype).view_as(x) for x in roots]
        results += torch.autograd.grad(roots, leaves, upstream)
    return [x.detach() for x in results]
