"""Calls past the dispatcher: whatever looks for operators finds them, and the values stay the operators'."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hsv_kernels import (
    distillation_loss,
    gather_tokens,
    masked_mse,
    negative_cosine,
    nt_xent,
    random_masking,
    restore_tokens,
)
from hsv_kernels.backends import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="the calls here are of CPU kernels")

IDS = torch.tensor([[2, 0], [1, 2]])
RESTORE = torch.tensor([[1, 2, 0], [2, 0, 1]])
IMAGES = torch.linspace(0, 1, 2 * 2 * 2 * 6).reshape(2, 2, 2, 6).sin()
MASK = torch.tensor([[1.0, 0, 1], [0, 1, 1]])

#: Operation: a function of two tensors [2, 3, 8], and the operators of its forward and backward.
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "nt_xent": (lambda x, y: nt_xent(x.flatten(1), y.flatten(1), 0.3), ("nt_xent",), ("nt_xent_backward",)),
    "distillation_loss": (
        lambda x, y: distillation_loss([x[0], x[1:], y[1]], y.detach())[0],
        ("distillation_loss",),
        ("distillation_loss_backward",),
    ),
    "masked_mse": (lambda x, y: masked_mse(x, IMAGES, MASK, 2), ("masked_mse",), ("masked_mse_backward",)),
    "negative_cosine": (
        lambda x, y: negative_cosine(x.flatten(1), y.flatten(1)),
        ("negative_cosine",),
        ("negative_cosine_backward",),
    ),
    "gather_tokens": (lambda x, y: gather_tokens(x, IDS), ("gather_tokens",), ("scatter_tokens",)),
    "restore_tokens": (
        lambda x, y: restore_tokens(x[:, :2], RESTORE, y[0, 0]),
        ("restore_tokens",),
        ("visible_tokens", "masked_sum"),
    ),
}

every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(2, 3, 8, generator=generator).requires_grad_() for _ in range(2))
    return x, y


def gradients(function: Callable[[Tensor, Tensor], Tensor], args: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The value of `function` and its gradients; zeros where it does not depend on an argument."""
    value = function(*args)
    return value.detach(), *torch.autograd.grad(value.sum(), args, materialize_grads=True)


class DispatchRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_operation
def test_modes_see_the_operators(operation: str) -> None:
    function, forward, backward = OPERATIONS[operation]
    expected = gradients(function, arguments())
    for recorder, wanted in ((DispatchRecorder(), forward + backward), (FunctionRecorder(), forward)):
        args = arguments()
        with recorder:
            found = gradients(function, args)
        assert {f"hsv_kernels.{name}.default" for name in wanted} <= set(recorder.seen)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_operation
def test_tracing_finds_the_operators(operation: str) -> None:
    function, forward, backward = OPERATIONS[operation]
    args = arguments()
    graph = make_fx(lambda x, y: gradients(function, (x, y)))(*args)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {f"hsv_kernels.{name}.default" for name in forward + backward} <= targets
    for a, b in zip(graph(*args), gradients(function, args), strict=True):
        assert torch.equal(a, b)


@every_operation
def test_fake_tensors_outside_of_their_mode(operation: str) -> None:
    function, args = OPERATIONS[operation][0], arguments()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = tuple(mode.from_tensor(x) for x in args)
    for found, expected in zip(gradients(function, fake), gradients(function, args), strict=True):
        assert type(found) is type(fake[0]) and found.shape == expected.shape and found.dtype == expected.dtype


@every_operation
def test_negated_views_are_read_with_their_sign(operation: str) -> None:
    function, args = OPERATIONS[operation][0], arguments()
    negated = tuple(torch.complex(torch.zeros_like(x), -x.detach()).conj().imag.requires_grad_() for x in args)
    assert all(x.is_neg() for x in negated)
    for found, expected in zip(gradients(function, negated), gradients(function, args), strict=True):
        assert torch.equal(found, expected)


@every_operation
def test_wrappers_that_outlive_their_transform(operation: str) -> None:
    function, args = OPERATIONS[operation][0], arguments()
    left: list[Tensor] = []
    for x in args:
        torch.func.grad(lambda x: (left.append(x * 1), x.sum())[1])(x.detach())
    expected = function(*args)
    assert torch.equal(function(*left), expected)
    with torch.no_grad():
        assert torch.equal(function(*left), expected)


@every_operation
def test_profiles_and_graphs_name_the_operation(operation: str) -> None:
    function, (name, *_), _ = OPERATIONS[operation]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function(*arguments())
    events = {event.key: event.count for event in profiler.key_averages()}
    assert events[f"hsv_kernels::{name}"] == 1, "once, and not a second time by the dispatcher"


@every_operation
def test_no_graph_without_a_wanted_gradient(operation: str) -> None:
    function, args = OPERATIONS[operation][0], arguments()
    expected = function(*args)
    assert expected.grad_fn is not None
    with torch.no_grad():
        assert function(*args).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(function(*args), expected)
    found = function(*(x.detach() for x in args))
    assert not found.requires_grad and torch.equal(found, expected)


def test_masks_under_a_mode() -> None:
    with DispatchRecorder() as recorder:
        found = random_masking(2, 8, num_keep=3, seed=1)
    assert "hsv_kernels.random_masking.default" in recorder.seen
    for a, b in zip(found, random_masking(2, 8, num_keep=3, seed=1), strict=True):
        assert torch.equal(a, b)
