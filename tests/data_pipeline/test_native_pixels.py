"""Image files to the patches of a grid: a resized picture, cut as transformers cuts it."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.siglip2 import image_processing_pil_siglip2 as siglip2

from data_pipeline import decode
from data_pipeline.decode import image_patches
from data_pipeline.errors import InputError
from data_pipeline.processor.native_shapes_tokenflex import patch_grid
from tests.data_pipeline.pictures import decode_rgb
from tests.data_pipeline.test_decode import jpeg, photo, picture

PATCH = 16


def expected_patches(data: bytes, grid: tuple[int, int]) -> np.ndarray:
    """Pillow decodes, turns and resizes; transformers cuts."""
    rows, columns = grid
    size = (columns * PATCH, rows * PATCH)
    resized = np.asarray(decode_rgb(data).resize(size, Image.Resampling.BICUBIC))
    return siglip2.convert_image_to_patches(resized.transpose(2, 0, 1), PATCH)


@pytest.mark.parametrize("size", [(61, 47), (1, 1), (30, 400), (333, 257)])
def test_patches_are_those_of_the_resized_picture(size: tuple[int, int]) -> None:
    data = jpeg(picture(*size))
    grid = patch_grid(size[1], size[0], PATCH, 200, 8)
    found = image_patches(data, size, grid, PATCH, reduced=False)
    assert found.shape == (grid[0] * grid[1], PATCH**2 * 3) and found.dtype == np.uint8
    assert np.array_equal(found, expected_patches(data, grid))
    room = np.zeros((len(found) + 2, found.shape[1]), np.uint8)
    assert image_patches(data, size, grid, PATCH, reduced=False, out=room[1:-1]).base is not None
    assert np.array_equal(room[1:-1], found) and not room[0].any() and not room[-1].any()


def test_a_turned_photograph_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(picture(64, 32), exif=exif)
    found = image_patches(data, (32, 64), (4, 2), PATCH, reduced=False)
    assert np.array_equal(found, expected_patches(data, (4, 2)))
    with pytest.raises(InputError, match="32 x 64 pixels where the index has 64 x 32"):
        image_patches(data, (64, 32), (2, 4), PATCH)


def test_a_large_photograph_is_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    data, grid = photo("china.jpg"), patch_grid(427, 640, PATCH, 64, 64)
    factors: list[int] = []
    turbo = decode._decode_turbo

    def record(data: bytes, image: Image.Image, factor: int) -> np.ndarray | None:
        factors.append(factor)
        return turbo(data, image, factor)

    monkeypatch.setattr(decode, "_decode_turbo", record)
    whole = image_patches(data, (640, 427), grid, PATCH, reduced=False).astype(int)
    for resample in ("pillow", "torch"):
        found = image_patches(data, (640, 427), grid, PATCH, resample=resample)
        assert np.abs(found - whole).mean() < 3
    # 9 x 7 patches of 16 are 144 x 112 pixels: twice that, and a quarter more, is in 640 x 427.
    assert grid == (7, 9) and factors == [1, 2, 2]
