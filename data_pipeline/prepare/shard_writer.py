"""Writing samples as webdataset shards, so that only a finished run leaves a folder behind."""

import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import written_aside

REPORT_NAME = "prepare.json"
# The tar header holds 100 characters of name; the rest is for a number, "." and the suffix.
MAX_KEY_LENGTH = 64


@dataclass(frozen=True)
class ShardLimits:
    """When a new shard is begun: after `samples` samples or `num_bytes` bytes of content."""

    samples: int = 2_000
    num_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        for option, value in (("samples-per-shard", self.samples), ("shard-bytes", self.num_bytes)):
            if value < 1:
                raise InputError(f"--{option} is {value}; it must be at least 1.")


class SampleWriter:
    """Writes samples to `folder`/000000.tar, 000001.tar, ... and gives each a key of its own.

    The bytes written depend on the samples only: tar headers carry no time and no user.
    """

    # Not webdataset's ShardWriter: it brings in torch, a second or two before the first sample, and
    # with a fixed time it writes two more blocks for each member.
    def __init__(self, folder: Path, limits: ShardLimits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limits = folder, limits
        self._times_used: dict[str, int] = {}
        self.num_samples = 0
        self.num_images = 0
        self._num_shards = 0
        self._begin_shard()

    def __enter__(self) -> "SampleWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_shard()

    def write(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        images: Mapping[str, bytes],
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Append one sample and return its key.

        Args:
            name: any text the key is made from.
            messages: the turns; image parts name a suffix, such as "0.png".
            images: the file's bytes for each of these suffixes, written as they are.
            metadata: free-form facts kept with the sample.

        Raises:
            InputError: a text that cannot be written as UTF-8.
        """
        record: dict[str, Any] = {"messages": messages}
        if metadata is not None:
            record["metadata"] = metadata
        try:
            # A table's metadata may be dates and the like: as text.
            text = json.dumps(record, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a text is not valid Unicode: {error.reason}") from error
        key = self._unique_key(name)
        self._write_members(key, sorted({**images, "json": text}.items()))
        self.num_samples += 1
        self.num_images += len(images)
        return key

    def _begin_shard(self) -> None:
        self._shard = (self._folder / f"{self._num_shards:06d}.tar").open("wb")
        self._num_shards += 1
        self._shard_samples = self._shard_bytes = 0

    def _end_shard(self) -> None:
        with self._shard as file:  # two empty blocks, up to a whole record
            end = file.tell() + 2 * tarfile.BLOCKSIZE
            file.truncate(end + -end % tarfile.RECORDSIZE)

    def _write_members(self, key: str, members: Iterable[tuple[str, bytes]]) -> None:
        limits = self._limits
        if self._shard_samples >= limits.samples or self._shard_bytes >= limits.num_bytes:
            self._end_shard()
            self._begin_shard()
        self._shard_samples += 1
        for suffix, data in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode = len(data), 0o444
            self._shard.write(info.tobuf(tarfile.USTAR_FORMAT))
            self._shard.write(data)
            self._shard.write(bytes(-len(data) % tarfile.BLOCKSIZE))
            self._shard_bytes += len(data)

    def _unique_key(self, name: str) -> str:
        """`name` with only letters, digits, "-" and "_" of ASCII, and a number if it is taken."""
        # A leading "_" would make some readers take the member for metadata.
        base = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:MAX_KEY_LENGTH].lstrip("_") or "sample"
        key = base
        while key in self._times_used:
            key = f"{base}-{self._times_used[base]}"
            self._times_used[base] += 1
        self._times_used[key] = 1
        return key


def staged_output(
    out: Path, *, overwrite: bool = False, sources: Sequence[Path | str] = ()
) -> AbstractContextManager[Path]:
    """A folder that becomes `out` when the block ends without error, as in `written_aside`.

    Args:
        out: the folder to create.
        overwrite: replace `out` if an earlier run of this tool wrote it.
        sources: inputs that must not lie inside a folder that is going to be replaced.

    Raises:
        InputError: `out` is a file, or holds something that may not be replaced.
    """
    return written_aside(out, lambda: _check_replaceable(out.resolve(), overwrite, sources))


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write prepare.json: what was made, from what, and what was left out and why."""
    # ASCII: names from damaged input may hold what UTF-8 cannot.
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """What `write_report` wrote; InputError if it is damaged."""
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text())
        report["samples"], report["skipped"], report["reasons"], report["passed_over"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / REPORT_NAME} is damaged; remove {folder}") from error
    return report


def _check_replaceable(out: Path, overwrite: bool, sources: Sequence[Path | str]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file, and a folder is to be written there: choose another.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{out} exists and is not empty. Choose another folder, or pass --overwrite "
            "to replace what an earlier run wrote there."
        )
    if not (out / REPORT_NAME).is_file():
        raise InputError(
            f"{out} has no {REPORT_NAME}, so it was not written by this tool and --overwrite does "
            "not touch it. Choose another folder, or remove it yourself."
        )
    for source in sources:
        if isinstance(source, Path) and source.resolve().is_relative_to(out):
            raise InputError(
                f"{source} lies inside {out}, which --overwrite would delete. "
                "Choose another output folder."
            )
