"""One walk: links are followed, what is passed over is counted."""

from pathlib import Path

import pytest

from data_pipeline.walk import is_left_behind, walk


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "root" / "a.jpg")
    touch(tmp_path / "elsewhere" / "deep" / "b.jpg")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "deep" / "b.jpg")
    (tmp_path / "root" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    files, passed = walk(tmp_path / "root", lambda path: path.suffix == ".jpg")
    names = [path.relative_to(tmp_path / "root").as_posix() for path in files]
    assert names == ["a.jpg", "again/deep/b.jpg", "c.jpg"]
    assert passed.to_json() == {"broken links": ["gone.jpg"]}


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    for name in (
        *("a.jpg", "b.JPG", "c.svg", "d/e.svg", "d/f", ".hidden.jpg", "Thumbs.db"),
        *("__MACOSX/a.jpg", "d/.ipynb_checkpoints/a.jpg", "@eaDir/deep/a.jpg"),
    ):
        touch(tmp_path / name)
    files, passed = walk(tmp_path, lambda path: path.suffix.lower() == ".jpg")
    assert [path.name for path in files] == ["a.jpg", "b.JPG"]
    assert passed.suffixes == {".jpg": 4, ".svg": 2, ".db": 1, "no suffix": 1}
    assert passed.folders["d"] == 2 and passed.folders["@eaDir/deep"] == 1


@pytest.mark.parametrize("folder", ["__MACOSX", "a/.git/b", "@eaDir"])
def test_left_behind(folder: str) -> None:
    assert is_left_behind(folder)
    assert not is_left_behind("./a/../b.c")
