"""Files of every kind, whole and broken, become 8-bit RGB or grey, or an error that names them."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsv.data import FolderSource, UndecodableImage, to_channels
from hsv.data.cache import read_image
from hsv.data.decode import decode

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes, min_side: int | None = None) -> Image.Image:
    return decode(io.BytesIO(data), "x", min_side)


def pixels(image: Image.Image | np.ndarray, channels: int = 3) -> np.ndarray:
    return np.asarray(to_channels(image, channels))


def photo_bytes(kind: str = "JPEG", size: tuple[int, int] = (64, 48)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), kind)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a letter, not a picture", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (photo_bytes()[:-400], "truncated"),
        (photo_bytes()[:300], ""),
        (photo_bytes("PNG")[:-500], ""),
        (photo_bytes("PNG").replace(b"IDAT", b"IDAT\0", 1), ""),
        (photo_bytes("TIFF")[:200], ""),
        (photo_bytes("WEBP")[:100], ""),
        (b"GIF89a", ""),
    ],
)
def test_broken_files_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableImage) as caught:
        decode(io.BytesIO(data), "somewhere/broken.jpg")
    assert caught.value.name == "somewhere/broken.jpg"
    assert reason in caught.value.reason
    assert 0 < len(caught.value.reason) <= 200
    assert "0x" not in caught.value.reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.reason) == (caught.value.name, caught.value.reason)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20000, 10000), (10000, 9500)])
def test_decompression_bombs_are_failures(size: tuple[int, int]) -> None:
    with pytest.raises(UndecodableImage, match=r"limit of \d+"):
        opened(encode(Image.new("1", size), "PNG"))


def test_missing_file_is_a_failure(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UndecodableImage, match=r"a\.png.*No such file"):
        read_image(source, 0, 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_common_formats(kind: str) -> None:
    smooth = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    data = encode(Image.fromarray(smooth), kind, **({"quality": 95} if kind in ("WEBP", "JPEG") else {}))
    found = pixels(opened(data))
    assert found.shape == (16, 16, 3)
    assert np.abs(found.astype(int) - smooth).max() <= 6


def test_grey_is_replicated_and_colour_becomes_luminance() -> None:
    grey = Image.fromarray(RAMP)
    assert np.array_equal(pixels(grey), np.repeat(RAMP[..., None], 3, axis=2))
    assert np.array_equal(pixels(grey, 1), RAMP)
    expected = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(Image.fromarray(COLOURS), 1) - expected).max() <= 1


def test_arrays() -> None:
    assert np.array_equal(pixels(COLOURS), COLOURS)
    assert np.array_equal(pixels(RAMP[..., None], 1), RAMP)
    for wrong in (RAMP.astype(np.float32), COLOURS[..., :2]):
        with pytest.raises(ValueError, match=r"image: got .*; allowed: uint8"):
            to_channels(wrong, 3)
    with pytest.raises(ValueError, match=r"channels: got .*; allowed: 1"):
        to_channels(COLOURS, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    colour = (10, 20, 30) if mode == "RGBA" else (10,)
    for x, alpha in enumerate((0, 255, 128)):
        image.putpixel((x, 0), (*colour, alpha))
    found = pixels(opened(encode(image, "PNG")))[0].astype(int)
    solid = np.resize(colour, 3)
    assert np.array_equal(found[0], [255, 255, 255])
    assert np.array_equal(found[1], solid)
    assert np.abs(found[2] - (255 * 127 + solid * 128) / 255).max() <= 1


def test_palette_with_and_without_transparency() -> None:
    image = Image.fromarray(COLOURS).quantize(16)
    plain = pixels(opened(encode(image, "PNG")))
    assert np.array_equal(plain, np.asarray(image.convert("RGB")))
    clear = pixels(opened(encode(image, "PNG", transparency=0)))
    hidden = np.asarray(image) == 0
    assert hidden.any()
    assert (clear[hidden] == 255).all()
    assert np.array_equal(clear[~hidden], plain[~hidden])


@pytest.mark.parametrize(("mode", "clear"), [("L", 5), ("RGB", (5, 240, 35)), ("1", 0)])
def test_a_colour_that_counts_as_transparent_lies_over_white(mode: str, clear: int | tuple[int, int, int]) -> None:
    image = Image.fromarray(COLOURS if mode == "RGB" else RAMP).convert(mode, dither=Image.Dither.NONE)
    if mode == "RGB":
        image.putpixel((1, 0), clear)
    hidden = np.asarray(image.convert("RGB")) == np.asarray(Image.new(mode, (1, 1), clear).convert("RGB"))
    hidden = hidden.all(-1)
    found = pixels(opened(encode(image, "PNG", transparency=clear)))
    assert 0 < hidden.sum() < hidden.size
    assert (found[hidden] == 255).all()
    assert np.array_equal(found[~hidden], np.asarray(image.convert("RGB"))[~hidden])


def test_one_bit() -> None:
    image = Image.fromarray(RAMP > 100)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(opened(encode(image, kind)), 1), (RAMP > 100) * 255)


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # full magenta and yellow: red
    for kind in ("TIFF", "JPEG"):
        red, green, blue = pixels(opened(encode(image, kind)))[8, 8].astype(int)
        assert red > 200
        assert max(green, blue) < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    found = pixels(opened(encode(Image.fromarray(values), kind)))
    assert np.array_equal(found[0, :, 0], [0, 1, 128, 255])


def test_sixteen_bit_dark_images_stay_dark() -> None:
    values = np.full((2, 2), 514, dtype=np.uint16)
    assert (pixels(opened(encode(Image.fromarray(values), "PNG")), 1) == 2).all()


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floating_point_is_scaled(top: float) -> None:
    values = np.array([[0, 0.5, 1.0, np.nan, -1]], dtype=np.float32) * np.float32(top)
    found = pixels(opened(encode(Image.fromarray(values), "TIFF")), 1)
    assert np.array_equal(found[0], [0, 128, 255, 0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    found = pixels(opened(encode(Image.fromarray(COLOURS), "PNG", exif=exif)))
    assert np.array_equal(found, turn(COLOURS))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(Image.new("RGB", (16, 16), (200, 0, 0)), "JPEG")
    block = b"Exif\0\0II*\0\xff\xff\xff\xff garbage"
    data = data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    assert pixels(opened(data)).shape == (16, 16, 3)


def test_reduced_decoding_keeps_the_side() -> None:
    data = photo_bytes(size=(640, 480))
    assert opened(data).size == (640, 480)
    for side in (60, 100, 239, 240, 241, 500):
        image = opened(data, min_side=side)
        assert min(image.size) >= min(side, 480)
        assert abs(image.width / image.height - 4 / 3) < 0.05
    assert opened(data, min_side=60).size == (80, 60)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "TIFF", "WEBP"])
def test_orientation_of_files_in_a_folder(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 8))]} if kind == "MPO" else {}
    half = np.zeros((8, 16, 3), dtype=np.uint8)
    half[:, :8] = 255  # the left half is white: after a quarter turn clockwise the upper one
    suffix = "jpg" if kind == "MPO" else kind.lower()
    Image.fromarray(half).save(tmp_path / f"a.{suffix}", kind, exif=exif, **more)
    found = np.asarray(read_image(FolderSource(tmp_path), 0, 1, min_side=8))
    assert found.shape == (16, 8)
    assert found[:6].min() > 240
    assert found[-6:].max() < 15
