"""Self-distillation over prototypes, and Sinkhorn–Knopp as its centre."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from hsv_kernels.backends import Backend, resolve
from hsv_kernels.checks import REDUCTIONS, check_choice, check_floating, check_integer, check_same, check_scalar
from hsv_kernels.ops.distillation import function as distillation

__all__ = ["distillation_loss", "sinkhorn_centre"]


def distillation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    centre: Tensor | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-distillation's cross-entropy (DINO; Caron et al., 2021; iBOT; Zhou et al., 2022) and the teacher's mean.

        q_t  = softmax((teacher_t − centre) / teacher_temperature)
        l_n  = mean over pairs (t, s) of −Σ_k q_tnk log softmax(student_s / student_temperature)_nk
        loss = Σ_n w_n l_n / Σ_n w_n

    Args:
        student: logits [S, N, K] of S views, or a sequence of tensors [N, K] or [S_i, N, K], whose views are numbered
            in order. Each tensor gets a gradient of its own; none is copied into a stack.
        teacher: logits in the same forms, T views of the same N, K and dtype; they must not require grad.
        student_temperature: positive number, or a 0-dim tensor, whose value the host never reads on a GPU (one that is
            not positive and finite gives NaN). Temperatures get no gradient.
        teacher_temperature: likewise.
        centre: [K] subtracted from the teacher's logits, None for none; `sinkhorn_centre` gives that of SwAV.
        pairs: (teacher view, student view), any number of them. None is every pair t ≠ s, as in DINO, where the first T
            student views are those of the teacher; (0, 0) where both have one view, as in iBOT.
        weights: [N] of the rows, any real dtype; None is 1 for each.
        reduction: "mean" as above (0 where the weights add up to 0), "sum" of w_n l_n, which is iBOT's loss where
            w_n = 1 / (masked patches of the image) / images, or "none" for [N] values w_n l_n.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        The loss, and the mean [K] of the teacher's logits over T and N, before centre and temperature, which is what
        DINO's centre is a moving average of; it has no gradient. float64 for float64 logits, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, a pair of views that are not there, a
            temperature out of range, a teacher, centre, temperature or weights that require grad.
        BackendError: a named backend that cannot serve the call.
    """
    students, teachers = _logits("student", student), _logits("teacher", teacher)
    like = students[0]
    if teachers[0].shape[-2:] != like.shape[-2:]:
        raise ValueError(
            f"teacher must have rows and columns [N, K] of student, {list(like.shape[-2:])}; "
            f"got {list(teachers[0].shape[-2:])}"
        )
    check_same("teacher", teachers[0], "student", like)
    N, K = like.shape[-2:]
    _check_vector("centre", centre, K, like)
    _check_vector("weights", weights, N, like)
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        check_scalar(name, value, like, positive=True)
    constants = {"teacher_temperature": teacher_temperature, "student_temperature": student_temperature}
    _check_constants(teacher=teachers, centre=centre, weights=weights, **constants)
    chosen = _pairs(pairs, distillation.count_views(teachers), distillation.count_views(students))
    check_choice("reduction", reduction, REDUCTIONS)
    temperatures = student_temperature, teacher_temperature
    name = resolve("distillation", like, backend)
    return distillation.distillation_loss(
        students, teachers, *temperatures, centre, chosen, weights, reduction, backend=name
    )


def sinkhorn_centre(
    teacher: Tensor | Sequence[Tensor],
    temperature: float | Tensor,
    *,
    iterations: int = 3,
    reduce: Callable[[Tensor], Tensor] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sinkhorn–Knopp (SwAV; Caron et al., 2020) as a centre for `distillation_loss`.

    Its assignments are exp(t_ik / temperature − u_i − v_k), and its last step normalises each sample: they are the
    softmax of (t_i − c) / temperature with c = temperature · v. From u = 0, `iterations` times, the second step of the
    last time being left to that softmax:

        v_k = log Σ_i exp(t_ik / temperature − u_i)        prototypes
        u_i = log Σ_k exp(t_ik / temperature − v_k)        samples

    Args:
        teacher: logits [N, K] or [T, N, K], or a sequence of these, whose T · N rows are the samples, none of them
            only with `reduce`; they must not require grad.
        temperature: positive number, or a 0-dim tensor, whose value the host never reads on a GPU (one that is not
            positive and finite gives NaN); the teacher_temperature of the loss, SwAV's epsilon.
        iterations: how often prototypes and samples are normalised, 1 or more; SwAV's 3.
        reduce: maps v [K], logs of sums over this process's samples (−inf where it has none), to the logs of the sums
            over those of all.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        centre [K], float64 for float64 logits, float32 otherwise; without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no samples, fewer than one iteration, a temperature out
            of range, a teacher or a temperature that requires grad.
        BackendError: a named backend that cannot serve the call.
    """
    teachers = _logits("teacher", teacher, least=0 if reduce else 1)
    check_scalar("temperature", temperature, teachers[0], positive=True)
    _check_constants(teacher=teachers, temperature=temperature)
    check_integer("iterations", iterations)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    name = resolve("distillation", teachers[0], backend)
    return distillation.sinkhorn_centre(teachers, temperature, iterations, reduce, backend=name)


def _logits(name: str, logits: Tensor | Sequence[Tensor], *, least: int = 1) -> list[Tensor]:
    """`logits` as a list of tensors [N, K] and [views, N, K] of one N, K, dtype and device; N is `least` or more."""
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    if not tensors:
        raise ValueError(f"{name} must be a tensor or a sequence of tensors; got none")
    for tensor in tensors:
        check_floating(name, tensor)
        empty = tensor.dim() > 1 and (tensor.shape[-2] < least or 0 in (*tensor.shape[:-2], tensor.shape[-1]))
        if tensor.dim() not in (2, 3) or empty or tensor.shape[-2:] != tensors[0].shape[-2:]:
            raise ValueError(
                f"{name} must be [N, K] or [views, N, K], of one N and K and without an empty dimension; "
                f"got {', '.join(str(list(x.shape)) for x in tensors)}"
            )
        check_same(f"each of {name}", tensor, "the first", tensors[0])
    return tensors


def _check_vector(name: str, vector: Tensor | None, size: int, like: Tensor) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor) or vector.is_complex() or vector.shape != (size,):
        given = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{name} must be None or a real tensor [{size}]; got {given}")
    check_same(name, vector, "the logits", like, dtype=False)


def _check_constants(**values: object) -> None:
    """Of these arguments, tensors and lists of them, none may require a gradient."""
    for name, value in values.items():
        for x in value if isinstance(value, list) else (value,):
            if isinstance(x, Tensor) and x.requires_grad:
                raise ValueError(f"{name} must not require grad: it gets no gradient; pass {name}.detach()")


def _pairs(pairs: Iterable[tuple[int, int]] | None, T: int, S: int) -> list[tuple[int, int]]:
    """Pairs (teacher view, student view) of T and S views, checked."""
    if pairs is None:
        return [(t, s) for t in range(T) for s in range(S) if t != s] or [(0, 0)]
    chosen = [tuple(pair) for pair in pairs]
    for pair in chosen:
        if len(pair) != 2 or not (0 <= pair[0] < T and 0 <= pair[1] < S):
            raise ValueError(f"pairs must be (teacher, student) below ({T}, {S}); got {pair}")
    if not chosen:
        raise ValueError("pairs must name at least one (teacher, student); got none")
    return chosen
