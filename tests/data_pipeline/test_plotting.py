"""Pictures: written whole, or an error that says what to change."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.plotting import picture


def draw(out: Path) -> None:
    with picture(out, (3, 2), columns=2) as (figure, (left, _)):
        figure.suptitle("two panels")
        left.plot([1, 2], [1, 4])


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "picture.png"
    draw(out)
    assert Image.open(out).size == (360, 240)
    earlier = out.read_bytes()
    with pytest.raises(ValueError, match="half-way"), picture(out, (3, 2)):
        raise ValueError("half-way")
    assert out.read_bytes() == earlier and list(out.parent.iterdir()) == [out]
    assert not plt.get_fignums()  # nothing is left in memory


def test_the_suffix_names_the_format(tmp_path: Path) -> None:
    draw(tmp_path / "picture.svg")
    assert b"<svg" in (tmp_path / "picture.svg").read_bytes()
    with pytest.raises(InputError, match=r"picture.xyz: xyz is not .* any of .*png"):
        draw(tmp_path / "picture.xyz")
    assert not plt.get_fignums()


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file/picture.png: .*another path"):
        draw(tmp_path / "file" / "picture.png")
