"""Image files in every mode come out as correct RGB, and what is broken is refused."""

from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from data_pipeline.errors import InputError
from data_pipeline.images import image_size, open_image
from data_pipeline.processor.picture_tokenflex import FORMATS
from tests.data_pipeline.image_files import png_header
from tests.data_pipeline.pictures import decode_rgb

WHITE = (255, 255, 255)
# EXIF orientation -> how the upright picture is turned into the stored one.
TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth and without any symmetry, so that lossy formats and wrong turns both show."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = np.stack([x, y, (1 - x) * y], axis=-1)
    return Image.fromarray((channels * 255).astype(np.uint8))


def assert_close(image: Image.Image, expected: Image.Image, tolerance: float = 4.0) -> None:
    assert image.mode == "RGB"
    assert image.size == expected.size
    difference = np.asarray(image, dtype=float) - np.asarray(expected.convert("RGB"), dtype=float)
    assert np.abs(difference).mean() <= tolerance


def decode_checked(data: bytes) -> Image.Image:
    """Decode, and check that the header's size is the decoded one."""
    image = decode_rgb(data)
    assert image.mode == "RGB"
    assert image_size(data) == image.size
    return image


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_rgb_in_every_format(format: str) -> None:
    if format not in FORMATS:
        pytest.skip(f"this Pillow has no {format}")
    assert_close(decode_checked(encode(picture(), format)), picture())


def test_grey() -> None:
    grey = picture().convert("L")
    assert_close(decode_checked(encode(grey, "PNG")), grey, 0)


@pytest.mark.parametrize(
    ("mode", "opaque", "shown"),
    [("LA", (40, 255), (40, 40, 40)), ("RGBA", (10, 200, 30, 255), (10, 200, 30))],
)
def test_alpha_is_laid_over_white(mode: str, opaque: tuple, shown: tuple) -> None:
    image = Image.new(mode, (3, 1), opaque)
    image.putpixel((1, 0), (*opaque[:-1], 0))
    image.putpixel((2, 0), (*opaque[:-1], 128))
    decoded = decode_checked(encode(image, "PNG"))
    assert decoded.getpixel((0, 0)) == shown
    assert decoded.getpixel((1, 0)) == WHITE
    half = [round(value * 128 / 255 + 255 * 127 / 255) for value in shown]
    assert decoded.getpixel((2, 0)) == pytest.approx(half, abs=1)


def test_webp_with_alpha() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode_checked(encode(image, "WEBP", lossless=True)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("mode", "color", "transparency"),
    [("1", 0, 0), ("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("P", 5, 5), ("P", 5, b"\xff" * 5)],
)
def test_transparent_color_key(mode: str, color: object, transparency: object) -> None:
    image = Image.new(mode, (4, 4), color)
    if mode == "P":
        image.putpalette([9] * 768)
        if isinstance(transparency, bytes):
            transparency += b"\x00"  # entry 5
    data = encode(image, "PNG", transparency=transparency)
    assert decode_checked(data).getpixel((2, 2)) == WHITE


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    decoded = decode_checked(encode(image, "PNG"))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]


def test_cmyk_jpeg_has_its_colors() -> None:
    # Pillow writes the inverted values that Adobe's programs write, and marks them.
    data = encode(picture().convert("CMYK"), "JPEG", quality=95)
    assert Image.open(BytesIO(data)).mode == "CMYK"
    assert_close(decode_checked(data), picture())


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    decoded = decode_checked(encode(image, "PNG"))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]


@pytest.mark.parametrize(
    ("format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")]
)
def test_16_bit_grey_keeps_its_brightness(format: str, dtype: str) -> None:
    values = np.array([[0, 100, 257 * 100, 257 * 200, 65535]], dtype=dtype)
    decoded = decode_checked(encode(Image.fromarray(values), format))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 100, 200, 255]


def test_dark_16_bit_pgm_stays_dark() -> None:
    data = b"P5 2 1 65535 " + bytes([0, 0, 0, 200])
    assert decode_checked(data).getpixel((1, 0)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 100, 255], [0, 100, 255]),
        (np.int32, [0, 25700, 65535], [0, 100, 255]),
        (np.int32, [-100, 0, 155], [0, 100, 255]),
        (np.int32, [-7, -7, -7], [0, 0, 0]),
        (np.float32, [0.0, 0.2, 1.0], [0, 51, 255]),
        (np.float32, [0.0, 100.0, 255.0], [0, 100, 255]),
        (np.float32, [-1.0, 0.0, 4.0], [0, 51, 255]),
    ],
)
def test_32_bit_tiff(dtype: type, values: list, expected: list) -> None:
    data = encode(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")
    assert np.asarray(decode_checked(data))[0, :, 0].tolist() == expected


def test_not_a_number_is_refused() -> None:
    data = encode(Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)), "TIFF")
    with pytest.raises(InputError, match="not finite"):
        decode_rgb(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if format == "TIFF" else {"exif": exif}
    data = encode(picture(60, 40), format, **options)
    decoded = decode_checked(data)
    assert decoded.size == ((40, 60) if orientation >= 5 else (60, 40))
    assert_close(decoded, ImageOps.exif_transpose(Image.open(BytesIO(data))), 0)
    if orientation > 1:
        decoded = decoded.transpose(TURN_BACK[orientation])
    assert_close(decoded, picture(60, 40))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_senseless_exif_is_ignored() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert_close(decode_checked(data), picture())


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(BytesIO(data)).n_frames == 2
    assert decode_checked(data).getpixel((4, 4)) == pytest.approx((250, 0, 0), abs=6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    for read in (image_size, decode_rgb):
        with pytest.raises(InputError, match="limit of 89478485"):
            read(png_header(side, side))


def test_pixel_limit_is_inclusive() -> None:
    data = encode(picture(60, 40), "PNG")
    assert decode_rgb(data, max_pixels=2400).size == (60, 40)
    with pytest.raises(InputError, match=r"60 x 40 .*limit of 2399"):
        decode_rgb(data, max_pixels=2399)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_file_is_refused(format: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    decode_checked(data)
    with pytest.raises(InputError):
        decode_rgb(data[: int(len(data) * kept)])


@pytest.mark.parametrize("data", [b"", b"hello, this is no image", encode(picture(), "EPS")])
def test_other_files_are_refused(data: bytes) -> None:
    # EPS above all: Pillow would hand it to Ghostscript.
    for read in (image_size, decode_rgb):
        with pytest.raises(InputError, match="not an image"):
            read(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_size_needs_the_header_only(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    data = encode(picture(640, 480), format)
    assert image_size(data[: len(data) // 4]) == (640, 480)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_give_a_picture_or_an_input_error() -> None:
    rng = np.random.default_rng(1)
    files = [encode(picture(), format) for format in ("JPEG", "PNG", "GIF", "TIFF", "BMP")]
    refused = 0
    for number in range(300):
        data = bytearray(files[number % len(files)])
        for place in rng.integers(min(len(data), 400), size=4):
            data[place] = rng.integers(256)
        try:
            image = decode_rgb(bytes(data), max_pixels=1_000_000)
        except InputError:
            refused += 1
        else:
            assert image.size == image_size(bytes(data))
    assert 0 < refused < 300


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_was_turned_does_not_say_so_any_more(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, kind, exif=exif)
    picture = decode_rgb(buffer.getvalue())
    assert picture.size == (4, 8) == ImageOps.exif_transpose(picture).size


LARGE = 3 << 20  # Pillow takes texts and profiles of up to 1 MiB


def png_with(texts: dict[str, str], zip: bool, international: bool = False, **options) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        if international:
            info.add_itxt(name, text, "en", name, zip=zip)
        else:
            info.add_text(name, text, zip=zip)
    file = BytesIO()
    Image.new("RGB", (5, 3), (1, 2, 3)).save(file, "PNG", pnginfo=info, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        png_with({"workflow": "x" * LARGE}, zip=True),
        png_with({"workflow": "x" * LARGE, "seed": "3"}, zip=True, international=True),
        png_with({}, zip=False, icc_profile=bytes(LARGE)),
        png_with({str(i): "x" * 1_000_000 for i in range(70)}, zip=True),
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
def test_large_texts_of_a_png_are_no_damage(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"too large|Too much memory"):
        Image.open(BytesIO(data))
    for image in (decode_rgb(data), decode_rgb(text_after_the_pixels(data))):
        assert image.size == (5, 3) and image.getpixel((4, 2)) == (1, 2, 3)
    assert image_size(data) == (5, 3)


def text_after_the_pixels(data: bytes) -> bytes:
    """A PNG whose first 33 bytes are signature and header, the texts between the rest moved."""
    pixels, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:33] + data[pixels:end] + data[33:pixels] + data[end:]


def test_small_texts_of_a_png_stay() -> None:
    data = png_with({"note": "kept"}, zip=True, icc_profile=b"profile")
    with open_image(data) as image:
        assert image.info["note"] == "kept" and image.info["icc_profile"] == b"profile"


def test_a_kind_of_file_that_pillow_does_not_decode_is_not_called_damaged() -> None:
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "BMP")
    data = bytearray(file.getvalue())
    data[30] = 9  # the compression
    with pytest.raises(InputError, match=r"kind that Pillow does not decode.* PNG or JPEG"):
        decode_rgb(bytes(data))
