"""Batches: order, reproducibility, resuming, ranks, failures."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from hsv.config import load_config
from hsv.data import MAE, ArraySource, UndecodableImage, ViewLoader, digits, plain_batches, statistics
from hsv.data.loader import Batch
from hsv.data.sources import Source

DIGITS = load_config(preset="digits").simclr.view
REQUESTS = (DIGITS, DIGITS, MAE)


class Flaky(Source):
    """Grey images of different sizes, of which every `every`-th cannot be decoded."""

    def __init__(self, count: int = 40, every: int = 7) -> None:
        self.count, self.every = count, every

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"file-{index}"

    def read(self, index: int, min_side: int | None = None) -> np.ndarray:
        if index % self.every == 0:
            raise UndecodableImage(self.name(index), "broken on purpose")
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (9 + index % 5, 8 + index % 3, 3), dtype=np.uint8)


def batches(source: Source | None = None, **changes: object) -> list[Batch]:
    options = {"image_size": 8, "channels": 1, "batch_size": 16, "seed": 3, "num_steps": 10} | changes
    return list(ViewLoader(source or digits(), REQUESTS, **options))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.step, a.epoch, a.failures) == (b.step, b.epoch, b.failures)
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_shapes_and_slots() -> None:
    batch = batches(num_steps=1, image_size=(8, 12), channels=3)[0]
    assert [v.shape for v in batch.views] == [(16, 3, 8, 12)] * 3
    assert all(v.dtype == torch.uint8 and v.is_contiguous() for v in batch.views)
    assert not torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5, 7])
def test_resume_is_exact(start: int, workers: int) -> None:
    source = Flaky()  # two steps of 16 an epoch, so the runs cross epochs
    whole = batches(source, channels=3)
    rest = batches(source, channels=3, start_step=start, num_steps=10 - start, workers=workers)
    assert_equal(whole[start:], rest)


def test_workers_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    batches(num_steps=1, workers=1)
    after = torch.rand(4)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(4))


def test_cache_changes_nothing() -> None:
    source = Flaky()
    assert_equal(batches(source, channels=3), batches(source, channels=3, cache_limit=0))


def test_workers_share_what_they_decoded() -> None:
    loader = ViewLoader(Flaky(), [MAE], image_size=8, channels=3, batch_size=20, seed=0, num_steps=2, workers=2)
    failed = {name for batch in loader for name, _ in batch.failures}
    filled = loader.batches.reader.sizes[:, 0] > 0
    assert {f"file-{i}" for i in range(40) if not filled[i]} >= failed
    assert filled.sum() > 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_the_group(number: signal.Signals) -> None:
    options = {"image_size": 8, "channels": 1, "batch_size": 16, "seed": 0, "num_steps": 40}
    batches = iter(ViewLoader(digits(), [DIGITS], workers=2, **options))
    next(batches), next(batches)  # one of each worker, so both are past their start
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert len(list(batches)) == 38


def test_epochs_differ_and_hold_each_image_once() -> None:
    found = batches(ArraySource(digits().images[:48]), num_steps=6)
    first, second = (torch.cat([b.indices for b in found if b.epoch == e]) for e in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(48))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(world_size: int) -> None:
    source = ArraySource(digits().images[:96])
    options = {"batch_size": 8, "num_steps": 96 // (8 * world_size), "world_size": world_size}
    ranks = [batches(source, rank=r, **options) for r in range(world_size)]
    seen = torch.cat([b.indices for rank in ranks for b in rank])
    assert sorted(seen.tolist()) == list(range(96))
    joined = [torch.cat([rank[s].indices for rank in ranks]) for s in range(options["num_steps"])]
    alone = batches(source, batch_size=8 * world_size, num_steps=options["num_steps"])
    assert all(torch.equal(a, b.indices) for a, b in zip(joined, alone, strict=True))


def test_a_step_of_several_batches_holds_each_image_once() -> None:
    source = ArraySource(digits().images[:100])
    parts = batches(source, batch_size=8, parts=4, num_steps=24)
    steps = batches(source, batch_size=32, num_steps=6)
    for number, step in enumerate(steps):
        together = parts[4 * number : 4 * number + 4]
        assert torch.equal(torch.cat([b.indices for b in together]), step.indices)
        assert {b.epoch for b in together} == {step.epoch}


def test_failures_are_named_and_left_out() -> None:
    found = batches(Flaky(), num_steps=2, channels=3)
    for batch in found:
        assert len(batch.indices) + len(batch.failures) == 16
        assert all(i % 7 for i in batch.indices.tolist())
        assert all(len(v) == len(batch.indices) for v in batch.views)
        assert all(reason == "broken on purpose" for _, reason in batch.failures)
    assert sum(len(b.failures) for b in found) >= 1


def test_a_batch_of_failures_takes_the_next_images() -> None:
    source = Flaky(every=2)
    found = batches(source, batch_size=1, num_steps=20, channels=3)
    order = batches(ArraySource(digits().images[: len(source)]), batch_size=1, num_steps=len(source))
    order = [b.indices.item() for b in order]
    for step, batch in enumerate(found):
        after = [*order[step:], *order]
        readable = next(i for i in after if i % 2)
        assert batch.indices.tolist() == [readable]
        assert [name for name, _ in batch.failures] == [f"file-{i}" for i in after[: after.index(readable)]]


def test_what_stands_in_for_a_batch_of_failures_is_not_in_its_step() -> None:
    for count, world_size in ((40, 2), (41, 3), (23, 4)):  # the last steps stand beside the beginning of the epoch
        options = {"batch_size": 1, "world_size": world_size, "num_steps": 20, "channels": 3}
        ranks = [batches(Flaky(count, every=4), rank=rank, **options) for rank in range(world_size)]
        assert sum(len(b.failures) for rank in ranks for b in rank) > 0
        for step in zip(*ranks, strict=True):
            assert len({b.indices.item() for b in step}) == world_size


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_failures_is_an_error_that_names_them(workers: int) -> None:
    with pytest.raises(RuntimeError, match=r"step 0: none of \d+ images in a row.*file-\d+: broken on purpose"):
        batches(Flaky(every=1), workers=workers)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"batch_size": 2000},
        {"batch_size": 800, "world_size": 2},
        {"rank": 1},
        {"workers": -1},
        {"channels": 2},
        {"image_size": 0},
        {"start_step": -1},
    ],
)
def test_bad_arguments_are_named(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        batches(**changes)


def test_plain_batches_hold_every_image_in_order() -> None:
    source = digits("test")
    found = list(plain_batches(source, image_size=8, channels=1, batch_size=100))
    assert [len(i) for i, _, _ in found] == [100, 100, 100, 60]
    images = torch.cat([v for _, v, _ in found])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), source.images)


def test_plain_batches_report_failures() -> None:
    found = list(plain_batches(Flaky(), image_size=8, channels=3, batch_size=7, workers=1))
    assert torch.cat([i for i, _, _ in found]).tolist() == [i for i in range(40) if i % 7]
    assert [name for _, _, failed in found for name, _ in failed] == [f"file-{i}" for i in range(0, 40, 7)]


def test_statistics_are_those_of_the_pixels() -> None:
    source = digits()
    mean, std = statistics(source, 1, 8)
    pixels = source.images / 255.0
    assert mean[0] == pytest.approx(pixels.mean(), rel=1e-9)
    assert std[0] == pytest.approx(pixels.std(), rel=1e-9)
    assert statistics(source, 1, 8, limit=50, seed=1) != statistics(source, 1, 8, limit=50, seed=2)
    assert len(statistics(Flaky(), 3, 8)[0]) == 3
    with pytest.raises(ValueError, match="broken on purpose"):
        statistics(Flaky(every=1), 3, 8)
