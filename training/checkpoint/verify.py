"""Checksums and pickle scan of a checkpoint's files, before anything opens them."""

from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import Seen, check_whole
from training.checkpoint.folder_layout import Manifest, read_manifest
from training.zero3.pickles import scan_pickle


def verify_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check size, sha256 and pickles of these files of the checkpoint `path`.

    Raises:
        InputError: naming the first file that is missing, changed, or would run code.
    """
    for name, entry in files.items():
        verify_file(path / name, entry)


def verify_file(file: Path, entry: dict[str, Any], seen: Seen = lambda count: None) -> None:
    """Check one file against its manifest entry; see `verify_files`."""
    check_whole(file, entry, seen)
    if file.suffix == ".pt":
        scan_pickle(file)


def check_unlisted(path: Path, manifest: Manifest) -> None:
    """InputError for a .pt file the manifest does not list: engines find shards by pattern."""
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
