"""Where images come from: arrays, folders, tar shards. All answer the same five questions."""

from __future__ import annotations

import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hsv.data.decode import UndecodableImage, decode, is_image_name, printable, reason_of

__all__ = ["ArraySource", "FolderSource", "MissingSplit", "Source", "digits", "open_source"]

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
DIGITS_TRAIN = 1437


class MissingSplit(ValueError):
    """The data has no part of that name."""


class Source(ABC):
    """A fixed, ordered collection of images.

    Sources hold no open files, so they can be pickled and used on both sides of a fork.

    Attributes:
        labels: int64 [len], or None when the images carry no labels.
        classes: names of the labels, or None when only their numbers are known.
    """

    labels: np.ndarray | None = None
    classes: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The file's path relative to its folder, or shard and member."""

    @abstractmethod
    def read(self, index: int, min_side: int | None = None) -> Image.Image | np.ndarray:
        """One image: a loaded picture in its own mode, or uint8 [H, W, C].

        Args:
            index: 0 ≤ index < len.
            min_side: pixels; see `decode`.

        Raises:
            UndecodableImage: the file cannot be read or decoded.
        """


class ArraySource(Source):
    """Images of one size that are already in memory.

    Args:
        images: uint8 [N, H, W, C], C = 1 or 3.
        labels: int64 [N] or None.
        classes: names of the labels.
        prefix: names are `prefix-index`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        prefix: str = "image",
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"images: got {images.dtype} {list(images.shape)}; allowed: uint8 [N, H, W, 1 or 3]")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: got {len(labels)}; allowed: one for each of {len(images)} images")
        self.images = images
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = classes
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.prefix}-{index:06d}"

    def read(self, index: int, min_side: int | None = None) -> np.ndarray:
        return self.images[index]


class FolderSource(Source):
    """Image files below a folder, flat or nested, sorted by path.

    Args:
        root: the folder.
        limit: take this many, evenly spread over the sorted files (so that every class is met).
        classes: names of the class folders. When given, or when all images lie exactly one folder deep in
            two or more folders, the folder's name is the label; otherwise there are no labels.

    Raises:
        ValueError: no folder, or no image file in it.
    """

    def __init__(self, root: str | Path, limit: int | None = None, classes: list[str] | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"data: got {str(root)!r}; allowed: a folder")
        self.paths = sorted(image_paths(self.root))
        if not self.paths:
            raise ValueError(f"data: got {str(root)!r}, with no image file below; allowed: a folder with images")
        if classes is None:
            classes = class_folders(self.paths)
        if limit is not None and limit < len(self.paths):
            self.paths = [self.paths[i * len(self.paths) // limit] for i in range(limit)]
        if classes is not None:
            number = {name: i for i, name in enumerate(classes)}
            self.classes = classes
            self.labels = np.array([number[p.split("/")[0]] for p in self.paths], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        try:
            with open(self.root / self.paths[index], "rb") as file:
                return decode(file, self.name(index), min_side)
        except OSError as error:
            raise UndecodableImage(self.name(index), error.strerror or reason_of(error)) from error


def image_paths(root: Path) -> Iterator[str]:
    """Paths of image files relative to `root`, hidden ones left out; follows links, each folder once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in files:
            if is_image_name(name):
                yield name if relative == "." else f"{relative}/{name}".replace(os.sep, "/")


def class_folders(paths: Sequence[str]) -> list[str] | None:
    """Sorted names of the class folders if every path is `class/file` and there are two classes or more."""
    if any(path.count("/") != 1 for path in paths):
        return None
    names = sorted({path.split("/")[0] for path in paths})
    return names if len(names) > 1 else None


def digits(split: str = "train") -> ArraySource:
    """scikit-learn's handwritten digits: 8×8 grey, rows 0–1,436 for training, the last 360 for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255.0 / 16.0)).astype(np.uint8)[..., None]  # 0..16 → 0..255
    rows = slice(0, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return ArraySource(images[rows], data.target[rows], [str(d) for d in range(10)], f"digits-{split}")


def open_source(data: str | Path, *, split: str = "train", limit: int | None = None) -> Source:
    """Open images by name.

    Args:
        data: "digits"; a folder of images, flat or nested, where `train` and `test` (or `val`) sub-folders
            are honoured; a folder, file or glob of tar shards (`train-*.tar`, `test-*.tar.gz`, …, or shards in
            such sub-folders). Shards and folders without such names are training data as a whole.
        split: "train" or "test".
        limit: at most this many images: the first ones of shards and digits, evenly spread ones of a folder.

    Raises:
        MissingSplit: a ValueError: the data is there, and has no such split.
        ValueError: nothing there, damaged shards, or a limit below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}; allowed: {sorted(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}; allowed: whole numbers from 1")
    if str(data) == "digits":
        return first(digits(split), limit)
    shards = find_shards(data)
    if shards:
        from hsv.data.shards import ShardSource

        return ShardSource(shards_of_split(shards, split, data), limit=limit)
    return open_folder(Path(data), split, limit)


def first(source: ArraySource, limit: int | None) -> ArraySource:
    """The first `limit` images of an array source."""
    labels = None if source.labels is None else source.labels[:limit]
    return ArraySource(source.images[:limit], labels, source.classes, source.prefix)


def open_folder(root: Path, split: str, limit: int | None) -> Source:
    """The folder itself or its split's sub-folder, with one numbering of classes for both splits."""
    if not root.is_dir():
        raise ValueError(
            f"data: got {str(root)!r}; allowed: 'digits', a folder of images, or a folder, file or glob of tar shards"
        )
    parts = {s: next((root / n for n in names if (root / n).is_dir()), None) for s, names in SPLITS.items()}
    if parts["train"] is None:
        if split == "train":
            return FolderSource(root, limit)
        raise MissingSplit(f"split 'test' needs train and test (or val) sub-folders, got {str(root)!r}")
    if parts[split] is None:
        raise MissingSplit(f"{str(root)!r} has no sub-folder {' or '.join(SPLITS[split])}")
    shards = find_shards(parts[split])
    if shards:
        from hsv.data.shards import ShardSource

        return ShardSource(shards, limit)
    found = [class_folders(list(image_paths(part))) for part in parts.values() if part is not None]
    classes = None if any(names is None for names in found) else sorted({n for names in found for n in names})
    return FolderSource(parts[split], limit, classes)


def find_shards(data: str | Path) -> list[str]:
    """Sorted tar files that `data` names: a file, a glob, or those lying directly in a folder."""
    from hsv.data.shards import is_shard_name

    path = Path(data)
    if path.is_dir():
        found = [str(p) for p in path.iterdir()]
    elif path.is_file():
        found = [str(path)]
    else:
        found = glob.glob(os.path.expanduser(str(data)))
    return sorted(name for name in found if is_shard_name(name) and os.path.isfile(name))


def shards_of_split(shards: list[str], split: str, data: str | Path) -> list[str]:
    """Shards whose file name begins with a name of the split; without any such names all are for training."""
    by_split = {s: [f for f in shards if Path(f).name.startswith(names)] for s, names in SPLITS.items()}
    chosen = by_split[split]
    if split == "train" and not any(by_split.values()):
        chosen = shards
    if not chosen:
        raise MissingSplit(f"no shard named {split}-* in {str(data)!r} (there: {Path(shards[0]).name}, …)")
    return chosen
