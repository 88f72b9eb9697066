"""One walk over folders: which files are read, and which are passed over, so that it can be said.

Links are followed, each folder once. Hidden files and folders, and what systems and editors leave
behind, are passed over.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

LEFT_BEHIND = frozenset(
    ("__MACOSX", "@eaDir", "__pycache__", "lost+found", "Thumbs.db", "desktop.ini")
)


_DOCUMENTS = frozenset(
    (
        *("readme", "license", "licence", "copying", "notice", "authors", "changelog", "citation"),
        *("dataset_info", "dataset_infos"),
    )
)


def is_about_the_data(name: str) -> bool:
    """Whether a file's name is that of a document about a data set, or begins as metadata do."""
    stem = name.rpartition("/")[2].partition(".")[0].lower()
    return stem in _DOCUMENTS or stem.startswith("_")


@lru_cache(maxsize=4096)  # asked of every member of a shard
def is_left_behind(folder: str) -> bool:
    """Whether a folder, named with "/", is or lies in a hidden one or one of `LEFT_BEHIND`."""
    return any(
        part in LEFT_BEHIND or (part.startswith(".") and part not in (".", ".."))
        for part in folder.split("/")
    )


@dataclass
class PassedOver:
    """Files that a walk met and did not take, counted by suffix and by folder."""

    suffixes: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    broken_links: list[str] = field(default_factory=list)

    def add(self, path: Path, root: Path) -> None:
        """Count a file."""
        suffix = path.suffix.lower() or ("hidden" if path.name.startswith(".") else "no suffix")
        self.suffixes[suffix] += 1
        self.folders[path.parent.relative_to(root).as_posix()] += 1

    def to_json(self) -> dict[str, object]:
        """As a report holds it; empty if every file was taken."""
        found = {
            "by suffix": dict(self.suffixes.most_common()),
            "by folder": dict(self.folders.most_common()),
            "broken links": self.broken_links,
        }
        return {name: value for name, value in found.items() if value}


def walk(root: Path, wanted: Callable[[Path], bool]) -> tuple[list[Path], PassedOver]:
    """The wanted files below a folder, sorted, and the others."""
    taken: list[Path] = []
    passed = PassedOver()
    for path in _files(root, passed, root):
        if wanted(path):
            taken.append(path)
        else:
            passed.add(path, root)
    return sorted(taken), passed


def _files(
    folder: Path, passed: PassedOver, root: Path, seen: set[str] | None = None
) -> Iterator[Path]:
    """Files below a folder; those in hidden and left-behind folders are only counted."""
    seen = seen if seen is not None else {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        hidden = is_left_behind(entry.name)
        if entry.is_dir():
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            if hidden:
                for inner in _files(path, passed, root, seen):
                    passed.add(inner, root)
            else:
                yield from _files(path, passed, root, seen)
        elif not entry.is_file():
            passed.broken_links.append(path.relative_to(root).as_posix())
        elif hidden:
            passed.add(path, root)
        else:
            yield path
