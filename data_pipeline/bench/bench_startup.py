"""How long training waits for its first step of data: an index of a million samples, anywhere."""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.balance import DEFAULT_COST
from data_pipeline.corpus import open_corpus
from data_pipeline.index import build_index
from data_pipeline.index.columns import load_columns, save_columns
from data_pipeline.index.index_files import find_index_files
from data_pipeline.loader import StepLoader
from data_pipeline.plan import PlanState
from data_pipeline.prepare.demo_corpus import prepare_demo
from data_pipeline.settings import DataSettings
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import load_tokenizer

_SAMPLES = 10_000  # written once; the rest are links to them
_REPEATS = 3


def measure(quick: bool) -> dict[str, Any]:
    """Seconds from the settings to the first step's packs, at the beginning and on resume.

    Of one rank with 8 packs of 8192 tokens a step; Python and torch are already loaded.
    """
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        data = _corpus(Path(folder) / "grid", links=4 if quick else 100)
        beginning = [_first_batch(data, None) for _ in range(_REPEATS)]
        place = _place_of_window(data, 20)
        resumed = [_first_batch(data, place) for _ in range(_REPEATS)]
    return {
        "samples": beginning[0]["samples"],
        "shards": beginning[0]["shards"],
        "open_index_s": min(row["open_s"] for row in beginning),
        "first_batch_s": min(row["seconds"] for row in beginning),
        "first_batch_worst_s": max(row["seconds"] for row in beginning),
        "resumed_first_batch_s": min(row["seconds"] for row in resumed),
        "resumed_first_batch_worst_s": max(row["seconds"] for row in resumed),
    }


def _first_batch(data: DataSettings, state: PlanState | None) -> dict[str, float]:
    start = time.perf_counter()
    corpus = open_corpus(data, 0, DEFAULT_COST)
    opened = time.perf_counter() - start
    steps = StepLoader(corpus.planner, corpus.builder, data.loader).steps(state)
    packs = next(steps).packs
    seconds = time.perf_counter() - start
    steps.close()
    assert len(packs) == data.pack.packs_per_step and not any(pack.bad for pack in packs)
    shards = len(corpus.mixture.datasets[0].index.shards)
    return {
        "seconds": seconds,
        "open_s": opened,
        "samples": len(corpus.mixture),
        "shards": shards,
    }


def _place_of_window(data: DataSettings, window: int) -> PlanState:
    """The second step of a later window."""
    windows = open_corpus(data, 0, DEFAULT_COST).planner.windows()
    return next(plan for plan in windows if plan.state.window == window).state.at_step(1)


def _corpus(folder: Path, links: int) -> DataSettings:
    """`links` times the shards of a small corpus, each with its own index file."""
    prepare_demo("grid", folder, train_samples=_SAMPLES, eval_samples=1, details=[1])
    data = DataSettings(
        shards=[str(folder / "train")],
        tokenizer=str(folder / "tokenizer.model"),
        pack={"max_tokens": 8192, "packs_per_step": 8},
    )
    build_index(data.shards, load_tokenizer(data.tokenizer), data.chat)
    shards = Storage().expand(data.shards)
    files = find_index_files(shards, None)[shards[0].folder]
    headers = files.read_manifest()
    for shard in shards:
        _, columns = load_columns(files.columns(shard))
        for link in range(1, links):
            name = f"{shard.stem}-{link:03d}"
            os.link(shard.url, folder / "train" / f"{name}.tar")
            header = replace(headers[shard.name], shard=f"{name}.tar")
            save_columns(files.folder / f"{name}.npz", header.to_dict(), columns)
            headers[header.shard] = header
    files.write_manifest(headers)
    return data
