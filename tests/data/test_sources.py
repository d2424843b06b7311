"""Folders, shards and digits answer the same questions."""

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsv.data import UndecodableImage, open_source
from hsv.data.cache import ImageReader
from hsv.data.sources import Source

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def values(source: Source) -> list[int]:
    return [np.asarray(source.read(i))[0, 0, 0] for i in range(len(source))]


def fill(root: Path, names: Iterable[str]) -> None:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_digits() -> None:
    train, test = open_source("digits"), open_source("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.read(0).shape == (8, 8, 1)
    assert train.images.max() == 255
    assert train.labels[:4].tolist() == [0, 1, 2, 3]
    assert train.classes == [str(d) for d in range(10)]
    few = open_source("digits", limit=20)
    assert len(few) == len(few.labels) == 20


def test_flat_folder(tmp_path: Path) -> None:
    fill(tmp_path, ["b.png", "a.PNG", "c.jpeg"])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"a resource fork")
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.PNG", "b.png", "c.jpeg"]
    assert source.labels is None
    assert values(source) == [1, 0, 2]
    assert pickle.loads(pickle.dumps(source)).paths == source.paths


def test_nested_folder_has_no_labels(tmp_path: Path) -> None:
    fill(tmp_path, ["x/y/1.png", "x/2.png", "3.png", ".hidden/4.png"])
    source = open_source(str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == ["3.png", "x/2.png", "x/y/1.png"]
    assert source.labels is None
    assert source.classes is None


def test_class_folders_are_labels(tmp_path: Path) -> None:
    fill(tmp_path, ["dog/1.png", "cat/1.png", "cat/2.png"])
    source = open_source(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int64


def test_one_folder_is_not_a_class(tmp_path: Path) -> None:
    fill(tmp_path, ["images/1.png", "images/2.png"])
    assert open_source(tmp_path).labels is None


@pytest.mark.parametrize("name", ["test", "val"])
def test_split_folders_number_classes_alike(tmp_path: Path, name: str) -> None:
    fill(tmp_path, ["train/ant/1.png", "train/bee/1.png", "train/cow/1.png", f"{name}/bee/1.png", f"{name}/cow/2.png"])
    train, test = open_source(tmp_path), open_source(tmp_path, split="test")
    assert train.classes == test.classes == ["ant", "bee", "cow"]
    assert train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [1, 2]
    assert test.name(0) == "bee/1.png"


def test_limit_of_a_folder_meets_every_class(tmp_path: Path) -> None:
    fill(tmp_path, [f"{c}/{i}.png" for c in "abc" for i in range(4)])
    source = open_source(tmp_path, limit=6)
    assert len(source) == 6
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_links_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "real", ["1.png"])
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "data" / "linked")
    os.symlink(tmp_path / "data", tmp_path / "real" / "loop")
    assert open_source(tmp_path / "data").paths == ["linked/1.png"]


MEMBERS = [
    ("dir/one.jpg", png(10)),
    ("dir/one.cls", b"3"),
    ("dir/two.cls", b" 1\n"),
    ("dir/two.png", png(11)),
    ("dir/two.json", b"{}"),
    ("three.webp", png(12)),
    ("three.cls", b"7"),
]


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_shards(tmp_path: Path, suffix: str, mode: str) -> None:
    write_tar(tmp_path / f"train-0{suffix}", MEMBERS, mode)
    write_tar(tmp_path / f"train-1{suffix}", [("one.png", png(20)), ("one.cls", b"9")], mode)
    write_tar(tmp_path / f"test-0{suffix}", [("one.png", png(30)), ("one.cls", b"5")], mode)
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert values(source) == [10, 11, 12, 20]
    assert source.labels.tolist() == [3, 1, 7, 9]
    assert source.name(1) == f"train-0{suffix}/dir/two.png"
    assert values(open_source(tmp_path, split="test")) == [30]
    assert values(open_source(f"{tmp_path}/train-1*")) == [20]
    assert values(open_source(tmp_path / f"train-1{suffix}")) == [20]
    few = open_source(tmp_path, limit=3)
    assert values(few) == [10, 11, 12]
    assert few.labels.tolist() == [3, 1, 7]


def test_shards_in_split_folders(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("val", 2)):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "000.tar", [("a.png", png(value))])
    assert values(open_source(tmp_path)) == [1]
    assert values(open_source(tmp_path, split="test")) == [2]


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(png(4))
    source = open_source(tmp_path)
    assert source.name(0).encode() == "caf\ufffd.png".encode()
    assert values(source) == [4]


def test_shards_without_all_labels_have_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "photos.tar", MEMBERS[:-1])
    source = open_source(tmp_path)
    assert len(source) == 3
    assert source.labels is None


def test_broken_member_is_a_failure_and_not_the_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", b"rubbish"), ("y.jpg", b""), ("z.jpg", png(1))])
    source = open_source(tmp_path)
    for i, name in enumerate(("x", "y")):
        with pytest.raises(UndecodableImage, match=rf"a\.tar/{name}\.jpg"):
            source.read(i)
    assert np.asarray(source.read(2))[0, 0, 0] == 1


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", MEMBERS)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"shard .*a\.tar.* is damaged"):
        open_source(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole)[:300])
    with pytest.raises(ValueError, match=r"shard .*b\.tar\.gz.* is damaged"):
        open_source(tmp_path)


def test_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", png(1)), ("x.cls", b"cat")])
    with pytest.raises(ValueError, match=r"a\.tar/x\.cls: got .*; allowed: one integer"):
        open_source(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no image file below"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="allowed: 'digits'"):
        open_source(tmp_path / "absent")
    fill(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="split 'test' needs"):
        open_source(tmp_path, split="test")
    with pytest.raises(ValueError, match="split: got"):
        open_source(tmp_path, split="dev")
    with pytest.raises(ValueError, match="limit: got"):
        open_source(tmp_path, limit=0)


def test_reader_decodes_once_and_survives_pickling(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(3)])
    reader = ImageReader(open_source(tmp_path), 3)
    before = [np.asarray(reader(i)) for i in range(3)]
    again = pickle.loads(pickle.dumps(reader))
    for path in tmp_path.iterdir():
        path.unlink()
    assert all(np.array_equal(np.asarray(reader(i)), a) for i, a in enumerate(before))
    with pytest.raises(UndecodableImage):
        again(0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize(
    ("name", "counts", "size"), [("mednist", (3000, 600), (64, 64)), ("clothing10", (500, 372), None)]
)
def test_shared_shards(name: str, counts: tuple[int, int], size: tuple[int, int] | None) -> None:
    for split, count in zip(("train", "test"), counts, strict=True):
        source = open_source(SHARED / name, split=split)
        assert len(source) == count
        assert len(np.unique(source.labels)) == (6 if name == "mednist" else 10)
        image = source.read(count // 2)
        assert size is None or image.size == size
