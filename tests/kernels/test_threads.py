"""Threads of the compiled CPU kernels: teams of every size, forked workers, Python threads, one OpenMP runtime."""

import ctypes
import multiprocessing
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsv_kernels import (
    distillation_loss,
    gather_patches,
    gather_tokens,
    masked_mse,
    negative_cosine,
    nt_xent,
    random_masking,
    restore_tokens,
    similarity_logsumexp,
    sinkhorn_centre,
    use_backend,
)
from hsv_kernels.backends import compiled_module

if isinstance(compiled_module(), str):
    pytest.skip(compiled_module(), allow_module_level=True)

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).parents[2]


def normal(*shape: int) -> Tensor:
    """The same values for the same shape; they require grad."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def with_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """`out` and gradients, without an operation of torch's that would start a team: it hangs in a child of fork."""
    incoming = (torch.linspace(-1, 2, out.shape[-1]) if out.dim() else torch.ones(())).expand_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, incoming)]


def run_nt_xent(temperature: float | Tensor = 0.1, dot_dtype: torch.dtype | None = None) -> list[Tensor]:
    z0, z1 = normal(300, 64), normal(300, 64).detach().flip(0).requires_grad_()
    learned = [temperature] if isinstance(temperature, Tensor) else []
    return with_gradients(nt_xent(z0, z1, temperature, reduction="none", dot_dtype=dot_dtype), z0, z1, *learned)


def run_square_logsumexp() -> list[Tensor]:
    q, scale = normal(600, 64), torch.tensor(0.2, requires_grad=True)
    return with_gradients(similarity_logsumexp(q, scale=scale, exclude_self=True), q, scale)


def run_queue() -> list[Tensor]:
    """MoCo's form: keys without gradient, the positive apart."""
    q, positive, k = normal(64, 64), normal(64, 64).detach().flip(0).requires_grad_(), normal(8192, 64).detach()
    d, positive_logit = similarity_logsumexp(q, k, scale=0.2, positive=positive)
    return [*with_gradients(d, q, positive), positive_logit.detach()]


def run_pairs() -> list[Tensor]:
    """CLIP's form: both sides learn, the positive a column."""
    q, k, scale = normal(512, 64), normal(520, 64), torch.tensor(0.2, requires_grad=True)
    d, _ = similarity_logsumexp(q, k, scale=scale, positive=torch.arange(512))
    return with_gradients(d, q, k, scale)


def run_gather_patches() -> list[Tensor]:
    images = normal(32, 3, 64, 64)
    return with_gradients(gather_patches(images, random_masking(32, 64, num_keep=32, seed=1)[0], 8), images)


def run_gather_tokens() -> list[Tensor]:
    tokens = normal(32, 64, 160)
    return with_gradients(gather_tokens(tokens, random_masking(32, 64, num_keep=32, seed=2)[0]), tokens)


def run_restore_tokens() -> list[Tensor]:
    tokens, token = normal(32, 20, 160), normal(160)
    return with_gradients(restore_tokens(tokens, random_masking(32, 64, num_keep=20, seed=3)[1], token), tokens, token)


def run_masked_mse() -> list[Tensor]:
    pred, images = normal(32, 64, 192), normal(32, 3, 64, 64).detach()
    return with_gradients(masked_mse(pred, images, random_masking(32, 64, num_keep=16, seed=4)[2], 8), pred)


def run_negative_cosine() -> list[Tensor]:
    p, z = normal(300, 1024), normal(300, 1025)[:, 1:]
    return with_gradients(negative_cosine(p, z, reduction="none"), p, z)


def run_distillation_loss() -> list[Tensor]:
    student, teacher = normal(5, 33, 2048), normal(2, 33, 2048).detach()
    loss, mean = distillation_loss(student, teacher, reduction="none")
    return [mean, *with_gradients(loss, student)]


#: Each with work for eight threads; results and gradients.
OPERATIONS: dict[str, Callable[[], list[Tensor]]] = {
    "nt_xent": run_nt_xent,
    "nt_xent, learned temperature": lambda: run_nt_xent(torch.tensor(0.1, requires_grad=True)),
    "nt_xent, large range": lambda: run_nt_xent(0.01),
    "nt_xent, bfloat16 products": lambda: run_nt_xent(dot_dtype=torch.bfloat16),
    "similarity_logsumexp": run_square_logsumexp,
    "queue": run_queue,
    "pairs": run_pairs,
    "random_masking": lambda: list(random_masking(64, 256, num_keep=64, seed=0)),
    "gather_patches": run_gather_patches,
    "gather_tokens": run_gather_tokens,
    "restore_tokens": run_restore_tokens,
    "masked_mse": run_masked_mse,
    "negative_cosine": run_negative_cosine,
    "distillation_loss": run_distillation_loss,
    "sinkhorn_centre": lambda: [sinkhorn_centre(normal(150, 2048).detach(), 0.1)],
}
each = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture(autouse=True)
def kernels_alone() -> Iterator[None]:
    with use_backend("cpu"):
        yield


def in_teams_of(threads: int, name: str) -> list[Tensor]:
    torch.set_num_threads(threads)
    return OPERATIONS[name]()


def assert_same_values(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for the order of sums."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.double().abs().max().item())


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@each
def test_teams_of_every_size(name: str) -> None:
    """Right values, and the same bits whenever the team has the same size."""
    alone = in_teams_of(1, name)
    for threads in (1, 2, 3, 8):
        found = in_teams_of(threads, name)
        assert_same_values(found, alone)
        for _ in range(3):
            assert_same_bits(in_teams_of(threads, name), found)


@each
def test_two_python_threads_at_once(name: str) -> None:
    """Each with a team of its own, beside another operation and beside itself."""
    others = {name, "nt_xent", "masked_mse"}
    expected = {other: in_teams_of(2, other) for other in others}
    wrong = []

    def work(mine: str) -> None:
        with use_backend("cpu"):
            for _ in range(5):
                if not all(map(torch.equal, in_teams_of(2, mine), expected[mine])):
                    wrong.append(mine)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in (name, *others)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def answer(pipe: Connection, name: str) -> None:
    pipe.send([x.numpy() for x in in_teams_of(2, name)])


@each
def test_forked_worker(name: str) -> None:
    """A child of fork has none of its parent's threads: it computes alone."""
    alone = in_teams_of(1, name)
    in_teams_of(2, name)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=answer, args=(sender, name), daemon=True)
    child.start()
    try:
        assert receiver.poll(60), "the forked worker hangs"
        assert_same_values([torch.from_numpy(x) for x in receiver.recv()], alone)
    finally:
        child.kill()
    assert_same_values(in_teams_of(2, name), alone)


@each
def test_inside_a_parallel_region(name: str) -> None:
    """Called by each thread of somebody else's team, an operation computes alone."""
    alone = in_teams_of(1, name)
    found, errors = [], []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: int | None) -> None:
        try:
            with use_backend("cpu"):
                found.append(in_teams_of(2, name))
        except BaseException as error:  # ctypes would only print it
            errors.append(error)

    ctypes.CDLL("libgomp.so.1").GOMP_parallel(body, None, 2, 0)
    assert not errors and len(found) == 2
    for results in found:
        assert_same_values(results, alone)


COUNT_THREADS = """
import os
import time
import torch
from hsv_kernels import use_backend
from tests.kernels.test_threads import OPERATIONS

with use_backend("cpu"):
    torch.set_num_threads(2)  # starts a thread of another pool of torch's, once
    before = len(os.listdir("/proc/self/task"))
    for name, run in OPERATIONS.items():
        for threads in (2, 8, 3):
            torch.set_num_threads(threads)
            run()
            end = time.monotonic() + 5  # those that a smaller team has no use for take a moment to leave
            while (team := len(os.listdir("/proc/self/task")) - before + 1) != threads and time.monotonic() < end:
                time.sleep(0.01)
            assert team == threads, f"{name}: {team} threads, torch asks for {threads}"
"""


def python(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


def test_torch_decides_how_many_threads() -> None:
    """libgomp keeps the threads of its last team; they are the process's only ones beside those of the start."""
    result = python(COUNT_THREADS)
    assert result.returncode == 0, result.stderr


RUNTIMES = """
import re
z = torch.randn(600, 64)
torch.set_num_threads(2)
torch.mm(z, z.T).exp().sum()
module.cpu_isa()
import hsv_kernels
hsv_kernels.nt_xent(z, z, backend="cpu")
found = set(re.findall(r"/\\S*/lib(?:gomp|omp|iomp5)[^/ ]*[.]so\\S*", open("/proc/self/maps").read()))
assert len(found) == 1, found
"""
TORCH_FIRST = "import torch\nfrom hsv_kernels import _C as module\n"
MODULE_FIRST = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("hsv_kernels._C", {path!r}, loader=ExtensionFileLoader("hsv_kernels._C", {path!r}))
module = module_from_spec(spec)
spec.loader.exec_module(module)
import torch
"""


@pytest.mark.parametrize("order", [TORCH_FIRST, MODULE_FIRST], ids=["torch first", "module first"])
def test_one_openmp_runtime_in_the_process(order: str) -> None:
    result = python(order.format(path=compiled_module().__file__) + RUNTIMES)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_the_module_needs_libgomp_by_its_plain_name() -> None:
    """A copy under another name, as wheels bundle them, would be a second runtime beside torch's."""
    linked = subprocess.run(["ldd", compiled_module().__file__], capture_output=True, text=True, check=True).stdout
    if "libtsan" in linked:
        pytest.skip("the build for ThreadSanitizer has teams of its own")
    assert re.findall(r"^\s*(lib\w*omp\S*)", linked, re.MULTILINE) == ["libgomp.so.1"]
