"""Writing weights as safetensors, tensor after tensor: one is in memory at a time.

A file is 8 bytes with the length of a JSON header, the header with each tensor's place, and the
tensors (github.com/huggingface/safetensors, "Format").
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from training.export.weights import DTYPES, INDEX, SINGLE, Weight

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB" or a plain number; InputError for anything else."""
    number, unit = text.strip().upper(), 1
    for suffix, factor in _UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
    try:
        size = round(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(f"{text!r} is no size of a file; give one like 5GB or 500MB")
    return size


def write_weights(folder: Path, weights: Sequence[Weight], max_bytes: int) -> int:
    """Write weights in files of at most `max_bytes`, or one tensor, and their index.

    Returns the bytes of all tensors. One file is called `model.safetensors` and has no index.
    """
    files = _split(weights, max_bytes)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE]
    total = sum(weight.num_bytes for weight in weights)
    with tqdm(
        desc="weights", total=total, unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for name, content in zip(names, files, strict=True):
            write_file(folder / name, content, bar)
    if len(files) > 1:
        placed = zip(names, files, strict=True)
        weight_map = {weight.name: name for name, content in placed for weight in content}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
    return total


def write_file(path: Path, weights: Sequence[Weight], bar: tqdm | None = None) -> None:
    """Write one safetensors file and flush it to disk."""
    # The widest numbers first: all of them then lie at multiples of their own size.
    weights = sorted(weights, key=lambda weight: -weight.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + weight.num_bytes
        header[weight.name] = {
            "dtype": _NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            tensor = weight.read()
            assert (tensor.dtype, tuple(tensor.shape)) == (weight.dtype, weight.shape), weight.name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            if bar is not None:
                bar.update(weight.num_bytes)
            del tensor
        file.flush()
        os.fsync(file.fileno())


def _split(weights: Sequence[Weight], max_bytes: int) -> list[list[Weight]]:
    files: list[list[Weight]] = [[]]
    held = 0
    for weight in weights:
        if files[-1] and held + weight.num_bytes > max_bytes:
            files.append([])
            held = 0
        files[-1].append(weight)
        held += weight.num_bytes
    return files
