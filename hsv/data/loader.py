"""Batches of views, each a pure function of (seed, step), so that a run resumes anywhere."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hsv.data.cache import CACHE_LIMIT, ImageReader
from hsv.data.channels import check_channels
from hsv.data.decode import UndecodableImage
from hsv.data.hashing import Stream, permutation
from hsv.data.sources import Source
from hsv.data.views import ViewSpec, centre_view, make_views

__all__ = ["Batch", "ViewLoader", "default_workers", "plain_batches"]

SIGTERM_GRACE = 10
LONGEST_GAP = 1000  # images that are tried in place of a batch


@dataclass
class Batch:
    """Views of some images, before their colours are changed.

    Attributes:
        step: number of the batch in the run.
        epoch: passes over the source that are complete.
        indices: int64 [B], the images' numbers in the source.
        views: for each request uint8 [B, C, H, W]; row b of each is of the same image.
        failures: (name, reason) of images that were left out because they could not be decoded.
    """

    step: int
    epoch: int
    indices: Tensor
    views: list[Tensor]
    failures: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, which reaches a GPU without waiting."""
        return replace(self, indices=self.indices.pin_memory(), views=[v.pin_memory() for v in self.views])


class ViewLoader:
    """Iterates over the batches of a run, or of the rest of one.

    Each epoch is a permutation of the source that depends on (seed, epoch); a batch takes the next
    batch_size · world_size images of it, each rank its own share. What is left at the end of an epoch and does
    not fill a step is dropped (other images in every epoch). Images that cannot be decoded are left out; a batch of
    nothing else takes images of later steps instead. Crops depend on (seed, epoch, image, slot). The number of
    workers and what was read before change nothing.

    Args:
        source: the images.
        requests: one specification for each view.
        slots: the stream of random numbers of each view, its position unless given. Views of one slot are cropped
            alike as far as their specifications are alike; equal specifications in other slots are other crops.
        image_size: pixels, or (height, width), of views whose specification has no size.
        channels: 1 or 3.
        batch_size: images of a batch on this rank.
        seed: of order and crops.
        start_step: the batch of the run to begin with.
        num_steps: how many batches to yield.
        parts: consecutive batches that make one step of the run; an epoch is a whole number of those.
        workers: processes that decode and crop; 0 does it in this one.
        rank, world_size: this process among those that share an epoch.
        pin_memory: copy batches to page-locked memory.
        cache_limit: bytes; sources that decode to no more than this are decoded once.

    Raises:
        ValueError: a bad argument, or fewer images than a step needs.
        RuntimeError: from the iterator, when no image of a batch nor of 1,000 in its place can be decoded.
    """

    def __init__(
        self,
        source: Source,
        requests: Sequence[ViewSpec],
        *,
        image_size: int | tuple[int, int],
        channels: int,
        batch_size: int,
        seed: int,
        num_steps: int,
        start_step: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        cache_limit: int = CACHE_LIMIT,
        slots: Sequence[int] | None = None,
        parts: int = 1,
    ) -> None:
        check_channels(channels)
        if not requests:
            raise ValueError("requests: got none; allowed: one view or more")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_steps", num_steps, 0),
            ("start_step", start_step, 0),
            ("workers", workers, 0),
            ("world_size", world_size, 1),
            ("parts", parts, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}; allowed: whole numbers from {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}; allowed: 0 to {world_size - 1}")
        if len(source) < batch_size * world_size * parts:
            raise ValueError(
                f"batch_size: got {parts} × {batch_size} on each of {world_size} ranks; "
                f"allowed: together at most the number of images, {len(source)}"
            )
        self.start_step, self.num_steps = start_step, num_steps
        self.workers, self.pin_memory = workers, pin_memory
        size = as_size(image_size)
        self.batches = ViewBatches(
            reader=ImageReader(source, channels, min_side_for(requests, size), cache_limit),
            requests=tuple(requests),
            slots=tuple(range(len(requests)) if slots is None else slots),
            size=size,
            seed=seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            parts=parts,
        )

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.start_step, self.start_step + self.num_steps)
        return parallel(self.batches, steps, self.workers, self.pin_memory)


@dataclass
class ViewBatches(Dataset):
    """The batch of each step, as a function of the step; see ViewLoader."""

    reader: ImageReader
    requests: tuple[ViewSpec, ...]
    slots: tuple[int, ...]
    size: tuple[int, int]
    seed: int
    batch_size: int
    rank: int
    world_size: int
    parts: int

    def __getitem__(self, step: int) -> Batch:
        total, places = len(self.reader.source), self.world_size * self.parts
        step_of_run, part = divmod(step, self.parts)
        epoch, position = divmod(step_of_run, total // (self.batch_size * places))
        place, begin = part * self.world_size + self.rank, position * self.batch_size * places
        images, indices, failures = self.read(self.order(epoch, total), begin, place, places)
        if not images:
            named = "; ".join(f"{name}: {reason}" for name, reason in failures[:5])
            raise RuntimeError(f"step {step}: none of {len(failures)} images in a row can be decoded ({named}; …)")
        views = [
            to_tensor(make_views(images, indices, spec, size_of(spec, self.size), (self.seed, epoch, slot)))
            for spec, slot in zip(self.requests, self.slots, strict=True)
        ]
        return Batch(step, epoch, torch.from_numpy(indices), views, failures)

    def read(
        self, order: np.ndarray, begin: int, place: int, places: int
    ) -> tuple[list, np.ndarray, list[tuple[str, str]]]:
        """read_all of one place's batch in the step that begins at `begin`.

        Where nothing of it can be read, the first batch of which anything can be, of the place's own part of the images
        outside the step: no image is twice in one step.
        """
        first, end = begin + place * self.batch_size, begin + places * self.batch_size
        images, indices, failures = read_all(self.reader, order[first : first + self.batch_size])
        spare = np.concatenate([order[end:], order[:begin]])[place::places][:LONGEST_GAP] if not images else order[:0]
        while not images and len(spare):
            wanted, spare = np.split(spare, [self.batch_size])
            images, indices, failed = read_all(self.reader, wanted)
            failures += failed
        return images, indices, failures

    def order(self, epoch: int, total: int) -> np.ndarray:
        """The epoch's permutation, kept until the next one is asked for."""
        if getattr(self, "_order", (None,))[0] != epoch:
            self._order = epoch, permutation((Stream.ORDER, self.seed, epoch), total)
        return self._order[1]


@dataclass
class PlainBatches(Dataset):
    """Consecutive images in evaluation's view; see plain_batches."""

    reader: ImageReader
    size: tuple[int, int]
    batch_size: int

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        begin = number * self.batch_size
        wanted = np.arange(begin, min(begin + self.batch_size, len(self.reader.source)))
        images, indices, failures = read_all(self.reader, wanted)
        views = np.zeros((len(images), *self.size, self.reader.channels), dtype=np.uint8)
        for view, image in zip(views, images, strict=True):
            view[:] = centre_view(image, self.size)
        return torch.from_numpy(indices), to_tensor(views), failures


def plain_batches(
    source: Source,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    batch_size: int = 256,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor, list[tuple[str, str]]]]:
    """All images in order, each resized until it covers the size and cropped to its middle.

    Returns:
        An iterator over (indices int64 [B], images uint8 [B, C, H, W], failures as in Batch). B ≤ batch_size, and
        0 where every image of a batch failed.
    """
    check_channels(channels)
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; allowed: whole numbers from 1")
    size = as_size(image_size)
    reader = ImageReader(source, channels, min_side=2 * max(size), limit=0)
    batches = PlainBatches(reader, size, batch_size)
    return parallel(batches, range(math.ceil(len(source) / batch_size)), workers)


def parallel(batches: Dataset, order: range, workers: int, pin_memory: bool = False) -> Iterator:
    """batches[i] for i in `order`, computed ahead by `workers` processes."""
    if not order:
        return
    if workers == 0:
        for i in order:
            yield batches[i].pin_memory() if pin_memory else batches[i]
        return
    loader = DataLoader(
        batches,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=survive_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own: the global one must not depend on when a loader was made
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:  # at once, also after an error, whose traceback would keep the iterator and its workers alive
        iterator._shutdown_workers()


def survive_signals(worker: int) -> None:
    """Let a worker outlive a Ctrl-C or SIGTERM sent to its process group, so that the run can save its state.

    The main process ends its workers itself; one that is left alone with a SIGTERM ends after ten seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_GRACE))


def read_all(reader: ImageReader, wanted: np.ndarray) -> tuple[list, np.ndarray, list[tuple[str, str]]]:
    """The images that can be read, their indices int64, and (name, reason) of the others."""
    images, indices, failures = [], [], []
    for index in wanted.tolist():
        try:
            images.append(reader(index))
            indices.append(index)
        except UndecodableImage as error:
            failures.append((error.name, error.reason))
    return images, np.array(indices, dtype=np.int64), failures


def to_tensor(views: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] → contiguous [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(views.transpose(0, 3, 1, 2)))


def as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size: got {image_size!r}; allowed: a number of pixels or (height, width)")
    return size


def size_of(spec: ViewSpec, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a view in a run whose images have `size`."""
    return size if spec.size is None else (spec.size, spec.size)


def min_side_for(requests: Sequence[ViewSpec], size: tuple[int, int]) -> int:
    """Pixels that the shorter side of an image must keep so that the smallest crop is not enlarged."""
    return max(
        math.ceil(max(size_of(s, size)) / math.sqrt(s.crop_scale[0] / max(s.crop_ratio[1], 1 / s.crop_ratio[0])))
        for s in requests
    )


def default_workers(processes: int = 1) -> int:
    """Data workers for each of `processes` trainers on this machine: its CPUs less two, shared, 8 at most.

    With two CPUs that is none: there the model itself needs both, and cropping costs little beside it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, (cpus - 2) // processes))
