"""How custom operators get their gradient: one formula for torch.library, autograd and torch.func alike."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


def differentiable(
    op: Callable[..., Outputs], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Outputs]:
    """Gives the custom operator `op` its gradient and returns the function that callers use.

    The formula is registered with the operator, which is what torch.compile traces, and serves an autograd.Function for
    eager calls: torch.func.grad wants its static setup_context, and vmap raises there.

    Args:
        op: the operator; takes positional arguments.
        setup_context: (ctx, inputs, output), saves what backward needs.
        backward: (ctx, *gradients) → a gradient or None for each input; calls a `backward_operator`.
    """
    op.register_autograd(backward, setup_context=setup_context)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Outputs:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return backward(ctx, *gradients)

    def call(*args: Any) -> Outputs:
        return op(*args) if torch.compiler.is_compiling() else Differentiable.apply(*args)

    return call


def backward_operator(op: Callable[..., Outputs], name: str) -> Callable[..., Outputs]:
    """Wraps the operator that computes a gradient: differentiating through it raises instead of giving a constant."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Outputs:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            raise RuntimeError(f"{name} has no double backward: its gradient cannot be differentiated again")

    return Backward.apply


def reference_operator(function: Callable[..., Outputs], name: str) -> Callable[..., Outputs]:
    """Holds a reference in plain PyTorch to what the compiled operators promise, and returns what callers use.

    Autocast is ignored, only the tensors among its arguments are saved (backward runs `function` again), and a second
    differentiation raises, as vmap does.
    """

    def evaluate(*args: Any) -> Outputs:
        with _without_autocast(args):
            return function(*args)

    def gradient(wanted: list[int], num_outputs: int, *values: Any) -> tuple[Tensor, ...]:
        gradients, args = values[:num_outputs], list(values[num_outputs:])

        def of_wanted(*tensors: Tensor) -> Outputs:
            for i, tensor in zip(wanted, tensors, strict=True):
                args[i] = tensor
            return evaluate(*args)

        outputs, pullback = torch.func.vjp(of_wanted, *(args[i] for i in wanted))
        with _without_autocast(args):
            return pullback(gradients if isinstance(outputs, tuple) else gradients[0])

    gradient_operator = backward_operator(gradient, name)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Outputs:
            return evaluate(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
            ctx.save_for_backward(*(inputs[i] for i in ctx.places))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            args = list(ctx.others)
            for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                args[i] = tensor
            wanted = [i for i in ctx.places if ctx.needs_input_grad[i]]
            found = gradient_operator(wanted, len(gradients), *gradients, *args)
            by_place = dict(zip(wanted, found, strict=True))
            return tuple(by_place.get(i) for i in range(len(args)))

    def call(*args: Any) -> Outputs:
        return evaluate(*args) if torch.compiler.is_compiling() else Reference.apply(*args)

    return call


def _without_autocast(args: Iterable[Any]) -> AbstractContextManager:
    """Autocast off on the device of the tensors in `args`."""
    device = next(value.device.type for value in args if isinstance(value, Tensor))
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
