"""similarity_logsumexp of any queries and keys on CPU tensors: hands pointers to the compiled kernels.

Plain tensors in and out, no autograd. q, k and rows of positives may have any stride. Values per row are float64 for
float64 rows and float32 otherwise; gradients have the type of what they belong to. The workspace is O((n + m) · D):
keys are packed chunk by chunk into what each thread has of its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cpu_utils import code, threads

Address = tuple[int, int, int]


class Form(NamedTuple):
    """Which keys each query sums over, and how products are computed; the fields of similarity_logsumexp."""

    exclude_self: bool
    self_offset: int
    positive: Tensor | None
    q_labels: Tensor | None
    k_labels: Tensor | None
    bfloat16: bool


class Saved(NamedTuple):
    """What forward gives to backward, each None where no gradient needs it."""

    mean_key: Tensor | None  # [n, D] Σ_j p_ij k_j
    positive_rows: Tensor | None  # [n, D] the rows of k that positive names
    log2_sum: Tensor | None  # [2, n] log2 Σ_j exp S_ij in two parts


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
    columns = form.positive if form.positive is not None and form.positive.dim() == 1 else None
    rows = form.positive if columns is None else None
    if columns is not None:
        _check_columns(columns, k.shape[0])
    problem, alive = _problem(q, k, scale, form)
    lse, positive_logit = (scale.new_empty(q.shape[0]) for _ in range(2))
    if form.positive is None:
        positive_logit = None
    mean_key = scale.new_empty(q.shape) if need_q else None
    log2_sum = scale.new_empty(2, q.shape[0]) if need_k else None
    workspace = _workspace(problem, need_q, backward=False)
    compiled_module().rectangle_forward(
        problem, workspace.data_ptr(), _address(rows), *map(_pointer, (lse, positive_logit, mean_key, log2_sum))
    )
    del alive
    gathered = k.index_select(0, columns) if need_q and columns is not None else None
    return lse, positive_logit, Saved(mean_key, gathered, log2_sum)


def logsumexp_backward(
    grad: Tensor | None,
    positive_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    square: bool,
    scale: Tensor,
    form: Form,
    saved: Saved,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    need_positive: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dscale and dpositive of Σ grad_i · (lse or d)_i + positive_grad_i · positive_logit_i.

    None where not needed. With g and h the gradients of lse and of the positive logits:

        dq_i = scale · (g_i · mean_key_i + h_i · positive_i),   dpositive_i = scale · h_i · q_i
        dscale = Σ_i q_i · (g_i · mean_key_i + h_i · positive_i)
        dk_j = scale · (Σ_i g_i p_ij q_i + Σ_{positive_i = j} h_i q_i)

    k, labels and columns of positives are read for dk alone, and may be None where that is not needed. Where k is q
    itself, `square`, dq is the sum of both, rounded once, and there is no dk.
    """
    zero = scale.new_zeros(q.shape[0])
    g = zero if grad is None else grad.to(scale.dtype)
    columns = form.positive is not None and form.positive.dim() == 1
    rows = saved.positive_rows if columns or form.positive is None else form.positive
    h = None
    if rows is not None or columns:
        h = (zero if positive_grad is None else positive_grad.to(scale.dtype)) - g

    dq = dscale = dk = dpositive = None
    if need_q or need_scale:
        pull = saved.mean_key * g[:, None]
        if rows is not None:
            pull += rows * h[:, None]
        if need_scale:
            dscale = (q * pull).sum(dtype=torch.float64).to(scale.dtype)
        if need_q:
            dq = pull.mul_(scale)
    if need_positive:
        dpositive = (q * (scale * h)[:, None]).to(form.positive.dtype).contiguous()
    if square and need_q:
        dq = _key_gradient(g, h if columns else None, q, q, scale, form, saved, besides=dq)
    elif need_k:
        dk = _key_gradient(g, h if columns else None, q, k, scale, form, saved, besides=None)
    return None if dq is None else dq.to(q.dtype), dk, dscale, dpositive


def _key_gradient(
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


def _check_columns(positive: Tensor, m: int) -> None:
    least, most = positive.aminmax()
    if least < 0 or most >= m:
        raise IndexError(f"positive must be columns of k, in [0, {m}); got {int(least)} … {int(most)}")


def _problem(q: Tensor, k: Tensor, scale: Tensor, form: Form) -> tuple[Any, list[Tensor | None]]:
    """The compiled module's view of the arguments, and the tensors that must live as long as it does."""
    (n, dim), m = q.shape, k.shape[0]
    columns = form.positive.contiguous() if form.positive is not None and form.positive.dim() == 1 else None
    labels = (None, None) if form.q_labels is None else _codes(form.q_labels, form.k_labels)
    problem = compiled_module().RectangleProblem(
        dtype=code(q),
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
