"""How custom operators get their gradient: one formula for torch.library, autograd and torch.func alike."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["backward_operator", "differentiable", "direct", "reference_operator"]

Outputs = Tensor | tuple[Tensor, ...] | list[Tensor]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def direct(op: CustomOpDef) -> Callable[..., Outputs]:
    """Returns what callers of the operator `op` use: its function itself where nothing could tell the difference.

    The way through the dispatcher and its layers of Python costs more than a small loss. Whatever looks for operators
    (torch.compile, modes, tensor subclasses, torch.func) finds the operator.
    """
    function = op._init_fn

    def call(*args: Any) -> Outputs:
        return function(*args) if _unobserved(args) else op(*args)

    return call


def differentiable(
    op: CustomOpDef, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Outputs]:
    """Gives the custom operator `op` its gradient and returns the function that callers use.

    The formula is registered with the operator, which is what torch.compile traces, and serves two autograd.Functions
    for eager calls. torch.func.grad wants a static setup_context, and vmap raises there. Plain tensors take the older
    form, whose apply does not bind a signature at each call, or no Function where no gradient is wanted.

    Args:
        op: the operator; takes positional arguments.
        setup_context: (ctx, inputs, output), saves what backward needs.
        backward: (ctx, *gradients) → a gradient or None for each input, a list of these for a list of tensors; calls a
            `backward_operator`.
    """
    op.register_autograd(backward, setup_context=setup_context)
    function = op._init_fn

    def plain_forward(ctx: Any, *args: Any) -> Outputs:
        output = function(*args)
        setup_context(ctx, args, output)
        return output

    def forward(*args: Any) -> Outputs:
        return op(*args)

    Plain = _function(op, forward=plain_forward, backward=backward)
    Transformable = _function(op, forward=forward, setup_context=setup_context, backward=backward)

    def call(*args: Any) -> Outputs:
        if torch.compiler.is_compiling():
            return op(*args)
        if not _unobserved(args):
            return Transformable(*args)
        return Plain(*args) if _wants_gradient(args) else function(*args)

    return call


def backward_operator(op: Callable[..., Outputs], name: str) -> Callable[..., Outputs]:
    """Wraps the operator that computes a gradient: differentiating through it raises instead of giving a constant.

    Only where autograd records, which in backward is under create_graph=True: elsewhere nothing can differentiate.
    """
    run = direct(op) if isinstance(op, CustomOpDef) else op

    def forward(*args: Any) -> Outputs:
        found = op(*args)
        return tuple(found) if isinstance(found, list) else found

    def setup_context(ctx: Any, inputs: tuple, output: Outputs) -> None:
        pass

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(f"{name} has no double backward: its gradient cannot be differentiated again")

    Backward = _function(op, forward=forward, setup_context=setup_context, backward=backward)

    def call(*args: Any) -> Outputs:
        recorded = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        return Backward(*args) if recorded else run(*args)

    return call


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


def _function(op: Callable[..., Outputs], **methods: Callable) -> Callable[..., Outputs]:
    """Applies an autograd.Function that profiles and `grad_fn` show under the name of `op`."""
    name, lists = "Function", ()
    if isinstance(op, CustomOpDef):
        arguments = op._opoverload._schema.arguments
        name, lists = op._qualname, tuple(i for i, x in enumerate(arguments) if str(x.type) == "List[Tensor]")
    if lists:
        methods = _over_lists(lists, **methods)
    apply = type(name, (torch.autograd.Function,), {name: staticmethod(f) for name, f in methods.items()}).apply
    return (lambda *args: apply(*_spread(lists, args))) if lists else apply


def _over_lists(
    lists: tuple[int, ...], forward: Callable, backward: Callable, setup_context: Callable | None = None
) -> dict[str, Callable]:
    """The methods of an autograd.Function, which sees none within lists, for arguments that `_spread` laid out."""

    def spread_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_spread(lists, backward(ctx, *gradients))[1:]

    if setup_context is None:
        return {"forward": lambda ctx, *args: forward(ctx, *_gather(lists, args)), "backward": spread_backward}
    return {
        "forward": lambda *args: forward(*_gather(lists, args)),
        "setup_context": lambda ctx, args, output: setup_context(ctx, _gather(lists, args), output),
        "backward": spread_backward,
    }


def _spread(lists: tuple[int, ...], args: Iterable[Any]) -> tuple[Any, ...]:
    """The lengths of the lists at places `lists`, and `args` with the elements of these lists in their stead."""
    args = tuple(args)
    lengths = tuple(len(args[i]) for i in lists)
    return lengths, *(x for i, value in enumerate(args) for x in (value if i in lists else (value,)))


def _gather(lists: tuple[int, ...], args: Iterable[Any]) -> tuple[Any, ...]:
    """What `_spread` was given."""
    lengths, *values = args
    rest, gathered = iter(values), []
    sizes = dict(zip(lists, lengths, strict=True))
    for i in range(len(values) - sum(lengths) + len(lists)):
        gathered.append(list(islice(rest, sizes[i])) if i in sizes else next(rest))
    return tuple(gathered)


def _wants_gradient(args: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(map(_requires_gradient, args))


def _requires_gradient(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_requires_gradient, value))
    return isinstance(value, Tensor) and value.requires_grad


def _unobserved(args: Iterable[Any]) -> bool:
    """True if an operator's function does with `args` all that a call through the dispatcher would do.

    That is: no tracing, no torch.func transform, no torch function or dispatch mode, and plain tensors alone.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
    )
    return not watched and all(map(_is_plain, args))


def _is_plain(value: Any) -> bool:
    """False for a tensor whose memory does not hold its values: subclasses, wrappers, negated views, zero tensors."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not isinstance(value, Tensor) or (
        type(value) in _PLAIN_TYPES
        and not value.is_neg()
        and not value._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )
