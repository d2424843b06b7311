"""similarity_logsumexp of queries against keys: every form against float64, frozen keys, memory, threads."""

import mmap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsv_kernels import similarity_logsumexp
from hsv_kernels.backends import compiled_module, kernels_of
from hsv_kernels.ops.tensors import computed_type
from tests.kernels.cases import (
    LAYOUTS,
    TILED,
    assert_accurate,
    device_of,
    error,
    peak_memory,
    poisoned_allocations,
    serves,
    take_tiles_of,
    usable_backends,
)

if isinstance(compiled_module(), str):
    pytest.skip(compiled_module(), allow_module_level=True)

from hsv_kernels.ops.contrast import cpu_rectangle
from hsv_kernels.ops.contrast.rectangle import Form

pytestmark = pytest.mark.compiled

BACKENDS = usable_backends("contrast", reference=False)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
#: Each backend, the CPU's with several numbers of threads.
BACKENDS_AND_THREADS = [(b, t) for b in BACKENDS for t in ((1, 2, 3, 8) if b == "cpu" else (1,))]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: n, m, D: one of each, less than a panel, odd, several tiles of queries, of keys, of both; more keys than queries.
SHAPES = [(1, 1, 1), (3, 5, 2), (40, 1, 33), (1, 300, 16), (9, 1000, 31), (230, 45, 7), (200, 410, 65)]
#: The same for Triton's small tiles, and several chunks of D; a visit to a tile takes its interpreter milliseconds.
TRITON_SHAPES = [(1, 1, 1), (40, 1, 33), (9, 300, 31), (70, 110, 65), (10, 40, 130)]

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


def dtypes(backend: str, *wanted: torch.dtype) -> list[torch.dtype]:
    """Those of `wanted`, or of all, that the backend computes in."""
    return [dtype for dtype in wanted or DTYPES if serves("contrast", backend, dtype)]


def on(backend: str, *values: Any) -> list[Any]:
    """The tensors among `values`, alone or in dictionaries, moved to where the backend computes."""
    move = lambda x: x.to(device_of(backend)) if isinstance(x, Tensor) else x  # noqa: E731
    return [{name: move(x) for name, x in v.items()} if isinstance(v, dict) else move(v) for v in values]


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def incoming(x: Tensor, number: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(number)).to(x)


def run(
    q: Tensor, k: Tensor | None, scale: float, options: dict[str, Any], backend: str, dtype: torch.dtype, **more: Any
) -> list[Tensor]:
    """Outputs, and gradients of q, the scale, and where there are such of k and the rows of positives."""
    q, k, options = on(backend, q, k, options)
    leaf = lambda x: _to(x, dtype).detach().requires_grad_()  # noqa: E731
    learned = torch.tensor(scale, dtype=computed_type(dtype), device=q.device, requires_grad=True)
    q = leaf(q)
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
    q: Tensor, k: Tensor | None, scale: float, options: dict[str, Any], backend: str, dtype: torch.dtype, **more: Any
) -> None:
    """The error rule for every result; precision is that of the products, which is also that of weights in them."""
    truth = run(q, k, scale, options, "reference", torch.float64)
    plain = run(q, k, scale, options, "reference", torch.float32)
    with poisoned_allocations():
        found = run(q, k, scale, options, backend, dtype, **more)
    of_input = backend == "triton" or dtype == torch.bfloat16
    products = more.get("dot_dtype") or (dtype if of_input else computed_type(dtype))
    norms = [x.double().norm(dim=1).max().item() for x in (q, q if k is None else k)]
    exponent = max(1.0, abs(scale) * norms[0] * norms[1])  # its rounding is an error of lse, which may be near 0
    dim = max(q.shape[1], 16)  # in shorter sums the rounding of the exponents counts more than the rule allows
    for i, (x, p, t) in enumerate(zip(found, plain, truth, strict=True)):
        size = t.where(t.isfinite(), 0).abs().max().item() if i == 0 else None
        precision = x.dtype if torch.finfo(x.dtype).eps > torch.finfo(products).eps else products
        assert_accurate(x, p, t, precision, dim, None if size is None else max(size, exponent))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("backend", "threads", "shape"),
    [(b, t, shape) for b, t in BACKENDS_AND_THREADS for shape in (SHAPES if b == "cpu" else TRITON_SHAPES)],
)
def test_every_form_and_shape(backend: str, threads: int, shape: tuple[int, int, int], form: str) -> None:
    torch.set_num_threads(threads)
    for dtype in dtypes(backend):
        q, k, options = case(form, *shape, dtype)
        check(q, k, 0.3, options, backend, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [33, 130])
@pytest.mark.parametrize(("backend", "architecture"), [("triton", a) for a in TILED if a in (80, 90, 100)])
def test_tiles_of_each_architecture(
    backend: str, architecture: int, dim: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged at both ends, D in one chunk and in several; others take the tiles that every test here takes."""
    take_tiles_of(architecture, monkeypatch)
    q, k, options = case(form, 131, 263, dim, torch.bfloat16)
    check(q, k, 0.3, options, backend, torch.bfloat16)


@every_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.4])
def test_queries_against_themselves(scale: float, form: str, backend: str) -> None:
    for dtype in dtypes(backend):
        q, _, options = case(form, 70, 70, 20, dtype)
        check(q, None, scale, options, backend, dtype)


@every_backend
@pytest.mark.parametrize("form", ["keys", "labels", "rows"])
@pytest.mark.parametrize("scale", [0.05, -0.5, 5.0, -40.0, 100.0])
def test_scales(scale: float, form: str, backend: str) -> None:
    """From similarities near 0, which take no shift, to thousands, which take a running maximum."""
    # Exponents in the thousands: the plain version's error, where one key takes all, may happen to be none.
    for dtype in dtypes(backend, torch.float32, torch.bfloat16, *([torch.float64] if abs(scale) < 50 else [])):
        q, k, options = case(form, 50, 450, 24, dtype)
        check(q, k, scale, options, backend, dtype)


@pytest.mark.parametrize(("backend", "threads"), [x for x in BACKENDS_AND_THREADS if x[1] in (1, 3)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["keys", "labels", "columns"])
def test_keys_that_grow(form: str, sign: int, backend: str, threads: int) -> None:
    """The first keys allow the fixed shift, later ones do not; some rows have no candidate among the first."""
    torch.set_num_threads(threads)
    q, k, options = case(form, 40, 1000, 16, torch.float32)
    k[600:] *= 50
    q[:, 0] = k[600:, 0] = 3
    k[600:, 0] *= 20 * sign  # all later similarities large, of one sign
    if form == "labels":
        options["q_labels"] = torch.arange(40) % 2
        options["k_labels"] = (torch.arange(1000) >= 600).long()
    check(q, k, 1.0, options, backend, torch.float32)


@every_backend
def test_gradient_of_a_loss_scaler(backend: str) -> None:
    q, k, options = on(backend, *case("columns", 60, 300, 24, torch.float32))
    results = []
    for factor in (1.0, 65536.0):
        d, _ = similarity_logsumexp(q.requires_grad_(), k.requires_grad_(), scale=0.5, backend=backend, **options)
        results.append(torch.autograd.grad((factor * d).sum(), (q, k)))
    assert all(torch.equal(scaled, 65536 * one) for one, scaled in zip(*results, strict=True))


@every_backend
def test_a_loss_scaler_in_float16(backend: str) -> None:
    """Weights of 65,536 and more do not fit the type of the rows; the gradients do."""
    q, k, options = case("columns", 60, 300, 24, torch.float16)
    results = []
    for name, dtype in ((backend, torch.float16), ("reference", torch.float64)):
        rows, keys, given = on(name, q / 512, k / 512, options)
        leaves = [x.to(dtype).requires_grad_() for x in (rows, keys)]
        d, _ = similarity_logsumexp(*leaves, scale=50.0, backend=name, **given)
        results.append(torch.autograd.grad(65536 * d.sum(), leaves))
    assert all(error(x, t) <= 8 * 2**-10 * 24**0.5 for x, t in zip(*results, strict=True))


@every_backend
@pytest.mark.parametrize("size", [1e-24, 1e-20])
@pytest.mark.parametrize("factor", [10.0, 30.0])
def test_squares_that_underflow(size: float, factor: float, backend: str) -> None:
    """The norms are finite and the scale makes up for them: no fixed shift may be concluded from squares of 0."""
    q, k, _ = case("keys", 40, 300, 16, torch.float32)
    for rows, keys in ((q * size, k), (q, k * size), (torch.zeros_like(q), k), (q, torch.zeros_like(k))):
        found, expected = (
            similarity_logsumexp(*(y.to(device_of(name), x) for y in (rows, keys)), scale=factor / size, backend=name)
            for name, x in ((backend, torch.float32), ("reference", torch.float64))
        )
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_layouts_give_equal_bits(layout: str, backend: str) -> None:
    arrange = LAYOUTS.get(layout, lambda x: x[..., :1].expand(x.shape))
    for dtype in dtypes(backend):
        for form in ("rows", "columns", "labels"):
            q, k, options = on(backend, *case(form, 37, 230 if backend == "cpu" else 100, 45, dtype))
            given = arrange(q), arrange(k), {name: arrange(x) for name, x in options.items()}
            if layout == "expanded" and form == "labels":
                given[2].update(options)
            dense = given[0].contiguous(), given[1].contiguous(), {n: x.contiguous() for n, x in given[2].items()}
            found, expected = (run_strided(*values, backend) for values in (given, dense))
            assert all(torch.equal(x, t) for x, t in zip(found, expected, strict=True))


@every_backend
@pytest.mark.parametrize("dim", [16, 64])
def test_a_queue_by_columns_gives_equal_bits(dim: int, backend: str) -> None:
    """Whole tiles of whole chunks, which Triton reads in place: [D, m], rows of a wider buffer, and copied."""
    for dtype in dtypes(backend):
        q, k, options = on(backend, *case("one column", 20, 256, dim, dtype))
        results = []
        for keys in (k, k.t().contiguous().t(), torch.cat([k, k.flip(0)], 1)[:, :dim], torch.cat([k, k])[::2]):
            keys = keys if keys.stride(0) != 2 * dim else keys.copy_(k)
            assert torch.equal(keys, k)
            with poisoned_allocations():
                results.append(run_frozen(q, keys, options, backend))
        assert all(torch.equal(x, t) for found in results[1:] for x, t in zip(found, results[0], strict=True))


def run_frozen(q: Tensor, k: Tensor, options: dict[str, Any], backend: str) -> list[Tensor]:
    """lse without gradients; outputs and the gradient of q with them."""
    alone = similarity_logsumexp(q, k, scale=0.3, backend=backend, **options)
    leaf = q.detach().requires_grad_()
    outputs = similarity_logsumexp(leaf, k, scale=0.3, backend=backend, **options)
    gradients = torch.autograd.grad(outputs, leaf, [incoming(x, i) for i, x in enumerate(outputs)])
    return [*alone, *(x.detach() for x in outputs), *gradients]


def run_strided(q: Tensor, k: Tensor, options: dict[str, Any], backend: str) -> list[Tensor]:
    """Outputs and gradients with the strides as they are; incoming gradients of stride 2."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    found = similarity_logsumexp(*leaves, scale=0.3, backend=backend, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    grads = [torch.stack([incoming(x, i), torch.full_like(x, torch.nan)], 1)[:, 0] for i, x in enumerate(outputs)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


@every_backend
@pytest.mark.parametrize("form", FORMS)
def test_a_queue_may_be_overwritten_before_backward(form: str, backend: str) -> None:
    for dtype in dtypes(backend):
        q, queue, options = on(backend, *case(form, 30, 400, 24, dtype))
        q.requires_grad_()
        gradients = []
        for overwrite in (False, True):
            scale = torch.tensor(0.3, dtype=computed_type(dtype), device=q.device, requires_grad=True)
            keys = queue.clone()
            found = similarity_logsumexp(q, keys, scale=scale, backend=backend, **options)
            if overwrite:
                keys.fill_(torch.nan)
            outputs = found if isinstance(found, tuple) else (found,)
            loss = sum((incoming(x, i) * x).sum() for i, x in enumerate(outputs))
            gradients.append(torch.autograd.grad(loss, (q, scale)))
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*gradients, strict=True))


@every_backend
def test_labels_and_columns_of_a_queue_may_be_overwritten_before_backward(backend: str) -> None:
    q, queue, options = on(backend, *case("all", 30, 400, 24, torch.float32))
    q.requires_grad_()
    gradients = []
    for overwrite in (False, True):
        given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in options.items()}
        d, logit = similarity_logsumexp(q, queue, scale=0.3, backend=backend, **given)
        if overwrite:
            for name in ("positive", "q_labels", "k_labels"):
                given[name].fill_(7)
        gradients += torch.autograd.grad((d * incoming(d, 0) + logit * incoming(logit, 1)).sum(), q)
    assert torch.equal(*gradients)


@every_backend
def test_an_overwritten_key_that_requires_grad_is_noticed(backend: str) -> None:
    q, k, _ = on(backend, *case("keys", 5, 6, 4, torch.float32))
    keys = k.requires_grad_() * 1
    lse = similarity_logsumexp(q, keys, scale=1.0, backend=backend)
    keys.detach().fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


@every_backend
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_forward_keeps_what_the_wanted_gradients_need(
    wanted: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of q, k, the scale and the positives; nothing is kept for those that are not wanted."""
    kept: list[tuple[Tensor | None, ...]] = []
    kernels = kernels_of("contrast", backend, "rectangle")
    original = kernels.logsumexp_forward
    monkeypatch.setattr(kernels, "logsumexp_forward", lambda *a: kept.append((r := original(*a))[2]) or r)
    q, k, options = case("rows", 20, 60, 12, torch.float32)
    leaves = [x.clone().requires_grad_() for x in on(backend, q, k, torch.tensor(0.4), options["positive"])]
    outputs = similarity_logsumexp(leaves[0], leaves[1], scale=leaves[2], positive=leaves[3], backend=backend)
    full = torch.autograd.grad(outputs, leaves, [incoming(x, i) for i, x in enumerate(outputs)])
    some = [x if i in wanted else x.detach() for i, x in enumerate(leaves)]
    outputs = similarity_logsumexp(some[0], some[1], scale=some[2], positive=some[3], backend=backend)
    assert outputs[0].requires_grad == bool(wanted)
    need_q, need_k = 0 in wanted or 2 in wanted, 1 in wanted
    assert [x is not None for x in kept[1]] == [need_q, False, need_k]
    if wanted:
        grads = [incoming(x, i) for i, x in enumerate(outputs)]
        for i, found in zip(wanted, torch.autograd.grad(outputs, [some[i] for i in wanted], grads), strict=True):
            assert torch.equal(found, full[i])
    with torch.no_grad():
        similarity_logsumexp(leaves[0], leaves[1], scale=leaves[2], positive=leaves[3], backend=backend)
    assert kept[2] == (None, None, None)


@every_backend
def test_one_of_two_outputs_may_go_unused(backend: str) -> None:
    q, k, options = on(backend, *case("columns", 20, 60, 12, dtypes(backend, torch.float64, torch.float32)[0]))
    q.requires_grad_(), k.requires_grad_()
    for used in (0, 1):
        found, expected = (
            torch.autograd.grad(similarity_logsumexp(q, k, scale=0.4, backend=b, **options)[used].sum(), (q, k))
            for b in (backend, "reference")
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F8001FF, -1])
@pytest.mark.parametrize("scale", [0.3, 30.0, -30.0])
@every_backend
def test_nan_comes_through(backend: str, scale: float, bits: int) -> None:
    for n, m in ((1, 1), (20, 300)):
        q, k, _ = case("keys", n, m, 9, torch.float32)
        results = []
        for broken in (q, k):
            x = broken.clone()
            x[n // 2].view(torch.int32)[4] = bits
            assert x.isnan().sum() == 1
            results.append(run(*((x, k) if broken is q else (q, x)), scale, {}, backend, torch.float32))
        (lse, dq, dscale, dk), (lse_k, dq_k, dscale_k, dk_k) = results
        assert lse[n // 2].isnan() and lse.isnan().sum() == 1 and dq[n // 2].isnan().all() and dscale.isnan()
        assert dq.isnan().any(1).sum() == 1 and dk.isnan().all()
        assert lse_k.isnan().all() and dq_k.isnan().any(1).all() and dscale_k.isnan() and dk_k.isnan().all()
        for impossible in (torch.nan, torch.inf):
            found = run(q, k, impossible, {}, backend, torch.float32)
            assert all(x.isnan().any() for x in found)


@every_backend
def test_infinite_rows_end(backend: str) -> None:
    q, k, _ = on(backend, *case("keys", 20, 300, 9, torch.float32))
    q[3, 2] = torch.inf
    lse = similarity_logsumexp(q, k, scale=0.3, backend=backend)
    expected = similarity_logsumexp(q, k, scale=0.3, backend="reference")
    assert torch.equal(lse.isnan(), expected.isnan()) and lse[3].isnan()


@every_backend
def test_rows_without_candidates(backend: str) -> None:
    """Columns of one label alone for some rows, in both shifts, and gradients that do not touch them."""
    for scale in (0.2, 50.0):
        q, k, _ = case("keys", 40, 500, 8, torch.float32)
        labels = {"q_labels": torch.arange(40) % 4, "k_labels": torch.zeros(500, dtype=torch.int64)}
        lse, dq, dscale, dk = run(q, k, scale, labels, backend, torch.float32)
        assert (lse[::4] == -torch.inf).all() and not dq[::4].any()
        rest = torch.arange(40) % 4 != 0
        assert lse[rest].isfinite().all() and dq[rest].all() and dscale.isfinite() and dk.isfinite().all()
    lse, dq, dscale, dk = run(q[:1], k[:1], 2.0, {"exclude_self": True}, backend, torch.float32)
    assert lse.item() == -torch.inf and not dq.any() and not dscale.any() and not dk.any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@every_backend
def test_types_of_labels(backend: str, dtype: torch.dtype) -> None:
    q, k, _ = on(backend, *case("keys", 9, 40, 5, torch.float32))
    labels = {"q_labels": (torch.arange(9) % 2).to(dtype), "k_labels": (torch.arange(40) % 3).to(torch.int64)}
    (labels,) = on(backend, labels)
    found, expected = (similarity_logsumexp(q, k, scale=0.3, backend=b, **labels) for b in (backend, "reference"))
    torch.testing.assert_close(found, expected)


@every_backend
def test_offsets_of_any_size(backend: str) -> None:
    q, k, _ = on(backend, *case("keys", 9, 40, 5, torch.float32))
    plain = similarity_logsumexp(q, k, scale=0.3, backend=backend)
    for offset in (40, -9, 2**62, -(2**62), 2**63 - 1, -(2**63)):
        found = similarity_logsumexp(q, k, scale=0.3, exclude_self=True, self_offset=offset, backend=backend)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("columns", [[0, 40], [-1, 3]])
@every_backend
def test_positive_columns_out_of_range(backend: str, columns: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSV_CHECK", "1")  # which tensors on the CPU do not need
    q, k, _ = on(backend, *case("keys", 2, 40, 5, torch.float32))
    with pytest.raises(IndexError, match=r"positive must be columns of k, in \[0, 40\); got"):
        similarity_logsumexp(q, k, scale=0.3, positive=torch.tensor(columns, device=q.device), backend=backend)


@pytest.mark.parametrize("scale", [0.3, 30.0])
@pytest.mark.parametrize("form", ["keys", "columns", "labels"])
@every_backend
def test_bfloat16_products_of_float32_rows(backend: str, form: str, scale: float) -> None:
    q, k, options = case(form, 100, 500, 33, torch.float32)
    q, k = (torch.nn.functional.normalize(x) for x in (q, k))
    found = run(q, k, scale, options, backend, torch.float32, dot_dtype=torch.bfloat16)
    plain = run(q, k, scale, options, "reference", torch.float32)
    truth = run(q, k, scale, options, "reference", torch.float64)
    assert all(x.dtype == torch.float32 for x in found)
    for x, p, t in zip(found, plain, truth, strict=True):
        assert_accurate(x, p, t, torch.bfloat16, 33)
    if backend == "cpu" and compiled_module().cpu_isa() != "avx512bf16":
        assert all(
            torch.equal(a, b) for a, b in zip(found, run(q, k, scale, options, backend, torch.float32), strict=True)
        )


@pytest.mark.large
@pytest.mark.parametrize(("backend", "threads"), BACKENDS_AND_THREADS)
@pytest.mark.parametrize("shape", [(300, 290, 33), (20, 3000, 33), (3000, 20, 33)])
def test_repeats_are_equal_to_the_bit(shape: tuple[int, int, int], backend: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, options = case("one column", *shape, dtype)
        for scale in (0.3, 20.0):
            first, *others = (run(q, k, scale, options, backend, dtype) for _ in range(3))
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("mean_key", [False, True])
@pytest.mark.parametrize("n, m", [(256, 65536), (65536, 256), (8192, 8192), (64, 1_000_000)])
def test_workspace_is_bounded(n: int, m: int, mean_key: bool) -> None:
    """The packed queries, sums of each part of the keys, ids of labels and, per thread, a chunk of keys and a tile."""
    dim = 128
    chunk = lambda copies: copies * 192 * dim + 192**2 + 192 * 16 + 256  # noqa: E731
    q, k, scale = torch.empty(1, dim).expand(n, dim), torch.empty(1, dim).expand(m, dim), torch.tensor(1.0)
    form = Form(False, 0, None, torch.empty(n, dtype=torch.int64), torch.empty(m, dtype=torch.int64), False)
    for threads in (1, 2, 16):
        torch.set_num_threads(threads)
        problem, _alive = cpu_rectangle._problem(q, k, scale, form)
        forward = compiled_module().rectangle_workspace(problem, mean_key, False)
        floats = n * dim + threads * n * (dim * mean_key + 2) + n + m + threads * chunk(1 + mean_key)
        assert forward <= 4 * floats + 2**16
        backward = compiled_module().rectangle_workspace(problem, False, True)
        assert backward <= 4 * (2 * n * dim + 3 * n + m + threads * chunk(2)) + 2**16


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
@pytest.mark.parametrize("rows, columns", [(1, 65536), (256, 65536), (4096, 65536), (65536, 256), (300, 200)])
def test_parts_fill_the_device_and_are_bounded(
    rows: int, columns: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial sums are at most rows + columns rows of D values, and every column is in one part."""
    from hsv_kernels.ops.contrast import triton_rectangle_tiles

    monkeypatch.setattr(triton_rectangle_tiles, "processors_of", lambda _: 132)
    tiles = triton_rectangle_tiles.key_gradient_tiles(90, torch.bfloat16, 128)
    visited, splits = triton_rectangle_tiles.split(torch.empty(0), rows, columns, tiles, 1)
    assert splits * rows <= rows + columns
    assert (splits - 1) * visited * tiles.columns < columns <= splits * visited * tiles.columns
    if columns == 65536 and rows > 1:
        assert splits * -(-rows // tiles.rows) >= 0.9 * 132


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_keys_are_read_in_place_where_tiles_can(backend: str) -> None:
    """Where Triton can load whole vectors, and the rows of a tile are no more than 32 bits apart; else from a copy."""
    from hsv_kernels.ops.contrast.triton_rectangle_forward import laid_out
    from hsv_kernels.ops.contrast.triton_rectangle_tiles import key_gradient_tiles

    tiles = key_gradient_tiles(0, torch.bfloat16, 64)
    for stride, in_place in ((64, True), (80, True), (72, False), (2**31 // tiles.columns, False)):
        keys = torch.empty_strided((2, 64), (stride, 1), dtype=torch.bfloat16)
        found, between, by_columns = laid_out(keys, 64, tiles)
        assert (found is keys, between, by_columns) == (in_place, stride if in_place else 64, False)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_keys_beyond_32_bits_of_each_other(backend: str) -> None:
    """A tile whose rows are 2^27 values apart, in memory that is hardly ever touched."""
    q, k, _ = case("keys", 5, 20, 16, torch.bfloat16)
    step = 2**27
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (len(k) * step), flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    apart = torch.frombuffer(memory, dtype=k.dtype).as_strided(k.shape, (step, 1)).copy_(k)
    expected, found = (similarity_logsumexp(q, x, scale=0.3, backend=backend) for x in (k, apart))
    assert torch.equal(found, expected)


def test_memory_of_a_queue() -> None:
    """256 queries against 65,536 keys, whose similarities would take 64 MiB and a packed copy 32."""
    q, queue = torch.randn(256, 128, requires_grad=True), torch.randn(128, 65536).t()

    def step() -> None:
        similarity_logsumexp(q, queue, scale=0.1, positive=q.detach(), backend="cpu")[0].sum().backward()

    step()
    assert peak_memory(step) <= 4 * 2**20


def test_two_python_threads_at_once() -> None:
    cases = [case("columns", 200, m, 40, torch.float32) for m in (700, 900)]
    expected = [run(q, k, 0.3, options, "cpu", torch.float32) for q, k, options in cases]
    wrong = []

    def work(number: int) -> None:
        torch.set_num_threads(2)
        q, k, options = cases[number]
        for _ in range(20):
            found = run(q, k, 0.3, options, "cpu", torch.float32)
            wrong.extend(1 for a, b in zip(found, expected[number], strict=True) if error(a, b) > 1e-6)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@every_backend
@pytest.mark.parametrize("form", ["columns", "rows", "labels"])
def test_opcheck(form: str, backend: str) -> None:
    operators = torch.ops.hsv_kernels
    q, k, options = on(backend, *case(form, 9, 9, 5, torch.float32))
    scale = torch.tensor(0.3, device=q.device)
    others = [True, 1, *(options.get(name) for name in ("positive", "q_labels", "k_labels")), False]
    for keys in (k, None):
        torch.library.opcheck(operators.similarity_logsumexp.default, (q, keys, scale, *others, False, False, backend))
        rows = [q.clone().requires_grad_(), None if keys is None else keys.clone().requires_grad_()]
        torch.library.opcheck(
            operators.similarity_logsumexp.default,
            (*rows, scale.clone().requires_grad_(), *others, True, True, backend),
        )
        lse, logit, *saved = operators.similarity_logsumexp(q, keys, scale, *others, True, True, backend)
        grads = torch.ones_like(lse), torch.ones_like(logit) if "positive" in options else None
        for needs in ((True, keys is not None, True, form == "rows"), (False, False, True, False)):
            torch.library.opcheck(
                operators.similarity_logsumexp_backward.default,
                (*grads, q, keys, keys is None, scale, *others, *saved, *needs, backend),
            )


@every_backend
def test_compiled_backward_of_queries_by_columns(backend: str) -> None:
    """The gradient of positive rows is contiguous, as the compiler is told, whatever the strides of q."""
    torch.compiler.reset()
    q, k, p = on(backend, torch.randn(6, 9).t(), torch.randn(7, 6), torch.randn(9, 6))
    p.requires_grad_()

    def loss(p: Tensor) -> Tensor:
        return similarity_logsumexp(q, k, scale=1.0, positive=p, backend=backend)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(p), p)[0] for f in (compiled, loss))
    assert found.is_contiguous() and expected.is_contiguous() and torch.equal(found, expected)
