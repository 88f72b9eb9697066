"""One file gives one picture, in whatever form it is handed to the processor."""

import base64
import functools
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.tiling import TilingSettings
from tests.data_pipeline.image_files import png_header
from tests.data_pipeline.pictures import cut_tiles, decode_rgb
from tests.training.tiny import TILE, make_processor, picture
from training.model import TokenFlexProcessor

TILING = TilingSettings(tile_size=TILE, max_tiles=4)
ONE = picture(0, 20, 20)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TokenFlexProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and the URL that it is served at."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def transparent() -> Image.Image:
    image = picture(6).convert("RGBA")
    image.putalpha(picture(7).convert("L"))
    return image


RAMP = np.linspace(0, 65535, 30 * 40).reshape(30, 40)
FILES = {
    "jpeg": encode(picture(1, 90, 30), "JPEG"),
    **{
        f"orientation-{i}": encode(picture(1, 61, 30), "JPEG", exif=exif(i))
        for i in (1, 2, 3, 6, 7)
    },
    "png-orientation": encode(picture(1, 61, 30), "PNG", exif=exif(8)),
    "tiff-orientation": encode(picture(1, 61, 30), "TIFF", exif=exif(6)),
    "transparent": encode(transparent(), "PNG"),
    "palette": encode(picture(1).convert("P"), "GIF"),
    "palette-transparent": encode(transparent().quantize(16), "PNG"),
    "grey": encode(picture(1).convert("L"), "PNG"),
    "grey-alpha": encode(transparent().convert("LA"), "PNG"),
    "grey-16": encode(Image.fromarray(RAMP.astype(np.uint16)), "PNG"),
    "grey-float": encode(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    "one-bit": encode(picture(1).convert("1"), "PNG"),
    "cmyk": encode(picture(1).convert("CMYK"), "JPEG"),
    "tall": encode(picture(1, 10, 70), "PNG"),
    "webp": encode(picture(1, 50, 50), "WEBP"),
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def pixels(processor: TokenFlexProcessor, image: Any, **settings: Any) -> np.ndarray:
    return processor.image_processor(image, **settings)["pixel_values"]


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_a_file_has_the_pixels_of_training(processor, server, tmp_path, name):
    data = FILES[name]
    upright = np.array(decode_rgb(data))
    expected = cut_tiles(decode_rgb(data), TILING)
    path = tmp_path / "an image #1%20.png"
    path.write_bytes(data)
    folder, url = server
    (folder / "ü 1.png").write_bytes(data)
    packed = base64.b64encode(data).decode()
    forms = {
        "path": path,
        "string": str(path),
        "file url": path.as_uri(),
        "url": f"{url}/ü 1.png?size=1",
        "bytes": data,
        "bytearray": bytearray(data),
        "open file": io.BytesIO(data),
        "row": {"bytes": data, "path": None},
        "row with a path": {"bytes": None, "path": str(path)},
        "data uri": f"data:image/png;base64,{packed}",
        "data uri without a kind": f"data:image;base64,{packed}",
        "data uri in percent": "data:," + "".join(f"%{byte:02x}" for byte in data),
        "base64": packed,
        "base64 in lines": base64.encodebytes(data).decode(),
        "base64 for urls": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "PIL": Image.open(path),
        "PIL, turned": Image.fromarray(upright),
        "array": upright,
        "tensor": torch.from_numpy(upright),
        "four dimensions": upright[None],
    }
    for form, image in forms.items():
        assert np.array_equal(pixels(processor, image), expected), form
    inputs = processor(images=str(path), text="<image>", num_image_tokens=4)
    assert inputs["pixel_values"].dtype == torch.uint8
    assert np.array_equal(inputs["pixel_values"], expected)
    assert inputs["tile_sides"].tolist() == [2] * len(expected)


STORED = ["transparent", "grey", "grey-alpha", "grey-16", "grey-float", "one-bit"]


@pytest.mark.parametrize("name", STORED)
def test_the_array_that_pillow_makes_of_a_file_is_read_as_the_file(processor, name):
    array = np.array(Image.open(io.BytesIO(FILES[name])))
    expected = pixels(processor, FILES[name])
    assert np.array_equal(pixels(processor, array), expected)
    if array.dtype == np.float32:
        assert np.array_equal(pixels(processor, torch.from_numpy(array).double()), expected)


def test_arrays_in_either_order_in_floats_and_in_four_dimensions(processor):
    array = np.array(picture(2))
    expected = pixels(processor, picture(2))
    unit = torch.from_numpy(array).permute(2, 0, 1) / 255
    forms = (array, array.transpose(2, 0, 1), torch.from_numpy(array), unit, unit.double().numpy(),
             unit + 4e-4, array.astype(np.float32), array.astype(np.int64),
             array.astype(np.uint16) << 8)  # fmt: skip
    for image in forms:
        assert np.array_equal(pixels(processor, image), expected)
    half = pixels(processor, unit.bfloat16()).astype(int) - expected  # 8 bit of mantissa
    assert abs(half).max() <= 2
    grey = pixels(processor, picture(2).convert("L"))
    for image in (array_grey := np.array(picture(2).convert("L")), array_grey[..., None]):
        assert np.array_equal(pixels(processor, image), grey)
    several = torch.stack([unit, unit.flip(2)])
    both = [picture(2), picture(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    found = processor.image_processor(several)
    assert np.array_equal(found["pixel_values"], pixels(processor, both))
    assert found["num_tiles"].tolist() == [len(expected)] * 2
    inputs = processor(images=several, text=["<image>", "<image>"], num_image_tokens=[1, 4])
    assert inputs["tile_sides"].tolist() == [1] * len(expected) + [2] * len(expected)


@pytest.mark.parametrize("shape", [(3, 9, 3), (1, 9, 3), (4, 20, 4), (3, 30, 1), (3, 3, 3)])
def test_an_array_that_may_be_either_order_is_not_guessed(processor, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for image in (array, torch.from_numpy(array)):
        with pytest.raises(ValueError, match=r"images\[0\].* first or last; .*input_data_format="):
            pixels(processor, image)
    last = array[..., 0] if shape[2] == 1 else array
    first = array[0] if shape[0] == 1 else array.transpose(1, 2, 0)
    for order, channels in (("channels_last", last), ("channels_first", first)):
        expected = pixels(processor, Image.fromarray(np.ascontiguousarray(channels)))
        inputs = processor(images=array, text="<image>", input_data_format=order)
        assert np.array_equal(inputs["pixel_values"], expected)


TRUNCATED = FILES["jpeg"][: len(FILES["jpeg"]) // 2]


@pytest.mark.parametrize("data", [b"", b"no image at all", TRUNCATED, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
@pytest.mark.parametrize("below", ["", "a-long-name/" * 20])
def test_a_file_that_is_no_image_is_named(processor, tmp_path, data, below):
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / below / "file.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"images\[1\] .*file\.jpg"):
        processor(images=[ONE, str(tmp_path / below / "file.jpg")], text="<image><image>")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_would_fill_the_memory_is_refused(processor, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(10_000, 10_000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    for image in (path, Image.open(path)):
        with pytest.raises(ValueError, match=r"images\[0\] .*10000 x 10000 pixels are more than"):
            processor(images=image, text="<image>")


PACKED = base64.b64encode(FILES["jpeg"]).decode()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64", "data URI .*comma"),
        ("data:image/png;base64,@@@@", "base64 is damaged"),
        ("nowhere", "'nowhere' .*no such file"),
        ("/data/images/" + "a" * 99, "no such file"),
        ("file:///nowhere.png", "'file:///nowhere.png' .*No such file"),
        ("file://host/a.png", "file:///"),
        ("http://127.0.0.1:9/a.png?key=secret", "'http://127.0.0.1:9/a.png' .*refused"),
        (np.full((5, 5, 3), 1.5) * -1, "-1.5 to -1.5; give 0 to 255"),
        (np.full((5, 5, 3), np.nan), "nan"),
        (np.zeros((5, 5, 5), np.uint8), "without 1 to 4 channels"),
        (np.zeros((5,), np.uint8), r"\(5,\)"),
        ({"path": None}, "dict"),
    ],
)
def test_what_is_no_image_is_said(processor, image, message):
    with pytest.raises(ValueError, match=rf"images\[0\] .*{message}") as error:
        pixels(processor, image)
    assert "secret" not in str(error.value)


def test_a_url_that_is_not_there_says_the_servers_answer(processor, server):
    with pytest.raises(ValueError, match=r"/none\.png' .*404"):
        pixels(processor, f"{server[1]}/none.png?signature=1")


LONG = "iVBORw0KGgo" + "QUJD" * 100_000  # begins as a PNG does


@pytest.mark.parametrize(
    "call",
    [
        {"images": LONG},
        {"images": f"data:image/png;base64,{LONG}"},
        {"images": f"data:image/png;base64,{LONG}@"},
        {"images": LONG + "."},
        {"images": "http://127.0.0.1:9/" + LONG},
        {"images": LONG.encode()},
        {"images": {"bytes": LONG.encode()}},
        {"videos": [f"data:video/mp4;base64,{LONG}"]},
        {"audio": LONG},
        {"num_image_tokens": LONG},
        {"num_image_tokens": [4] * 10_000},
    ],
)
def test_no_message_repeats_the_data(processor, call):
    with pytest.raises(ValueError) as error:
        processor(**{"images": ONE, "text": "<image>", **call})
    assert len(str(error.value)) < 600
