"""A folder of images with their captions in text or JSON files beside them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.captions import caption_messages, caption_of_json, caption_of_text
from data_pipeline.chat import check_sample
from data_pipeline.errors import InputError
from data_pipeline.images import has_image_suffix, image_size
from data_pipeline.prepare.convert import Candidate, Conversion, Sample, convert
from data_pipeline.prepare.picture_sources import member_suffix
from data_pipeline.walk import walk

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of the files that hold a caption, the first that is usable counts."""


def prepare_folder(source: Path, out: Path, *, conversion: Conversion) -> dict[str, Any]:
    """Convert a folder of captioned images, subfolders included, into shards in `out`.

    The caption of photo.jpg is in photo.txt, photo.jpg.txt or photo.caption, or in photo.json as
    {"caption": "..."}. It becomes the assistant's answer to "Describe the image.". Images without a
    caption are skipped and reported, files that are neither are counted. Returns the report.

    Raises:
        InputError: no such folder, nothing usable in it, or `out` may not be written.
    """
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; expected one with images and captions.")
    files, passed = walk(source, lambda path: True)
    captions = _Captions(files)
    images = [path for path in files if has_image_suffix(path.name) or captions.is_image(path)]
    read = {file for image in images for file in captions.of(image)}
    for path in sorted({*files} - {*images} - read):
        passed.add(path, source)
    if not images:
        raise InputError(
            f"no image in {source}, among {len(files)} files; an image is known by its suffix, or "
            "by a caption beside it"
        )
    return convert(
        (Candidate(str(path), partial(_build, path, source, captions)) for path in images),
        out,
        total=len(images),
        sources=(source,),
        conversion=conversion,
        settings={"format": "folder", "source": str(source)},
        passed_over=passed,
    )


class _Captions:
    """The caption files of a folder, by the path of the image without its suffix, and with it."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[Path, list[Path]] = {}
        for path in files:
            if path.suffix.lower() in CAPTION_SUFFIXES:
                self._files.setdefault(path.with_suffix(""), []).append(path)

    def of(self, image: Path) -> list[Path]:
        """The files that may hold an image's caption, in the order of `CAPTION_SUFFIXES`."""
        found = [*self._files.get(image.with_suffix(""), ()), *self._files.get(image, ())]
        by_kind = sorted({*found}, key=lambda p: (CAPTION_SUFFIXES.index(p.suffix.lower()), p))
        return [path for path in by_kind if path != image]

    def is_image(self, path: Path) -> bool:
        """Whether a file of another suffix, or none, is an image with a caption beside it."""
        if path.suffix.lower() in CAPTION_SUFFIXES or not self.of(path):
            return False
        try:
            image_size(path.read_bytes())
        except (OSError, InputError):
            return False
        return True


def _build(path: Path, folder: Path, captions: _Captions) -> Sample:
    suffix = member_suffix(0, path)
    messages = caption_messages(suffix, _caption(path, captions.of(path)))
    check_sample(messages)
    return Sample(str(path.relative_to(folder).with_suffix("")), messages, {suffix: path})


def _caption(image: Path, files: list[Path]) -> str:
    """The caption in the first file that has one; InputError with what is wrong with each."""
    problems = []
    for file in files:
        try:
            read = caption_of_json if file.suffix.lower() == ".json" else caption_of_text
            return read(file.read_bytes())
        except (OSError, InputError) as error:
            problems.append(f"the caption file {file.name} cannot be read: {error}")
    names = f"{image.stem}.txt nor {image.stem}.json"
    raise InputError("; ".join(problems) or f"no caption: neither {names} is there")
