"""What the parity tests share: one call of the original and of ours, values and gradients side by side."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


def leaves(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normal tensors of these shapes that require grad."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def assert_same(
    original: Loss,
    ours: Loss,
    *arguments: object,
    inputs: Sequence[Tensor] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **options: object,
) -> None:
    """Equal values, and equal gradients of three times the value for each of `inputs` (none is equal to zero).

    `inputs` are the arguments that require grad, unless named.
    """
    expected, given = (loss(*arguments, **options) for loss in (original, ours))
    torch.testing.assert_close(given, expected.to(given.dtype), rtol=rtol, atol=atol)
    if inputs is None:
        inputs = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    assert inputs
    for a, b in zip(_gradients(expected, inputs), _gradients(given, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=atol * 10)


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(3 * loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def error_of(call: Callable[[], object]) -> type[Exception]:
    """The type of what `call` raises; an AssertionError of ours where it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error)
    raise AssertionError("nothing was raised")
