"""The loop shared by the formats that convert somebody's files: faulty samples do not end it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.images import image_size
from data_pipeline.prepare.shard_writer import (
    SampleWriter,
    ShardLimits,
    staged_output,
    write_report,
)

# The rest is in prepare.json only.
MAX_PRINTED_FAULTS = 20


@dataclass(frozen=True)
class Sample:
    """One sample to be written.

    name: text the key is made from. messages: the turns. images: for each image part, in the order
    of the parts, which are named "0.png", "1.jpg", ..., the file or what a file would hold.
    metadata: free-form facts kept with the sample.
    """

    name: str
    messages: Sequence[Mapping[str, Any]]
    images: Mapping[str, Path | bytes]
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Unwanted(Exception):
    """Raised by `Candidate.build` for a sample that an option leaves out; the text says which."""


@dataclass(frozen=True)
class Candidate:
    """A sample still to be built; `build` raises `InputError` if it is faulty, or `Unwanted`."""

    label: str
    build: Callable[[], Sample]


def convert(
    candidates: Iterable[Candidate],
    out: Path,
    *,
    total: int | None,
    sources: Sequence[Path],
    limits: ShardLimits,
    overwrite: bool,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write every candidate that can be built to OUT/000000.tar, ...; return the report.

    A faulty one is skipped, counted, and named with the reason on stderr and in prepare.json; an
    unwanted one is counted there under "left_out".

    Args:
        total: number of candidates for the progress bar, None if unknown.
        sources: the inputs, which --overwrite must not delete.
        settings: what goes into the report to name this run.

    Raises:
        InputError: no candidate is usable, or `out` may not be written.
    """
    skipped: list[dict[str, str]] = []
    left_out: Counter[str] = Counter()
    with staged_output(out, overwrite=overwrite, sources=sources) as staged:
        progress = tqdm(candidates, desc=out.name, total=total, unit="sample", disable=None)
        with SampleWriter(staged, limits) as writer:
            for candidate in progress:
                try:
                    sample = candidate.build()
                    images = {name: _read_image(image) for name, image in sample.images.items()}
                    writer.write(sample.name, sample.messages, images, sample.metadata or None)
                except Unwanted as option:
                    left_out[str(option)] += 1
                except InputError as error:
                    skipped.append({"sample": candidate.label, "reason": str(error)})
                    if len(skipped) <= MAX_PRINTED_FAULTS:
                        tqdm.write(f"skipped {candidate.label}: {error}", file=sys.stderr)
        if not writer.num_samples:
            first = (
                f"; the first: {skipped[0]['sample']}: {skipped[0]['reason']}" if skipped else ""
            )
            also = "".join(f", {count} left out by {why}" for why, count in left_out.items())
            raise InputError(
                f"no usable sample in {sources[0]}: {len(skipped)} skipped{also}{first}"
            )
        report = {
            **settings,
            "samples": writer.num_samples,
            "images": writer.num_images,
            **({"left_out": dict(left_out)} if left_out else {}),
            "skipped": skipped,
        }
        write_report(staged, report)
    return report


def member_suffix(number: int, path: Path) -> str:
    """Name of the tar member for a sample's image `number`: "0.jpg" for photo.JPG."""
    extension = path.suffix[1:].lower()
    usable = extension.isascii() and extension.isalnum() and len(extension) <= 8
    return f"{number}.{extension if usable else 'image'}"


def _read_image(image: Path | bytes) -> bytes:
    """The file's bytes, after a look at the header: what cannot be an image stops here."""
    if isinstance(image, bytes):
        image_size(image)
        return image
    try:
        data = image.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"the image {image} cannot be read: {error}") from error
    try:
        image_size(data)
    except InputError as error:
        raise InputError(f"{image}: {error}") from error
    return data
