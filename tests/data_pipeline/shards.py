"""Reading shards back in tests, the way users of webdataset do."""

import json
from pathlib import Path
from typing import Any

import webdataset


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """All samples as webdataset reads them, the JSON parsed."""
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    return [{**sample, "json": json.loads(sample["json"])} for sample in samples]
