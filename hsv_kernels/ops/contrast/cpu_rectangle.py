"""similarity_logsumexp of any queries and keys on CPU tensors: hands pointers to the compiled kernels.

Plain tensors in and out, no autograd. q, k and rows of positives may have any stride. Values per row are float64 for
float64 rows and float32 otherwise; gradients have the type of what they belong to. The workspace is O((n + m) · D):
keys are packed chunk by chunk into what each thread has of its own.
"""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.contrast.rectangle import Form, Saved
from hsv_kernels.ops.cpu_utils import threads
from hsv_kernels.ops.tensors import dtype_code

__all__ = ["key_gradient", "logsumexp_forward"]

Address = tuple[int, int, int]


def logsumexp_forward(
    q: Tensor, k: Tensor | None, scale: Tensor, form: Form, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor | None, Saved]:
    """lse [n] and None or, with positives, (d, positive_logit), and what backward needs of it.

    Args:
        k: None is q.
        need_q: keep what the gradients of q and of the scale need, so that they never read k.
        need_k: keep what the gradient of k needs.
    """
    k = q if k is None else k
    problem, alive = _problem(q, k, scale, form)
    lse, positive_logit = (scale.new_empty(q.shape[0]) for _ in range(2))
    if form.positive is None:
        positive_logit = None
    mean_key = scale.new_empty(q.shape) if need_q else None
    log2_sum = scale.new_empty(2, q.shape[0]) if need_k else None
    workspace = _workspace(problem, need_q, backward=False)
    compiled_module().rectangle_forward(
        problem, workspace.data_ptr(), _address(form.rows), *map(_pointer, (lse, positive_logit, mean_key, log2_sum))
    )
    del alive
    gathered = k.index_select(0, form.columns) if need_q and form.columns is not None else None
    return lse, positive_logit, Saved(mean_key, gathered, log2_sum)


def key_gradient(
    g: Tensor, h: Tensor | None, q: Tensor, k: Tensor, scale: Tensor, form: Form, saved: Saved, besides: Tensor | None
) -> Tensor:
    """dk [m, D] plus `besides`, of the dtype of k."""
    dk = torch.empty(k.shape, dtype=k.dtype)
    problem, alive = _problem(q, k, scale, form)
    workspace = _workspace(problem, need_q=False, backward=True)
    tensors = g.contiguous(), None if h is None else h.contiguous(), saved.log2_sum.contiguous(), besides, dk
    compiled_module().rectangle_backward(problem, workspace.data_ptr(), *map(_pointer, tensors))
    del alive
    return dk


def _problem(q: Tensor, k: Tensor, scale: Tensor, form: Form) -> tuple[Any, list[Tensor | None]]:
    """The compiled module's view of the arguments, and the tensors that must live as long as it does."""
    (n, dim), m = q.shape, k.shape[0]
    columns = None if form.columns is None else form.columns.contiguous()
    labels = (None, None) if form.q_labels is None else _codes(form.q_labels, form.k_labels)
    problem = compiled_module().RectangleProblem(
        dtype=dtype_code(q),
        q=_address(q),
        k=_address(k),
        n=n,
        m=m,
        dim=dim,
        scale=float(scale.detach()),
        exclude_self=form.exclude_self,
        self_offset=max(-n, min(form.self_offset, m)),
        positive=_pointer(columns),
        q_labels=_pointer(labels[0]),
        k_labels=_pointer(labels[1]),
        bfloat16=form.bfloat16,
        threads=threads(),
    )
    return problem, [columns, *labels]


def _codes(q_labels: Tensor, k_labels: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [n] and [m], equal where the labels are."""
    labels = torch.cat([q_labels.to(torch.int64), k_labels.to(torch.int64)])
    least, most = labels.aminmax()
    if least < -(2**31) or most >= 2**31:
        labels = labels.unique(return_inverse=True)[1]
    codes = labels.to(torch.int32)
    return codes[: len(q_labels)], codes[len(q_labels) :]


def _workspace(problem: Any, need_q: bool, *, backward: bool) -> Tensor:
    return torch.empty(compiled_module().rectangle_workspace(problem, need_q, backward), dtype=torch.uint8)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address(rows: Tensor | None) -> Address:
    return (0, 0, 0) if rows is None else (rows.data_ptr(), rows.stride(0), rows.stride(1))
