"""Where pretrained weights and tokenizers come from: a local path, or a name on a hub."""

import re
from pathlib import Path

from data_pipeline.errors import InputError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE = re.compile(r"\.(model|json|safetensors|bin|pt|pth|tar|zip)$")


def check_source(source: str | Path, name: str, expected: str) -> None:
    """Refuse at once what is meant as a local path and is not there.

    Asked for it, a hub's client would try the network for half a minute first.

    Args:
        source: a path, or a name on a hub. "org/model" is a path, too, where a folder "org" is here
            and no such model is in the hub's local cache.
        name: how the message calls it, `source` included. expected: "a folder with ..." and so on.

    Raises:
        InputError: it is not there.
    """
    if is_missing(source):
        parent = Path(source).expanduser().parent
        near = "is there" if parent.is_dir() else "does not exist either"
        raise InputError(f"{name} does not exist (the folder {parent} {near}); give {expected}")


def is_missing(source: str | Path) -> bool:
    """Whether it can only be meant as a local path, and nothing is there."""
    path, text = Path(source).expanduser(), str(source)
    if path.exists():
        return False
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(text) or _FILE.search(text):
        return True
    return "/" in text and path.parent.is_dir() and not _is_cached(text)


def _is_cached(name: str) -> bool:
    """Whether a model was fetched from the hub before."""
    from huggingface_hub import constants

    folder = f"models--{name.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE, folder).is_dir()
