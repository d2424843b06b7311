"""What the contrast functions refuse, which backend serves them, and the rectangular forms of the logsumexp."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsv_kernels import BackendError, NTXentLoss, backends, nt_xent, similarity_logsumexp, use_backend
from hsv_kernels.backends import _warn_once, resolve, why_not
from tests.kernels.cases import device_of, serves, usable_backends

COMPILED = usable_backends("contrast", reference=False)
ALL = usable_backends("contrast")
EXACT = [name for name in ALL if serves("contrast", name, torch.float64)]
Z = torch.ones(4, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"z0": [1.0]}, "z0 must be a tensor; got list"),
        ({"z0": torch.ones(4, 3, dtype=torch.int64)}, "z0 must be float32, .* got torch.int64"),
        ({"z0": torch.ones(4, 3, dtype=torch.complex64)}, "z0 must be float32, .* got torch.complex64"),
        ({"z0": torch.ones(4)}, r"z0 must be \[N, D\] .* got \[4\]"),
        ({"z0": torch.ones(2, 4, 3)}, r"z0 must be \[N, D\] .* got \[2, 4, 3\]"),
        ({"z0": torch.ones(0, 3), "z1": torch.ones(0, 3)}, r"without an empty dimension; got \[0, 3\]"),
        ({"z0": torch.ones(4, 0), "z1": torch.ones(4, 0)}, r"without an empty dimension; got \[4, 0\]"),
        ({"z1": torch.ones(5, 3)}, r"z1 must have the shape of z0, \[4, 3\]; got \[5, 3\]"),
        ({"z1": None}, "z1 must be a tensor; got NoneType"),
        ({"z1": torch.ones(4, 3, dtype=torch.float64)}, "one dtype; got torch.float64 and torch.float32"),
        ({"z1": torch.ones(4, 3, device="meta")}, "one device; got meta and cpu"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"temperature": -0.1}, "temperature must be positive and finite; got -0.1"),
        ({"temperature": float("inf")}, "temperature must be positive and finite; got inf"),
        ({"temperature": float("nan")}, "temperature must be positive and finite; got nan"),
        (
            {"temperature": 1e-50},
            r"temperature must be in \[1.17.*e-38, 3.4.*e\+38\], the range of torch.float32; got 1e-50",
        ),
        ({"temperature": 1e300}, r"temperature must be in .* the range of torch.float32; got 1e\+300"),
        ({"temperature": "0.1"}, "temperature must be a number or a 0-dim tensor; got '0.1'"),
        ({"temperature": True}, "temperature must be a number or a 0-dim tensor; got True"),
        ({"temperature": torch.ones(1)}, r"temperature must be a number or a 0-dim tensor; got .* shape \[1\]"),
        ({"temperature": torch.tensor(1)}, "temperature must be float32, .* got torch.int64"),
        ({"temperature": torch.tensor(0.1, device="meta")}, "temperature and the embeddings must be on one device"),
        (
            {"dot_dtype": torch.float16},
            "dot_dtype must be None, or torch.bfloat16 .* got torch.float16 for torch.float32",
        ),
        (
            {"z0": Z.double(), "z1": Z.double(), "dot_dtype": torch.bfloat16},
            "dot_dtype must be None, .* got torch.bfloat16 for torch.float64",
        ),
        ({"reduction": "average"}, "reduction must be one of mean, sum, none; got 'average'"),
        ({"backend": "gpu"}, "backend must be one of auto, reference, cpu, triton, cuda; got 'gpu'"),
    ],
)
def test_nt_xent_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(**{"z0": Z, "z1": Z, "temperature": 0.1, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"q": torch.ones(4, 3, dtype=torch.int32)}, "q must be float32, .* got torch.int32"),
        ({"q": torch.ones(3)}, r"q must be \[n, D\] .* got \[3\]"),
        ({"q": torch.ones(0, 3)}, r"q must be \[n, D\] .* got \[0, 3\]"),
        ({"k": torch.ones(5, 2)}, "k must have the 3 dimensions of q; got 2"),
        ({"k": torch.ones(5, 3, dtype=torch.float64)}, "k and q must have one dtype"),
        ({"k": torch.ones(0, 3)}, r"k must be \[m, D\] .* got \[0, 3\]"),
        ({"scale": float("nan")}, "scale must be finite; got nan"),
        ({"scale": -1e39}, r"scale must be in \[-3.4.*, the range of torch.float32; got -1e\+39"),
        ({"scale": None}, "scale must be a number or a 0-dim tensor; got None"),
        ({"scale": torch.ones(2)}, r"scale must be a number or a 0-dim tensor; got .* shape \[2\]"),
        ({"self_offset": 1.0, "exclude_self": True}, "self_offset must be an integer; got 1.0"),
        ({"self_offset": 1}, "self_offset needs exclude_self=True"),
        (
            {"positive": torch.zeros(3, dtype=torch.int64)},
            r"positive must be int64 \[n\] or rows .* got \[3\]",
        ),
        (
            {"dot_dtype": torch.float16},
            "dot_dtype must be None, or torch.bfloat16 .* got torch.float16 for torch.float32",
        ),
        ({"positive": [0, 1, 2, 3]}, "positive must be an int64 tensor .* got list"),
        ({"q_labels": [0, 1, 0, 1], "k_labels": [0, 1, 0, 1]}, r"q_labels must be integers \[4\]; got list"),
        ({"positive": torch.zeros(4, dtype=torch.int32)}, "positive must be float32, .* got torch.int32"),
        ({"positive": torch.zeros(4, 2)}, r"positive must be int64 \[n\] or rows \[n, D\] .* got \[4, 2\]"),
        ({"q_labels": torch.zeros(4, dtype=torch.int64)}, "q_labels and k_labels go together"),
        (
            {"q_labels": torch.zeros(4), "k_labels": torch.zeros(4)},
            r"q_labels must be integers \[4\]; got torch.fl",
        ),
    ],
)
def test_similarity_logsumexp_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_logsumexp(**{"q": Z, "scale": 1.0, **arguments})


def test_a_named_backend_that_is_absent_raises() -> None:
    with pytest.raises(BackendError, match="contrast has no cuda backend"):
        nt_xent(Z, Z, backend="cuda")
    if reason := why_not("contrast", "triton", Z.device, Z.dtype):
        with pytest.raises(BackendError, match="'triton' cannot serve contrast"):
            nt_xent(Z, Z, backend="triton")
        assert "triton" in reason


@pytest.mark.parametrize("backend", COMPILED)
def test_auto_takes_the_kernels(backend: str) -> None:
    if backend == "cpu":
        z = torch.randn(4, 3, requires_grad=True)
        assert "hsv_kernels::nt_xent" in nt_xent(z, z, reduction="none").grad_fn.name()
        with use_backend("reference"):
            assert "Reference" in nt_xent(z, z, reduction="none").grad_fn.name()
            assert "hsv_kernels::nt_xent" in nt_xent(z, z, reduction="none", backend="auto").grad_fn.name()
        assert "hsv_kernels::nt_xent" in nt_xent(z, z, reduction="none").grad_fn.name()
    assert "absent" not in backends()["contrast"][backend]


def test_use_backend_nests_and_ends_with_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    with use_backend("reference"), use_backend("cuda"), pytest.raises(BackendError):
        nt_xent(Z, Z)
    nt_xent(Z, Z)
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("fast"):
        pass


@pytest.mark.parametrize("temperature", [0.2, torch.nn.Parameter(torch.tensor(0.2)), torch.tensor(0.2)])
def test_module(temperature: float | Tensor) -> None:
    z0, z1 = torch.randn(2, 5, 4)
    module = NTXentLoss(temperature, reduction="sum")
    torch.testing.assert_close(module(z0, z1), nt_xent(z0, z1, temperature, reduction="sum"))
    assert [name for name, _ in module.named_parameters()] == (
        ["temperature"] if isinstance(temperature, torch.nn.Parameter) else []
    )
    assert "temperature=" in repr(module)


FORMS: dict[str, dict[str, Any]] = {
    "keys": {"k": torch.randn(7, 3)},
    "offset": {"k": torch.randn(7, 3), "exclude_self": True, "self_offset": 2},
    "positive column": {"positive": torch.tensor([1, 0, 3, 2]), "exclude_self": True},
    "positive rows": {"k": torch.randn(7, 3), "positive": torch.randn(4, 3)},
    "labels": {"q_labels": torch.tensor([0, 1, 0, 1]), "k_labels": torch.tensor([0, 1, 0, 1])},
}


def moved(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", COMPILED)
def test_who_serves_other_forms(backend: str, form: str) -> None:
    q = torch.randn(4, 3)
    expected = similarity_logsumexp(q, scale=1.0, backend="reference", **FORMS[form])
    q, options = q.to(device_of(backend)), moved(FORMS[form], device_of(backend))
    found = similarity_logsumexp(q, scale=1.0, backend=backend, **options)
    torch.testing.assert_close(found, expected, check_device=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(similarity_logsumexp(q, scale=1.0, **options), expected, check_device=False)


@pytest.mark.parametrize("call", [lambda: nt_xent(Z, Z), lambda: similarity_logsumexp(Z, Z, scale=1.0)])
def test_the_warning_names_the_line_of_the_caller(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    _warn_once.cache_clear()
    monkeypatch.setitem(resolve.__globals__, "why_not", lambda *_: "a reason that the test invents")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_other_forms_compile_whole(backend: str, form: str) -> None:
    torch.compiler.reset()
    device = device_of(backend)
    options = {"backend": backend, "scale": 1.0, **moved(FORMS[form], device)}
    expected = similarity_logsumexp(q := torch.randn(4, 3, device=device, requires_grad=True), **options)
    compiled = torch.compile(lambda q: similarity_logsumexp(q, **options), fullgraph=True, backend="aot_eager")
    found = compiled(q)
    torch.testing.assert_close(found, expected)
    for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
        (dx, dy) = (torch.autograd.grad(value.sum(), q, retain_graph=True)[0] for value in (x, y))
        torch.testing.assert_close(dx, dy)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", EXACT)
def test_other_forms_against_loops(backend: str, form: str) -> None:
    q, scale, options = torch.randn(4, 3, dtype=torch.float64), -1.7, dict(FORMS[form])
    for name in ("k", "positive"):
        if name in options and options[name].is_floating_point():
            options[name] = options[name].double()
    k, positive = options.get("k", q), options.get("positive")
    found = similarity_logsumexp(q, scale=scale, backend=backend, **options)
    for i in range(4):
        kept = [
            j
            for j in range(k.shape[0])
            if not (options.get("exclude_self") and j == i + options.get("self_offset", 0))
            and not ("q_labels" in options and options["q_labels"][i] == options["k_labels"][j])
            and not (positive is not None and positive.dim() == 1 and positive[i] == j)
        ]
        lse = torch.logsumexp(scale * k[kept] @ q[i], 0)
        if positive is None:
            torch.testing.assert_close(found[i], lse)
        else:
            logit = scale * q[i] @ (k[positive[i]] if positive.dim() == 1 else positive[i])
            torch.testing.assert_close((found[0][i], found[1][i]), (lse - logit, logit))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", EXACT)
def test_other_forms_have_gradients(backend: str, form: str) -> None:
    options = {
        name: value.double().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in FORMS[form].items()
    }
    tensors = [name for name, value in options.items() if isinstance(value, Tensor) and value.requires_grad]
    q, scale = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor(0.7, dtype=torch.float64)

    def run(q: Tensor, scale: Tensor, *values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return similarity_logsumexp(
            q, scale=scale, backend=backend, **options | dict(zip(tensors, values, strict=True))
        )

    assert torch.autograd.gradcheck(run, (q, scale.requires_grad_(), *(options[name] for name in tensors)))


@pytest.mark.parametrize("backend", ALL)
def test_a_row_without_candidates(backend: str) -> None:
    """Every column has the label of row 0: its sum is empty, and its gradient zero."""
    device = device_of(backend)
    q = torch.randn(3, 4, device=device, requires_grad=True)
    k = torch.randn(2, 4, device=device, requires_grad=True)
    labels = moved({"q_labels": torch.tensor([5, 6, 6]), "k_labels": torch.tensor([5, 5])}, device)
    lse = similarity_logsumexp(q, k, scale=2.0, backend=backend, **labels)
    assert lse[0] == -torch.inf and lse[1:].isfinite().all()
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    assert not dq[0].any() and dq[1:].all() and dk.isfinite().all()
