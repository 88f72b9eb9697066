"""The loop shared by the formats that convert somebody's files: faulty samples do not end it."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.image_header import read_image_size
from data_pipeline.prepare.shard_writer import (
    REPORT_NAME,
    SampleWriter,
    ShardLimits,
    read_report,
    staged_output,
    write_report,
)
from data_pipeline.walk import PassedOver

# The rest is in prepare.json only.
MAX_PRINTED_FAULTS = 20
# What differs between two faults of one kind: names in quotes, paths, numbers.
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S+|\d+")


@dataclass(frozen=True)
class Conversion:
    """How samples are converted, whatever their format.

    limits: of a shard. overwrite: replace what an earlier run wrote. strict: the first sample that
    cannot be used ends the run. keep: what an earlier run wrote with the same settings stays.
    """

    limits: ShardLimits = field(default_factory=ShardLimits)
    overwrite: bool = False
    strict: bool = False
    keep: bool = False


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
    sources: Sequence[Path | str],
    conversion: Conversion,
    settings: Mapping[str, Any],
    passed_over: PassedOver | None = None,
) -> dict[str, Any]:
    """Write every candidate that can be built to OUT/000000.tar, ...; return the report.

    A faulty one is skipped, counted by reason, and named with it on stderr and in prepare.json; an
    unwanted one is counted there under "left_out".

    Args:
        total: number of candidates for the progress bar, None if unknown.
        sources: the inputs, paths or URLs; --overwrite must not delete them.
        settings: what goes into the report to name this run.
        passed_over: files of the sources that are no candidates.

    Raises:
        InputError: no candidate is usable, one is faulty and `strict`, or `out` may not be written.
    """
    limits = conversion.limits
    settings = {
        **settings,
        "samples_per_shard": limits.samples,
        "shard_bytes": limits.num_bytes,
        **_state_of(sources[0]),
    }
    if conversion.keep and not conversion.overwrite and (out / REPORT_NAME).is_file():
        return _kept(out, settings, conversion.strict)
    skipped: list[dict[str, str]] = []
    left_out: Counter[str] = Counter()
    with staged_output(out, overwrite=conversion.overwrite, sources=sources) as staged:
        progress = tqdm(candidates, desc=out.name, total=total, unit="sample", disable=None)
        with SampleWriter(staged, conversion.limits) as writer:
            for candidate in progress:
                try:
                    sample = candidate.build()
                    images = {name: _read_image(image) for name, image in sample.images.items()}
                    writer.write(sample.name, sample.messages, images, sample.metadata or None)
                except Unwanted as option:
                    left_out[str(option)] += 1
                except InputError as error:
                    if conversion.strict:
                        raise InputError(f"{candidate.label}: {error}") from error
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
            "read": writer.num_samples + len(skipped) + left_out.total(),
            "samples": writer.num_samples,
            "images": writer.num_images,
            **({"left_out": dict(left_out)} if left_out else {}),
            "reasons": dict(reasons(fault["reason"] for fault in skipped)),
            "passed_over": passed_over.to_json() if passed_over else {},
            "skipped": skipped,
        }
        write_report(staged, report)
    return report


def _state_of(source: Path | str) -> dict[str, int]:
    """Bytes and time of a file, by which a later run knows it again."""
    if isinstance(source, str) or not source.is_file():
        return {}
    stat = source.stat()
    return {"source_bytes": stat.st_size, "source_modified_ns": stat.st_mtime_ns}


def _kept(out: Path, settings: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """The report of what an earlier run wrote; InputError for other settings: what differs."""
    report = read_report(out)
    differing = [
        f"{name} was {report.get(name)!r}, now {value!r}"
        for name, value in json.loads(json.dumps(settings)).items()
        if report.get(name) != value
    ]
    if strict and report["skipped"]:
        differing.append(f"{len(report['skipped'])} samples were left out, now --strict")
    if differing:
        raise InputError(
            f"{out} is there already, made otherwise: {'; '.join(differing)}. Remove it, or pass "
            "--overwrite to make all anew"
        )
    print(f"{out}: kept, made by an earlier run with the same settings")
    return report


def reasons(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Faults of one kind counted together, the most frequent first: names and numbers left out."""
    return Counter(_PARTICULARS.sub("..", text)[:160] for text in texts).most_common()


def _read_image(image: Path | bytes) -> bytes:
    """The file's bytes, after a look at the header: what cannot be an image stops here."""
    if isinstance(image, bytes):
        read_image_size(image)
        return image
    try:
        data = image.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"the image {str(image)[:300]} cannot be read: {why}") from error
    try:
        read_image_size(data)
    except InputError as error:
        raise InputError(f"{image}: {error}") from error
    return data
