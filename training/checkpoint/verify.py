"""Checksums and pickle scan of a checkpoint's files, before anything opens them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from training.checkpoint.folder_layout import Manifest, read_manifest
from training.checkpoint.pickles import scan_pickle

Seen = Callable[[int], object]
"""Told how many bytes have just been read."""


def verify_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check size, sha256 and pickles of these files of the checkpoint `path`.

    Raises:
        InputError: naming the first file that is missing, changed, or would run code.
    """
    for name, entry in files.items():
        verify_file(path / name, entry)


def verify_file(file: Path, entry: dict[str, Any], seen: Seen = lambda count: None) -> None:
    """Check one file against its manifest entry; see `verify_files`."""
    try:
        found = file.stat().st_size
        if found != entry["bytes"]:
            raise InputError(f"{file} has {found} bytes, {entry['bytes']} were written")
        digest = _sha256(file, seen)
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if digest != entry["sha256"]:
        raise InputError(f"{file} is damaged: its sha256 is not the one it was saved with")
    if file.suffix == ".pt":
        scan_pickle(file)


def _sha256(file: Path, seen: Seen) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
            seen(len(chunk))
    return digest.hexdigest()


def check_unlisted(path: Path, manifest: Manifest) -> None:
    """InputError for a .pt file the manifest does not list: DeepSpeed finds shards by pattern."""
    for file in sorted(path.glob("*.pt")):
        if file.name not in manifest.files:
            raise InputError(f"{file} is not in the manifest; remove it")


def share(files: dict[str, dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """This rank's part of the files to verify, about as many bytes as every other's."""
    by_size = sorted(files.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return dict(by_size[rank::world_size])


def problems_of(path: Path, seen: Seen = lambda count: None) -> list[str]:
    """Everything wrong with a checkpoint, in words; empty if it is whole. Reads every file."""
    try:
        manifest = read_manifest(path)
    except InputError as error:
        return [str(error)]
    problems = []
    try:
        check_unlisted(path, manifest)
    except InputError as error:
        problems.append(str(error))
    for name, entry in manifest.files.items():
        try:
            verify_file(path / name, entry, seen)
        except InputError as error:
            problems.append(str(error))
    return problems
