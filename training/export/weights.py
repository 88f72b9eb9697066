"""Weights that are read when they are written: from a checkpoint or a safetensors folder."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import InputError
from training.adapters import StageAdapters
from training.zero3.saved_tensors import SavedTensor, saved_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors files."""
_NAMED = 8
"""Most names in one message."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a model: `read` makes it, whole and in `dtype`; nothing is held before."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def renamed(self, name: str) -> "Weight":
        return replace(self, name=name)


def checkpoint_weights(
    path: Path,
    world_size: int,
    dtype: torch.dtype,
    adapters: StageAdapters | None = None,
    apart: Collection[str] = (),
    ema: bool = False,
) -> list[Weight]:
    """Every parameter, trained or frozen, and buffer of a verified checkpoint.

    Args:
        path: the checkpoint's folder.
        world_size: how many ranks saved it.
        dtype: what floating-point tensors become.
        adapters: what it was saved with; they are merged into their matrices.
        apart: parts of the model whose adapters are not merged, but given by their own names.
        ema: the moving average of what trained (`train.ema`).
    """
    return [
        _saved_weight(saved, dtype if saved.dtype.is_floating_point else saved.dtype)
        for saved in saved_tensors(path, world_size, adapters, apart, ema)
    ]


def _saved_weight(saved: SavedTensor, dtype: torch.dtype) -> Weight:
    def read() -> Tensor:
        whole = torch.empty(math.prod(saved.shape), dtype=dtype)
        filled = 0
        for piece in saved.pieces():
            whole[filled : filled + len(piece)] = piece
            filled += len(piece)
        assert filled == len(whole), saved.name
        return whole.view(saved.shape)

    return Weight(saved.name, saved.shape, dtype, read)


def folder_weights(folder: Path, file: str | None = None) -> list[Weight]:
    """Every tensor of a folder's model, or of one of its files, in the format it is stored in.

    Raises:
        InputError: if there are none, or a file is missing, damaged or lies elsewhere.
    """
    weights = []
    files = {folder / file: set[str]()} if file else _files(folder)
    for path, names in files.items():
        try:
            with safe_open(path, "pt") as stored:
                found = set(stored.keys())
                for name in sorted(names or found):
                    if name not in found:
                        raise InputError(f"{path} has no {name}, which {INDEX} says it has")
                    part = stored.get_slice(name)
                    dtype = DTYPES[part.get_dtype()]
                    read = _stored_reader(path, name)
                    weights.append(Weight(name, tuple(part.get_shape()), dtype, read))
        except InputError:
            raise
        except Exception as error:  # the library's own kinds
            raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    return weights


def _stored_reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
            return tensor

    return read


def _files(folder: Path) -> dict[Path, set[str]]:
    """The folder's safetensors files and what its index says is in each; empty: all of it."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: set()}
        raise InputError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; give a model folder with its weights as "
            "safetensors"
        )
    files: dict[Path, set[str]] = {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise InputError(f"{index} names {file!r}, which lies outside the folder")
            files.setdefault(folder / file, set()).add(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{index} cannot be read: {error!r}") from error
    return files


def check_weights(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """InputError unless the tensors of `source` are those of the model, by name and shape."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"it lacks {_listed(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"it has {_listed(extra)}, which the model does not")
    problems += [
        f"{name} is {list(found[name])} there and {list(expected[name])} by the config"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ][:_NAMED]
    if problems:
        raise InputError(f"the weights of {source} do not fit its config: {'; '.join(problems)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
