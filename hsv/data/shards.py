"""Tar shards in the manner of WebDataset: `key.jpg` (any image extension) and, for labels, `key.cls`."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hsv.data.decode import UndecodableImage, decode, is_image_name, printable, reason_of
from hsv.data.sources import Source

__all__ = ["ShardSource", "is_shard_name"]

STREAM_LIMIT = 8 * 2**30


def is_shard_name(name: str) -> bool:
    """Whether a file name ends in .tar, .tar.gz or .tgz."""
    return name.endswith((".tar", ".tar.gz", ".tgz"))


class ShardSource(Source):
    """Images in tar files.

    Plain tars are indexed once and read by offset, so they may be of any size. Compressed ones cannot be
    sought in: their images are read once, in order, into one buffer in memory (8 GiB at most).

    Args:
        files: tar files, in the order in which their images are numbered.
        limit: stop after this many images.

    Raises:
        ValueError: a damaged tar, no image in any of them, or more compressed data than memory should hold.
    """

    def __init__(self, files: Sequence[str], limit: int | None = None) -> None:
        self.files = [str(f) for f in files]
        self.buffer = bytearray()
        self.members: list[str] = []
        where: list[tuple[int, int, int]] = []  # (file, or -1 for the buffer; offset; bytes)
        keys: list[tuple[int, str]] = []
        labels: dict[tuple[int, str], int] = {}
        for number, file in enumerate(self.files):
            if limit is not None and len(where) >= limit:
                break
            try:
                self._index(number, where, keys, labels, limit)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ValueError(
                    f"data: got the shard {file!r}, which is damaged ({reason_of(error)}); allowed: whole tar files"
                ) from error
        if not where:
            raise ValueError(f"data: got {self.files}, without an image; allowed: shards with images")
        self.where = np.array(where, dtype=np.int64)
        found = [labels.get(key) for key in keys]
        if all(label is not None for label in found):
            self.labels = np.array(found, dtype=np.int64)

    def _index(
        self,
        number: int,
        where: list[tuple[int, int, int]],
        keys: list[tuple[int, str]],
        labels: dict[tuple[int, str], int],
        limit: int | None,
    ) -> None:
        """Add one shard's images and labels; stops at the first image that would exceed the limit."""
        file = self.files[number]
        streamed = not file.endswith(".tar")
        with (
            gzip.open(file) if streamed else open(file, "rb") as data,
            tarfile.open(fileobj=data, mode="r|" if streamed else "r:") as tar,
        ):
            for member in tar:
                name = f"{Path(file).name}/{member.name}"
                if not member.isfile():
                    continue
                if name.endswith(".cls"):
                    labels[number, key_of(member.name)] = read_label(tar, member, name)
                elif is_image_name(name):
                    if limit is not None and len(where) >= limit:
                        break
                    self.members.append(name)
                    keys.append((number, key_of(member.name)))
                    if streamed:
                        where.append((-1, len(self.buffer), member.size))
                        self.buffer += tar.extractfile(member).read()
                        self._check_memory()
                    else:
                        where.append((number, member.offset_data, member.size))
                tar.members = []  # tarfile keeps every header it has met

    def _check_memory(self) -> None:
        if len(self.buffer) > STREAM_LIMIT:
            raise ValueError(
                f"data: got more than {STREAM_LIMIT >> 30} GiB of images in compressed shards, held in memory; "
                "allowed: plain .tar files (gunzip -k), which are read in place"
            )

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return printable(self.members[index])

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        file, offset, size = (int(v) for v in self.where[index])
        name = self.name(index)
        if file < 0:
            return decode(io.BytesIO(memoryview(self.buffer)[offset : offset + size]), name, min_side)
        try:
            with open(self.files[file], "rb", buffering=0) as handle:
                data = os.pread(handle.fileno(), size, offset)
        except OSError as error:
            raise UndecodableImage(name, error.strerror or reason_of(error)) from error
        return decode(io.BytesIO(data), name, min_side)


def key_of(name: str) -> str:
    """WebDataset's key: the path up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> int:
    """The integer that a .cls member holds as text."""
    text = tar.extractfile(member).read()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: got {text[:40]!r}; allowed: one integer") from None
