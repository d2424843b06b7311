"""How the operations behave on the device: streams, CUDA graphs, devices, no waiting, the same bits twice."""

import pytest
import torch
from torch import Tensor

from hsv_kernels import distributed, random_masking
from tests.gpu.operations import Operation, on_the_device, run
from tests.kernels.cases import poisoned_allocations

CUDA = torch.device("cuda", 0)
every_operation = pytest.mark.parametrize("operation, backend", list(on_the_device()))


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert not x.isnan().any() and torch.equal(x, y)


@every_operation
def test_same_bits_twice(operation: Operation, backend: str) -> None:
    """And every value is written: fresh memory is full of NaN."""
    inputs = operation.inputs(CUDA)
    with poisoned_allocations():
        first = run(operation, inputs, backend)
        assert_same_bits(run(operation, inputs, backend), first)


@every_operation
def test_nothing_waits_for_the_device(operation: Operation, backend: str) -> None:
    inputs = operation.inputs(CUDA)
    run(operation, inputs, backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operation, inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_seeds_are_drawn_without_waiting() -> None:
    random_masking(4, 16, num_keep=4, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        random_masking(4, 16, num_keep=4, device=CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_mean_over_ranks_does_not_wait() -> None:
    """In one process; the count of rows is the host's."""
    student, teacher = torch.randn(2, 4, 64, device=CUDA), torch.randn(2, 4, 64, device=CUDA)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    distributed.distillation_loss(student, teacher, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        distributed.distillation_loss(student, teacher, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_operation
def test_graph_follows_its_inputs(operation: Operation, backend: str) -> None:
    """A captured graph, replayed on other values at the same places, gives what a call gives."""
    inputs = operation.inputs(CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(operation, inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(operation, inputs, backend)

    for _ in range(2):
        with torch.no_grad():
            for held, fresh in zip(inputs, operation.inputs(CUDA), strict=True):
                held.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in captured]
        assert_same_bits(replayed, run(operation, inputs, backend))


@every_operation
def test_works_on_the_stream_that_is_current(operation: Operation, backend: str) -> None:
    """The inputs come late on a stream of its own: work queued elsewhere would read what was there before."""
    ready = operation.inputs(CUDA)
    expected = run(operation, ready, backend)
    late = [torch.zeros_like(x).requires_grad_(x.requires_grad) for x in ready]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for held, fresh in zip(late, ready, strict=True):
            held.copy_(fresh)
    with torch.cuda.stream(stream):
        found = run(operation, late, backend)
    stream.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_operation
def test_works_on_the_device_of_its_tensors(operation: Operation, backend: str) -> None:
    inputs = operation.inputs(CUDA)
    moved = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs]
    with torch.cuda.device(0):
        found = run(operation, moved, backend)
        assert torch.cuda.current_device() == 0
    assert {x.device.index for x in found} == {1}
    assert_same_bits([x.to(CUDA) for x in found], run(operation, inputs, backend))
