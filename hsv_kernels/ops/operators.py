"""How custom operators get their gradient: one formula for torch.library, autograd and torch.func alike."""

from collections.abc import Callable
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
