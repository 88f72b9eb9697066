"""The columns of a shard's index, as one file on disk and in memory.

S samples, I images; images in reading order, sample after sample:

    kind                    uint8 [S]    what the text member is: CHAT, CAPTION_TEXT, CAPTION_JSON,
                                         RECORD
    text_offset, text_size  int64 [S]    where the text member's bytes lie in the tar
    text_crc                uint32 [S]   CRC-32 of them: a reader can tell that they changed
    text_tokens             int32 [S]    tokens without image tokens, <img> and </img> included
    supervised_tokens       int32 [S]
    image_start             int64 [S+1]  images of sample i are image_start[i] .. image_start[i+1]
    image_offset, image_bytes  int64 [I]
    image_crc               uint32 [I]
    image_width, image_height  int32 [I] after EXIF rotation
    key_text                uint8 [...]  the keys in UTF-8, with a zero byte between them

Image sizes are stored raw, so that tiling settings can change without indexing again. The file is
an uncompressed .npz: reading a shard's columns is part of every start and of every window.
"""

import hashlib
import io
import json
import threading
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically

CHAT, CAPTION_TEXT, CAPTION_JSON, RECORD = range(4)

COLUMNS: dict[str, type[np.generic]] = {
    "kind": np.uint8,
    "text_offset": np.int64,
    "text_size": np.int64,
    "text_crc": np.uint32,
    "text_tokens": np.int32,
    "supervised_tokens": np.int32,
    "image_start": np.int64,
    "image_offset": np.int64,
    "image_bytes": np.int64,
    "image_crc": np.uint32,
    "image_width": np.int32,
    "image_height": np.int32,
    "key_text": np.uint8,
}
OF_IMAGES = ("image_offset", "image_bytes", "image_crc", "image_width", "image_height")
OF_SAMPLES = tuple(n for n in COLUMNS if n not in (*OF_IMAGES, "image_start", "key_text"))

# NumPy reads an array's header by Python's ast, which on 3.11 fails now and then with a SystemError
# where threads use it at once (python/cpython#106905): the loader's threads read columns.
_PARSING = threading.Lock()
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ShardColumns:
    """The columns of one shard; see the module's docstring for shapes and units."""

    kind: npt.NDArray[np.uint8]
    text_offset: npt.NDArray[np.int64]
    text_size: npt.NDArray[np.int64]
    text_crc: npt.NDArray[np.uint32]
    text_tokens: npt.NDArray[np.int32]
    supervised_tokens: npt.NDArray[np.int32]
    image_start: npt.NDArray[np.int64]
    image_offset: npt.NDArray[np.int64]
    image_bytes: npt.NDArray[np.int64]
    image_crc: npt.NDArray[np.uint32]
    image_width: npt.NDArray[np.int32]
    image_height: npt.NDArray[np.int32]
    key_text: npt.NDArray[np.uint8]

    @classmethod
    def from_lists(cls, keys: Sequence[str], **columns: Any) -> "ShardColumns":
        """Columns from sequences of the right lengths."""
        arrays = {name: np.array(values, dtype=COLUMNS[name]) for name, values in columns.items()}
        return cls(key_text=join_keys(keys), **arrays)

    def __len__(self) -> int:
        return len(self.text_tokens)

    @cached_property
    def keys(self) -> npt.NDArray[np.str_]:
        """Keys of the samples, str [S]."""
        if not len(self):
            return np.empty(0, dtype=np.str_)
        return np.array(self.key_text.tobytes().decode().split("\0"), dtype=np.str_)

    @property
    def nbytes(self) -> int:
        """Memory, the decoded keys (4 bytes a character) included."""
        return sum(getattr(self, name).nbytes for name in COLUMNS) + 5 * self.key_text.nbytes

    def digest(self) -> str:
        """Hex digest of the contents."""
        digest = hashlib.sha256()
        for name in COLUMNS:
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()


def join_keys(keys: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Keys as the column `key_text`; a tar's names hold no zero byte."""
    return np.frombuffer("\0".join(keys).encode(), dtype=np.uint8)


def save_columns(path: Path, header: dict[str, Any], columns: ShardColumns) -> None:
    """Write the columns and a JSON header as one file, atomically."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: getattr(columns, name) for name in COLUMNS}
    np.savez(buffer, header=np.array(json.dumps(header)), **arrays)
    write_atomically(path, buffer.getvalue())


def load_header(path: Path) -> dict[str, Any]:
    """Only the header of what `save_columns` wrote; InputError as `load_columns`."""
    return _load(path, ())[0]


def load_columns(path: Path) -> tuple[dict[str, Any], ShardColumns]:
    """Read what `save_columns` wrote; InputError naming the file if it is damaged."""
    header, columns = _load(path, tuple(COLUMNS))
    return header, ShardColumns(**columns)


def _load(path: Path, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    try:
        # Columns are all that a file holds: threads read it side by side, outside the lock.
        source = io.BytesIO(path.read_bytes()) if names else path
        with _PARSING, np.load(source, allow_pickle=False) as file:
            return json.loads(str(file["header"])), {name: file[name] for name in names}
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
