"""A folder of images with their captions in text or JSON files beside them."""

from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.captions import caption_messages, caption_of_json, caption_of_text
from data_pipeline.errors import InputError
from data_pipeline.prepare.convert import Candidate, Sample, convert, member_suffix
from data_pipeline.prepare.shard_writer import ShardLimits

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif")
)


def prepare_folder(
    source: Path, out: Path, *, limits: ShardLimits | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Convert a folder of captioned images, subfolders included, into shards in `out`.

    The caption of photo.jpg is in photo.txt, or in photo.json as {"caption": "..."}. It becomes
    the assistant's answer to "Describe the image.". Images without a caption are skipped and
    reported. Returns the report.

    Raises:
        InputError: no such folder, nothing usable in it, or `out` may not be written.
    """
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; expected one with images and captions.")
    paths = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not paths:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"no image in {source}; files are taken by their suffix: {known}")
    return convert(
        (Candidate(str(path), partial(_build, path, source)) for path in paths),
        out,
        total=len(paths),
        sources=(source,),
        limits=limits or ShardLimits(),
        overwrite=overwrite,
        settings={"format": "folder", "source": str(source)},
    )


def _build(path: Path, folder: Path) -> Sample:
    suffix = member_suffix(0, path)
    name = str(path.relative_to(folder).with_suffix(""))
    return Sample(name, caption_messages(suffix, _caption(path)), {suffix: path})


def _caption(image: Path) -> str:
    text_file, json_file = image.with_suffix(".txt"), image.with_suffix(".json")
    source = text_file if text_file.is_file() else json_file
    if not source.is_file():
        raise InputError(f"no caption: neither {text_file.name} nor {json_file.name} is there")
    try:
        data = source.read_bytes()
        return caption_of_text(data) if source == text_file else caption_of_json(data)
    except (OSError, InputError) as error:
        raise InputError(f"the caption file {source.name} cannot be read: {error}") from error
