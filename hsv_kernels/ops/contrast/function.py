"""The contrast operations, each served by a custom operator or by the reference."""

from torch import Tensor

from hsv_kernels.ops.contrast import reference
from hsv_kernels.ops.contrast.nt_xent import nt_xent
from hsv_kernels.ops.contrast.rectangle import Form
from hsv_kernels.ops.contrast.rectangle_logsumexp import rectangle_logsumexp
from hsv_kernels.ops.contrast.square_logsumexp import square_logsumexp
from hsv_kernels.ops.operators import reference_operator
from hsv_kernels.ops.tensors import scalar_like

__all__ = ["Form", "nt_xent", "similarity_logsumexp"]

_reference_logsumexp = reference_operator(reference.similarity_logsumexp, "similarity_logsumexp")


def similarity_logsumexp(
    q: Tensor, k: Tensor | None, scale: float | Tensor, form: Form, *, backend: str
) -> Tensor | tuple[Tensor, Tensor]:
    """lse [n], or (d, positive_logit) with positives."""
    if backend == "reference":
        if k is not None and not k.requires_grad:
            k = k.clone()  # a queue may be overwritten before backward, which runs the definition again
        return _reference_logsumexp(q, k, scale, *form)
    if _is_square(k, form):
        return square_logsumexp(q, scalar_like(scale, q), form.exclude_self, form.bfloat16, backend=backend)
    return rectangle_logsumexp(q, k, scalar_like(scale, q), form, backend=backend)


def _is_square(k: Tensor | None, form: Form) -> bool:
    """Whether q is held against itself and nothing but the diagonal is left out: a problem with a symmetry to it."""
    return k is None and form.self_offset == 0 and form.positive is None and form.q_labels is None
