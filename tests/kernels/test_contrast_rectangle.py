"""similarity_logsumexp of queries against keys: every form against float64, frozen keys, memory, threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsv_kernels import similarity_logsumexp
from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.contrast.reference import accumulation_dtype
from tests.kernels.cases import assert_accurate, poisoned_allocations, usable_backends

if isinstance(compiled_module(), str):
    pytest.skip(compiled_module(), allow_module_level=True)


BACKENDS = [name for name in usable_backends("contrast") if name != "triton"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: n, m, D: one of each, less than a panel, odd, several tiles of queries, of keys, of both; more keys than queries.
SHAPES = [(1, 1, 1), (3, 5, 2), (40, 1, 33), (1, 300, 16), (9, 1000, 31), (230, 45, 7), (200, 410, 65)]

#: What the call leaves out or holds against: options of similarity_logsumexp from (n, m, generator).
FORMS: dict[str, Callable[[int, int, int, torch.Generator], dict[str, Any]]] = {
    "keys": lambda n, m, dim, g: {},
    "self": lambda n, m, dim, g: {"exclude_self": True, "self_offset": m // 3},
    "self before": lambda n, m, dim, g: {"exclude_self": True, "self_offset": -(n // 2)},
    "columns": lambda n, m, dim, g: {"positive": torch.randint(m, (n,), generator=g)},
    "one column": lambda n, m, dim, g: {"positive": torch.full((n,), m - 1), "exclude_self": True},
    "rows": lambda n, m, dim, g: {"positive": torch.randn(n, dim, generator=g)},
    "labels": lambda n, m, dim, g: {
        "q_labels": torch.randint(5, (n,), generator=g),
        "k_labels": torch.randint(1, 6, (m,), generator=g),
    },
    "all": lambda n, m, dim, g: {
        "exclude_self": True,
        "self_offset": 1,
        "positive": torch.randint(m, (n,), generator=g),
        "q_labels": torch.randint(-3, 3, (n,), generator=g) << 40,
        "k_labels": torch.randint(-3, 3, (m,), generator=g) << 40,
    },
}


def case(form: str, n: int, m: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """q [n, D], k [m, D] and the options of the form, with rows of the given dtype."""
    generator = torch.Generator().manual_seed(1000 * n + m + dim)
    q, k = torch.randn(n, dim, generator=generator), torch.randn(m, dim, generator=generator)
    options = FORMS[form](n, m, dim, generator)
    return q.to(dtype), k.to(dtype), {a: _to(x, dtype) for a, x in options.items()}


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def incoming(x: Tensor, number: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(number)).to(x.dtype)


def run(
    q: Tensor, k: Tensor | None, scale: float, options: dict[str, Any], backend: str, dtype: torch.dtype, **more: Any
) -> list[Tensor]:
    """Outputs, and gradients of q, the scale, and where there are such of k and the rows of positives."""
    leaf = lambda x: _to(x, dtype).detach().requires_grad_()  # noqa: E731
    learned = torch.tensor(scale, dtype=accumulation_dtype(dtype), requires_grad=True)
    q, options = leaf(q), dict(options)
    leaves = [q, learned]
    if k is not None:
        k = leaf(k)
        leaves.append(k)
    if isinstance(options.get("positive"), Tensor) and options["positive"].is_floating_point():
        options["positive"] = leaf(options["positive"])
        leaves.append(options["positive"])
    found = similarity_logsumexp(q, k, scale=learned, backend=backend, **options, **more)
    outputs = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(outputs, leaves, [incoming(x, i) for i, x in enumerate(outputs)])
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    return [*(x.detach() for x in outputs), *gradients]


def check(
    q: Tensor, k: Tensor | None, scale: float, options: dict[str, Any], dtype: torch.dtype, backend: str, **more: Any
) -> None:
    """The error rule for every result; precision is that of the products, which is also that of weights in them."""
    truth = run(q, k, scale, options, "reference", torch.float64)
    plain = run(q, k, scale, options, "reference", torch.float32)
    with poisoned_allocations():
        found = run(q, k, scale, options, backend, dtype, **more)
    products = more.get("dot_dtype") or (dtype if dtype == torch.bfloat16 else accumulation_dtype(dtype))
    norms = [x.double().norm(dim=1).max().item() for x in (q, q if k is None else k)]
    exponent = max(
        1.0, abs(scale) * norms[0] * norms[1]
    )  # a sum near 1 has a logarithm near 0, and errors of exponents
    for i, (x, p, t) in enumerate(zip(found, plain, truth, strict=True)):
        size = t.where(t.isfinite(), 0).abs().max().item() if i == 0 else None
        precision = x.dtype if torch.finfo(x.dtype).eps > torch.finfo(products).eps else products
        assert_accurate(x, p, t, precision, q.shape[1], None if size is None else max(size, exponent))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "m", "dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_and_shape(backend: str, n: int, m: int, dim: int, form: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for dtype in DTYPES:
        q, k, options = case(form, n, m, dim, dtype)
        check(q, k, 0.3, options, dtype, backend)
