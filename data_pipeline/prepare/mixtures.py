"""Lists of datasets as other trainers have them, each converted, their shares carried over.

InternVL's meta JSON: {name: {"root", "annotation", "repeat_time", ...}}; LLaVA-NeXT's data YAML:
{"datasets": [{"json_path", "sampling_strategy": "all" | "first:10%" | "end:500" | "random:10%"}]}.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.prepare.convert import Conversion
from data_pipeline.prepare.from_records import Share, prepare_records
from data_pipeline.yaml_text import read_yaml, write_yaml

CONFIG = "mixture.yaml"
_STRATEGY = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class ListedDataset:
    """A dataset of a list: its file, its pictures' folder, how often each sample counts."""

    name: str
    records: Path
    images: Path | None
    repeat: float = 1.0
    share: Share | None = None


def prepare_mixture(
    source: Path, out: Path, *, images: Path | None, conversion: Conversion, **options: Any
) -> dict[str, Any]:
    """Convert every dataset of a list to `out`/NAME, and write `out`/mixture.yaml.

    The YAML is a `data.datasets` section: each dataset weighs its samples times its repeats.
    Returns the reports by name. Each dataset is converted whole or not at all, one after the other;
    those that an earlier run made with the same settings from the same files are kept.

    Raises:
        InputError: the list or one of its datasets cannot be used, or one is there already, made
            otherwise.
    """
    datasets = read_list(source, images)
    conversion = replace(conversion, keep=True)
    reports: dict[str, Any] = {}
    section: dict[str, Any] = {}
    for dataset in datasets:
        report = prepare_records(
            [dataset.records],
            out / dataset.name,
            source=dataset.records,
            images=dataset.images,
            share=dataset.share,
            conversion=conversion,
            **options,
        )
        reports[dataset.name] = report
        weight = round(report["samples"] * dataset.repeat, 4)
        section[dataset.name] = {"shards": [str(out / dataset.name)], "weight": weight}
    text = write_yaml({"data": {"datasets": section}})
    write_atomically(out / CONFIG, text.encode())
    return reports


def read_list(source: Path, images: Path | None = None) -> list[ListedDataset]:
    """The datasets that a list names; InputError for one that is of neither form."""
    try:
        text = source.read_bytes().decode("utf-8-sig")
        content = json.loads(text) if source.suffix.lower() == ".json" else read_yaml(text, source)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{source} cannot be read as a list of datasets: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("datasets"), list):
        found = [_of_yaml(entry, source, images) for entry in content["datasets"]]
    elif isinstance(content, Mapping) and content:
        found = [_of_meta(str(name), entry, source) for name, entry in content.items()]
    else:
        raise InputError(f"{source} names no datasets, under their names or under 'datasets'")
    names = [dataset.name for dataset in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{source} names the datasets {', '.join(twice)} twice")
    return found


def _of_meta(name: str, entry: Any, source: Path) -> ListedDataset:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("annotation"), str):
        raise InputError(f"{source}: {name} has no 'annotation', a file of records")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or repeat <= 0:
        raise InputError(f"{source}: repeat_time of {name} is {repeat!r}, expected above 0")
    root = entry.get("root")
    return ListedDataset(
        re.sub(r"[^\w.-]+", "_", name),
        _beside(entry["annotation"], source),
        _beside(root, source) if root else None,
        float(repeat),
    )


def _of_yaml(entry: Any, source: Path, images: Path | None) -> ListedDataset:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("json_path"), str):
        raise InputError(f"{source}: a dataset has no 'json_path', a file of records")
    path = _beside(entry["json_path"], source)
    strategy = str(entry.get("sampling_strategy", "all"))
    share = None
    if strategy != "all":
        match = _STRATEGY.fullmatch(strategy)
        if match is None:
            raise InputError(
                f"{source}: sampling_strategy is {strategy!r}, expected all, first:N, end:N or "
                "random:N, N a number or a percentage"
            )
        share = Share(match[1], float(match[2]) / (100 if match[3] else 1), bool(match[3]))
    return ListedDataset(path.stem, path, images, share=share)


def _beside(name: str, source: Path) -> Path:
    path = Path(name)
    return path if path.is_absolute() or path.exists() else source.parent / path
