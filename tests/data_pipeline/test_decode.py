"""Tiles straight from the file: the pixels are Pillow's, damage is refused, reduction is close."""

import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import sklearn.datasets
from PIL import Image

from data_pipeline import decode
from data_pipeline.decode import image_tiles
from data_pipeline.errors import InputError
from data_pipeline.tiling import TilingSettings, grid_for, num_tiles
from tests.data_pipeline.pictures import cut_tiles, decode_rgb

TILING = TilingSettings(tile_size=32, max_tiles=6)
SIZES = [(64, 64), (61, 47), (1, 1), (3, 200), (333, 257), (7, 7)]
PHOTOS = Path(sklearn.datasets.__file__).parent / "images"


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with noise on them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(256, size=(height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def photo(name: str) -> bytes:
    return (PHOTOS / name).read_bytes()


@pytest.fixture
def no_pillow_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("Pillow decoded"))


@pytest.fixture
def no_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "simplejpeg", None)


def turbo_pixels(data: bytes, factor: int = 1) -> np.ndarray | None:
    with decode.open_image(data) as image:
        return decode._decode_turbo(data, image, factor)


@pytest.mark.parametrize("quality", [30, 90, 97])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey", "stored as RGB"])
def test_turbo_gives_pillows_pixels(subsampling: str, progressive: bool, quality: int) -> None:
    options: dict[str, object] = {"quality": quality, "progressive": progressive}
    if subsampling == "stored as RGB":
        options["keep_rgb"] = True
    elif subsampling != "grey":
        options["subsampling"] = subsampling
    for size in SIZES:
        data = jpeg(picture(*size).convert("L" if subsampling == "grey" else "RGB"), **options)
        np.testing.assert_array_equal(turbo_pixels(data), np.asarray(decode_rgb(data)))


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_turbo_gives_pillows_pixels_of_rare_subsamplings(subsampling: str) -> None:
    for size in SIZES:
        pixels = np.ascontiguousarray(np.asarray(picture(*size)))
        data = simplejpeg.encode_jpeg(pixels, colorsubsampling=subsampling)
        np.testing.assert_array_equal(turbo_pixels(data), np.asarray(decode_rgb(data)))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_turbo_gives_pillows_pixels_when_reduced(subsampling: str, factor: int) -> None:
    for size in ((640, 480), (641, 479), (1000, 333)):
        data = jpeg(picture(*size), subsampling=subsampling)
        image = Image.open(BytesIO(data))
        image.draft(None, (size[0] // factor, size[1] // factor))
        assert image.size == (-(-size[0] // factor), -(-size[1] // factor))
        np.testing.assert_array_equal(turbo_pixels(data, factor), np.asarray(image))


def test_cmyk_is_left_to_pillow() -> None:
    data = jpeg(picture(80, 60).convert("CMYK"))
    assert turbo_pixels(data) is None
    expected = cut_tiles(decode_rgb(data), TILING)
    np.testing.assert_array_equal(image_tiles(data, (80, 60), TILING), expected)


@pytest.mark.usefixtures("no_pillow_decoding")
@pytest.mark.parametrize("orientation", range(9))
def test_tiles_of_a_jpeg_are_those_of_pillow(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = jpeg(picture(133, 70), exif=exif)
    size = (70, 133) if orientation >= 5 else (133, 70)
    tiles = image_tiles(data, size, TILING, reduced=False)
    monkeypatch.undo()
    np.testing.assert_array_equal(tiles, cut_tiles(decode_rgb(data), TILING))
    assert len(tiles) == num_tiles(*size, TILING)


def test_a_jpeg_of_several_pictures_gives_its_first() -> None:
    """As telephones write them, with a depth map or a second exposure behind the photograph."""
    buffer = BytesIO()
    picture(90, 60).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    data = buffer.getvalue()
    assert Image.open(BytesIO(data)).format == "MPO"
    np.testing.assert_array_equal(turbo_pixels(data), np.asarray(decode_rgb(data)))
    expected = cut_tiles(decode_rgb(data), TILING)
    np.testing.assert_array_equal(image_tiles(data, (90, 60), TILING), expected)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF"])
def test_tiles_of_other_formats(format: str) -> None:
    buffer = BytesIO()
    picture(700, 500).save(buffer, format)
    expected = cut_tiles(decode_rgb(buffer.getvalue()), TILING)
    np.testing.assert_array_equal(image_tiles(buffer.getvalue(), None, TILING), expected)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_without_simplejpeg_the_tiles_are_the_same(
    name: str, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = image_tiles(photo(name), None, TILING, reduced)
    monkeypatch.setattr(decode, "simplejpeg", None)
    np.testing.assert_array_equal(image_tiles(photo(name), None, TILING, reduced), tiles)


def test_another_size_than_the_indexs_is_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(picture(133, 70), exif=exif)
    assert len(image_tiles(data, (70, 133), TILING))
    with pytest.raises(InputError, match=r"70 x 133 .*index has 133 x 70"):
        image_tiles(data, (133, 70), TILING)


@pytest.mark.usefixtures("no_pillow_decoding")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: pytest.fail("decoded"))
    data = jpeg(picture(16, 16)).replace(b"\x00\x10\x00\x10\x03", b"\x27\x10\x27\x10\x03")
    with pytest.raises(InputError, match=r"10000 x 10000 .*limit"):
        image_tiles(data, None, TILING)


KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "with restart markers": {"restart_marker_blocks": 4},
    "grey": {"mode": "L"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(90, 60), (400, 300)], ids=["full", "reduced"])
def test_a_truncated_jpeg_is_refused_wherever_it_ends(size: tuple[int, int], kind: str) -> None:
    options = dict(KINDS[kind])
    image = picture(*size).convert(options.pop("mode", "RGB"))
    data = jpeg(image, quality=40, **options)
    for length in (*range(0, len(data), 41), len(data) - 2, len(data) - 1):
        with pytest.raises(InputError):
            image_tiles(data[:length], size, TILING)
    assert len(image_tiles(data, size, TILING))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_that_libjpeg_only_warns_of_is_refused(kind: str) -> None:
    """Damage may happen to be a picture; what is not refused is what Pillow makes of it."""
    options = dict(KINDS[kind])
    data = jpeg(picture(200, 150).convert(options.pop("mode", "RGB")), **options)
    refused = 0
    for place in range(len(data) // 4, len(data) - 100, len(data) // 60):
        bad = data[:place] + bytes(20) + data[place + 20 :]
        try:
            tiles = image_tiles(bad, None, TILING)
        except InputError as error:
            refused += str(error).startswith("damaged or truncated image file: Corrupt JPEG data")
        else:
            np.testing.assert_array_equal(tiles, cut_tiles(decode_rgb(bad), TILING))
    assert refused >= 10


def test_what_lies_behind_the_picture_is_no_damage() -> None:
    data = jpeg(picture(90, 60))
    expected = image_tiles(data, None, TILING)
    np.testing.assert_array_equal(image_tiles(data + b"junk" * 9, None, TILING), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_what_turbo_cannot_decode_is_left_to_pillow(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ValueError("Unsupported JPEG process")

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(640, 480), exif=exif)
    expected = image_tiles(data, None, TILING)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    np.testing.assert_array_equal(image_tiles(data, None, TILING), expected)


def test_twelve_bits_are_refused() -> None:
    data = jpeg(picture(64, 64)).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    with pytest.raises(InputError):
        image_tiles(data, None, TILING)


# Reduced decoding.


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((239, 160), 1),  # a grid of 3 x 2 tiles of 32, 1.25 times as large, twice: 240 x 160
        ((240, 159), 1),
        ((240, 160), 2),
        ((480, 320), 4),
        ((960, 640), 8),
    ],
)
def test_the_smallest_scale_that_is_large_enough_is_decoded(
    size: tuple[int, int], factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grid_for(*size, TILING) == (3, 2)
    shapes = []
    cut_grid = decode.cut_grid

    def record(pixels: np.ndarray, *args: object, **options: object) -> np.ndarray:
        shapes.append(np.asarray(pixels).shape[:2])
        return cut_grid(pixels, *args, **options)

    monkeypatch.setattr(decode, "cut_grid", record)
    data = jpeg(picture(*size))
    image_tiles(data, size, TILING)
    image_tiles(data, size, TILING, reduced=False)
    assert shapes == [(-(-size[1] // factor), -(-size[0] // factor)), (size[1], size[0])]


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize(
    ("tile_size", "mean", "worst"), [(80, 1.8, 30), (60, 1.1, 20), (40, 1.6, 30), (20, 1.7, 25)]
)
def test_reduced_tiles_are_close_to_those_of_the_full_decode(
    tile_size: int, mean: float, worst: int, name: str, orientation: int
) -> None:
    """Differences of 0..255 on photographs at 1/2, 1/2, 1/4 and 1/8, just above those measured."""
    stored = Image.open(BytesIO(photo(name)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(stored.crop((0, 0, 640, 424)), exif=exif)
    tiling = TilingSettings(tile_size=tile_size, max_tiles=6)
    full = image_tiles(data, None, tiling, reduced=False).astype(int)
    reduced = image_tiles(data, None, tiling)
    difference = np.abs(full - reduced)
    assert 0 < difference.mean() < mean
    assert difference.max() < worst


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_picture_is_not_shifted(orientation: int) -> None:
    """It is reduced only if its size can be divided; else what fills it up would come first."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    tiling = TilingSettings(tile_size=40)
    for rows, reduced in ((424, True), (427, False)):
        data = jpeg(Image.open(BytesIO(photo("china.jpg"))).crop((0, 0, 640, rows)), exif=exif)
        full = image_tiles(data, None, tiling, reduced=False).astype(float)
        difference = np.abs(full - image_tiles(data, None, tiling)).mean()
        assert (difference > 0) == reduced and difference < 1.5


def test_a_reduced_picture_is_not_shifted() -> None:
    """427 rows at 1/8 are 53.4: what fills the 54th up is not part of the picture."""
    data = photo("china.jpg")
    assert Image.open(BytesIO(data)).size == (640, 427)
    tiling = TilingSettings(tile_size=40)
    full = image_tiles(data, None, tiling, reduced=False).astype(float)
    reduced = image_tiles(data, None, tiling)
    assert np.abs(full - reduced).mean() < 1.5
    rounded_up = Image.open(BytesIO(data))
    rounded_up.draft(None, (80, 53))
    stretched = np.asarray(rounded_up.resize((40, 40), Image.Resampling.BICUBIC))
    assert np.abs(full[0] - stretched.transpose(2, 0, 1)).mean() > 2.0


# Other ways to resize, and where to.


@pytest.mark.parametrize("size", [(90, 60), (640, 480), (641, 477), (32, 32), (20, 300)])
def test_torch_resizes_as_pillow_does(size: tuple[int, int]) -> None:
    for data in (jpeg(picture(*size)), jpeg(picture(*size).convert("CMYK"))):
        expected = image_tiles(data, size, TILING).astype(int)
        difference = np.abs(image_tiles(data, size, TILING, resample="torch") - expected)
        assert difference.max() <= 3
        assert difference.mean() < 0.3


def test_torch_leaves_pixels_that_need_no_resizing() -> None:
    buffer = BytesIO()
    picture(64, 64).save(buffer, "PNG")
    tiling = TilingSettings(tile_size=64)
    [tile] = image_tiles(buffer.getvalue(), (64, 64), tiling, resample="torch")
    np.testing.assert_array_equal(tile.transpose(1, 2, 0), np.asarray(picture(64, 64)))


def test_tiles_can_be_written_into_an_array() -> None:
    data = jpeg(picture(133, 70))
    expected = image_tiles(data, None, TILING)
    room = np.zeros((len(expected) + 2, 3, 32, 32), np.uint8)
    assert np.shares_memory(image_tiles(data, None, TILING, out=room[1:-1]), room)
    np.testing.assert_array_equal(room[1:-1], expected)
    assert not room[0].any() and not room[-1].any()


def test_decoding_leaves_other_threads_running() -> None:
    """Each of the steps works without the GIL; else nothing would be counted meanwhile."""
    data = jpeg(picture(1800, 1200))
    tiling = TilingSettings(tile_size=384, max_tiles=6)
    for resample in ("pillow", "torch"):
        thread = threading.Thread(
            target=image_tiles, args=(data, None, tiling), kwargs={"resample": resample}
        )
        thread.start()
        counted = 0
        while thread.is_alive():
            counted += 1
        assert counted > 1000
