"""What the contrast operations promise beside their values: autograd, torch.compile, memory, threads, forks."""

import math
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

import hsv_kernels
from hsv_kernels import NTXentLoss, nt_xent, similarity_logsumexp
from hsv_kernels.backends import interpreting
from tests.kernels.cases import device_of, peak_memory, serves, usable_backends

BACKENDS = usable_backends("contrast")
OPERATORS = [name for name in BACKENDS if name != "reference"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms(backend: str) -> dict[str, Loss]:
    """Losses of (z0, z1, 0-dim scalar) by each differentiable path."""
    found: dict[str, Loss] = {
        "nt_xent": lambda z0, z1, t: nt_xent(z0, z1, t, backend=backend),
        "number": lambda z0, z1, t: nt_xent(z0, z1, 0.3, backend=backend),
        "square": lambda z0, z1, t: similarity_logsumexp(z0, scale=t, exclude_self=True, backend=backend).sum(),
    }
    if backend != "triton":
        found["keys"] = lambda z0, z1, t: similarity_logsumexp(z0, z1, scale=t, backend=backend).sum()
        found["queue"] = lambda z0, z1, t: queue_loss(z0, z1, t, backend)
        found["labels"] = lambda z0, z1, t: labels_loss(z0, t, backend)
    return found


def queue_loss(q: Tensor, positive: Tensor, scale: Tensor, backend: str) -> Tensor:
    """MoCo's loss against keys that need no gradient, and a share of the positive logits."""
    d, logit = similarity_logsumexp(q, q.detach().flip(0) + 1, scale=scale, positive=positive, backend=backend)
    return torch.nn.functional.softplus(d).sum() + 0.1 * logit.sum()


def labels_loss(q: Tensor, scale: Tensor, backend: str) -> Tensor:
    """Rows against each other, less those of the same parity and the next one."""
    parity = torch.arange(q.shape[0]) % 2
    others = {"exclude_self": True, "self_offset": 1, "q_labels": parity, "k_labels": parity}
    return similarity_logsumexp(q, scale=scale, backend=backend, **others).sum()


BACKENDS_AND_FORMS = [(backend, form) for backend in BACKENDS for form in forms(backend)]


def arguments(backend: str, n: int = 6, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z0, z1 = (torch.randn(n, dim, generator=generator).to(device_of(backend)).requires_grad_() for _ in range(2))
    return z0, z1, torch.tensor(0.4, device=device_of(backend), requires_grad=True)


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_double_backward_raises(backend: str, form: str) -> None:
    loss, args = forms(backend)[form], arguments(backend)
    (dz0,) = torch.autograd.grad(loss(*args), args[0], create_graph=True)
    for second in (dz0.sum(), dz0.square().sum() + args[0].sum()):
        with pytest.raises(RuntimeError, match="no double backward"):
            second.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_through_the_incoming_gradient_raises(backend: str) -> None:
    z0, z1, temperature = arguments(backend)
    weight = torch.ones(12, device=z0.device, requires_grad=True)
    losses = nt_xent(z0.detach(), z1.detach(), temperature, reduction="none", backend=backend)
    (dt,) = torch.autograd.grad((losses * weight).sum(), temperature, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dt.backward()


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_backward_twice_over_a_kept_graph(backend: str, form: str) -> None:
    args = arguments(backend)
    loss = forms(backend)[form](*args)
    wanted = [x for x in args if torch.autograd.grad(loss, x, allow_unused=True, retain_graph=True)[0] is not None]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some_inputs(backend: str, wanted: tuple[int, ...]) -> None:
    args = arguments(backend)
    full = torch.autograd.grad(nt_xent(*args, backend=backend), args)
    some = [x if i in wanted else x.detach() for i, x in enumerate(args)]
    found = torch.autograd.grad(nt_xent(*some, backend=backend), [some[i] for i in wanted])
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, full[i])


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_func_grad_and_vmap(backend: str, form: str) -> None:
    loss, args = forms(backend)[form], arguments(backend)
    (expected,) = torch.autograd.grad(loss(*args), args[0])
    plain = [x.detach() for x in args]
    torch.testing.assert_close(torch.func.grad(lambda z0: loss(z0, *plain[1:]))(plain[0]), expected)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda z0: loss(z0, *plain[1:]))(torch.stack([plain[0], plain[1]]))


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_compiles_without_a_graph_break(backend: str, form: str) -> None:
    torch.compiler.reset()
    loss = forms(backend)[form]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 9):
        args = arguments(backend, n)
        expected, found = loss(*args), compiled(*args)
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(x, args, allow_unused=True) for x in (expected, found))
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_temperature_in_a_compiled_module(backend: str) -> None:
    torch.compiler.reset()
    z0, z1, _ = arguments(backend)
    module = NTXentLoss(torch.nn.Parameter(torch.tensor(0.5, device=z0.device)), backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = compiled(z0, z1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_changing_number_under_compile(backend: str) -> None:
    torch.compiler.reset()
    z0, z1, _ = arguments(backend)
    compiled = torch.compile(lambda a, b, t: nt_xent(a, b, t, backend=backend), fullgraph=True, backend="aot_eager")
    for temperature in (0.1, 0.2, 0.012):
        torch.testing.assert_close(compiled(z0, z1, temperature), nt_xent(z0, z1, temperature, backend=backend))


@pytest.mark.parametrize("backend", OPERATORS)
def test_opcheck(backend: str) -> None:
    operators = torch.ops.hsv_kernels
    z0, z1, t = arguments(backend)
    for fixed_shift in (True, False):
        for keep in {False, fixed_shift and backend == "cpu"}:
            for reduction in ("none", "mean", "sum"):
                options = (fixed_shift, False, keep, reduction, backend)
                torch.library.opcheck(operators.nt_xent.default, (z0, z1, t, *options))
    torch.library.opcheck(operators.square_logsumexp.default, (z0, t, True, False, backend))
    with torch.no_grad():
        plain = z0.detach(), z1.detach(), t.detach()
        losses, *saved = operators.nt_xent(*plain, False, False, False, "none", backend)
        for need_z, need_t in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                operators.nt_xent_backward.default,
                (torch.ones_like(losses), *plain, *saved, need_z, need_t, False, False, "none", backend),
            )
        lse, sums = operators.square_logsumexp(plain[0], plain[2], True, False, backend)
        torch.library.opcheck(
            operators.square_logsumexp_backward.default,
            (torch.ones_like(lse), plain[0], plain[2], sums, True, False, True, True, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_ignored(backend: str) -> None:
    args = arguments(backend, 9, 33)
    for form, loss in forms(backend).items():
        expected = loss(*args)
        with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
            found = loss(*args)
        assert found.dtype == torch.float32 and torch.equal(found, expected), form
        wanted = [args[i] for i in {"number": (0, 1), "square": (0, 2), "labels": (0, 2)}.get(form, (0, 1, 2))]
        with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
            gradients = torch.autograd.grad(found, wanted)
        for x, y in zip(gradients, torch.autograd.grad(expected, wanted), strict=True):
            assert torch.equal(x, y), form


@pytest.mark.parametrize("backend", OPERATORS)
def test_saves_little(backend: str) -> None:
    z0, z1, temperature = arguments(backend, 65, 16)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nt_xent(z0, z1, temperature, backend=backend)
    normalised = 130 * 16 if backend == "triton" else 0
    assert sum(saved.values()) <= 4 * (130 * 16 + normalised + 4 * 130 + 8)


@pytest.mark.large
@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("backend", OPERATORS)
def test_memory_is_linear_in_the_rows(backend: str, temperature: float | Tensor) -> None:
    """An M × M array would take 256 MiB here."""
    n, dim = 4096, 32
    z0, z1, _ = arguments(backend, n, dim)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z0.device).requires_grad_()

    def step() -> None:
        nt_xent(z0, z1, temperature, backend=backend).backward()

    step()  # what is allocated once
    allowed = 4 * 2 * n * dim * 4 + 8 * 2 * n * 4 * (dim // 8) + 8 * 2**20
    if z0.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        assert torch.cuda.max_memory_allocated() - before <= allowed
    else:
        assert peak_memory(step) <= allowed


def value_and_gradient(backend: str, seed: int, temperature: float | Tensor = 0.07) -> tuple[Tensor, Tensor]:
    z0, z1 = torch.randn(2, 90, 40, generator=torch.Generator().manual_seed(seed)).to(device_of(backend))
    z0.requires_grad_()
    losses = nt_xent(z0, z1, temperature, reduction="none", backend=backend)
    return losses.detach(), torch.autograd.grad(losses.sum(), z0)[0]


@pytest.mark.large
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_python_threads(backend: str) -> None:
    expected = [value_and_gradient(backend, seed) for seed in range(2)]
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]

    def work(seed: int) -> None:
        torch.set_num_threads(2)
        found[seed].extend(value_and_gradient(backend, seed) for _ in range(20))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(2):
        assert len(found[seed]) == 20
        for pair in found[seed]:
            torch.testing.assert_close(pair, expected[seed])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, torch.tensor(0.07)], ids=["number", "tensor"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
def test_any_number_of_threads(backend: str, temperature: float | Tensor, threads: int) -> None:
    expected = value_and_gradient(backend, 5, temperature)
    torch.set_num_threads(threads)
    found, again = (value_and_gradient(backend, 5, temperature) for _ in range(2))
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def _send_value_and_gradient(pipe: Connection, backend: str) -> None:
    losses, gradient = value_and_gradient(backend, 1)
    pipe.send((losses.tolist(), gradient.tolist()))


@pytest.mark.large
@pytest.mark.parametrize("backend", [name for name in BACKENDS if device_of(name).type == "cpu"])
def test_forked_worker(backend: str) -> None:
    torch.set_num_threads(2)
    losses, gradient = value_and_gradient(backend, 1)  # starts the parent's threads, which a child does not have
    torch.set_num_threads(1)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send_value_and_gradient, args=(sender, backend))
    child.start()
    try:
        assert receiver.poll(60), "the forked worker does not answer"
        child_losses, child_gradient = receiver.recv()
    finally:
        child.join(1)
        child.kill()
    torch.testing.assert_close(torch.tensor(child_losses), losses)
    torch.testing.assert_close(torch.tensor(child_gradient), gradient)


@pytest.mark.parametrize("backend", [name for name in OPERATORS if serves("contrast", name, torch.float64)])
def test_float64_in_float64_out(backend: str) -> None:
    z = torch.randn(4, 3, dtype=torch.float64)
    assert nt_xent(z, z, 0.1, backend=backend).dtype == torch.float64
    assert similarity_logsumexp(z, scale=1.0, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("backend", OPERATORS)
def test_the_value_of_a_tensor_is_not_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value decides nothing on the host: the same operator runs whatever it holds."""
    calls = []
    original = hsv_kernels.ops.contrast.nt_xent._nt_xent
    monkeypatch.setattr(
        hsv_kernels.ops.contrast.nt_xent,
        "_nt_xent",
        lambda *args: calls.append(args[3]) or original(*args),
    )
    z0, z1, _ = arguments(backend)
    for temperature in (torch.tensor(0.5), torch.tensor(0.001), 0.5, 0.001):
        nt_xent(z0, z1, temperature.to(z0.device) if isinstance(temperature, Tensor) else temperature, backend=backend)
    assert calls == [False, False, True, False]


def test_fixed_shift_range() -> None:
    has_fixed_shift = hsv_kernels.ops.contrast.nt_xent.has_fixed_shift
    for temperature in (0.5, 0.05, 0.0174, 0.0175, 0.02, 1e-3, 1e-300, 1e300):
        for rows in (2, 1024, 10**6):
            assert has_fixed_shift(temperature, rows) == (1 / temperature + math.log(rows) < 64)


def test_interpreter_runs_alone() -> None:
    assert interpreting() == (BACKENDS == ["triton"])
