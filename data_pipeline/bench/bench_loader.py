"""Read, decode, tile and pack on two cores: this loader, and webdataset with worker processes.

Both read the same shards, tokenise with the same tokenizer, cut the same tiles and fill sequences
of the same length; the other side does it as is usual: Pillow in the two worker processes of a
torch DataLoader, samples put into a sequence until the next one does not fit.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_pipeline.bench.photos import SIZES, PhotoCorpus, make_corpus, make_photo
from data_pipeline.chat import expand_images, parse_sample, tokenize_chat
from data_pipeline.decode import image_tiles
from data_pipeline.draw import TokenCountSettings
from data_pipeline.index import load_index
from data_pipeline.loader import LoaderSettings, PackBuilder, StepLoader
from data_pipeline.mixture import Mixture
from data_pipeline.plan import PackSettings, Planner
from data_pipeline.tiling import Resample, TilingSettings, grid_for

TILING = TilingSettings(tile_size=384, max_tiles=6)
COUNTS = TokenCountSettings()
MAX_TOKENS = 8192
CORES = 2
LARGE_SIZES = ((3000, 2250), (4000, 3000), (3024, 4032))


def measure(quick: bool) -> dict[str, Any]:
    """Samples/s of both, taking turns, with their ratio; CPU time of single photographs."""
    num_samples, measured, turns = (40, 24, 2) if quick else (400, 300, 5)
    with tempfile.TemporaryDirectory() as folder, _on_cores(CORES):
        corpus = make_corpus(Path(folder), num_samples, num_shards=2 * CORES)
        ours, exact, theirs = [], [], []
        for _ in tqdm(range(turns), "loader", disable=None, leave=False):
            ours.append(_speed(_our_packs(corpus, "torch"), measured))
            theirs.append(_speed(_their_packs(corpus), measured))
            exact.append(_speed(_our_packs(corpus, "pillow"), measured))
    photos = [make_photo(*size, seed=1) for size in SIZES]
    large = [make_photo(*size, seed=2) for size in (LARGE_SIZES[:1] if quick else LARGE_SIZES)]
    return {
        "corpus": {"samples": num_samples, "kib_per_photo": _kib(photos)},
        "cores": CORES,
        "samples_per_s": [speed for speed, _ in ours],
        "pillow_samples_per_s": [speed for speed, _ in exact],
        "webdataset_samples_per_s": [speed for speed, _ in theirs],
        "ratio": median(a[0] / b[0] for a, b in zip(ours, theirs, strict=True)),
        "pillow_ratio": median(a[0] / b[0] for a, b in zip(exact, theirs, strict=True)),
        # Says the same without what else the machine does.
        "cpu_ms_per_sample": median(cpu for _, cpu in ours),
        "pillow_cpu_ms_per_sample": median(cpu for _, cpu in exact),
        "webdataset_cpu_ms_per_sample": median(cpu for _, cpu in theirs),
        "cpu_ms_per_photo": _cpu_times(photos, 2 if quick else 7),
        "large": {"kib_per_photo": _kib(large)},
        "cpu_ms_per_large_photo": _cpu_times(large, 2 if quick else 5),
    }


def _our_packs(corpus: PhotoCorpus, resample: Resample) -> Generator[int, None, None]:
    """The number of samples in each step."""
    loader = _our_loader(corpus, resample)
    steps = loader.steps()
    try:
        for step in steps:
            assert not any(pack.bad for pack in step.packs), step.packs[0].bad
            yield sum(len(pack.sample_ids) for pack in step.packs)
    finally:
        steps.close()


def _our_loader(corpus: PhotoCorpus, resample: Resample) -> StepLoader:
    mixture = Mixture.of(load_index(str(corpus.shards), corpus.tokenizer, corpus.chat))
    pack = PackSettings(max_tokens=MAX_TOKENS, packs_per_step=2)
    planner = Planner(mixture, TILING, COUNTS, pack, seed=0)
    builder = PackBuilder(mixture, corpus.tokenizer, corpus.chat, TILING, resample=resample)
    return StepLoader(planner, builder, LoaderSettings(threads=CORES))


def _their_packs(corpus: PhotoCorpus) -> Generator[int, None, None]:
    """The number of samples in each sequence."""
    shards = sorted(str(path) for path in corpus.shards.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).repeat()
    dataset = dataset.compose(partial(_their_sequences, corpus))
    loader = DataLoader(dataset, batch_size=None, num_workers=CORES, prefetch_factor=2)
    for sequence in loader:
        yield len(sequence["cu_seqlens"]) - 1


def _their_sample(corpus: PhotoCorpus, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    messages = parse_sample(sample["json"])["messages"]
    chat = tokenize_chat(messages, corpus.tokenizer, corpus.chat)
    images = [value for name, value in sample.items() if name.endswith(".jpg")]
    tiles = [their_tiles(data) for data in images]
    rng = np.random.default_rng()
    counts = rng.choice(COUNTS.counts, size=len(tiles), p=COUNTS.probabilities)
    tokens = [int(count) * len(cut) for count, cut in zip(counts, tiles, strict=True)]
    context = corpus.tokenizer.special_id("<IMG_CONTEXT>")
    input_ids, supervised = expand_images(chat, tokens, context)
    empty = np.empty((0, 3, TILING.tile_size, TILING.tile_size), np.uint8)
    return {
        "input_ids": np.array(input_ids),
        "labels": np.where(supervised, input_ids, -100),
        "tiles": np.concatenate([empty, *tiles]),
    }


def their_tiles(data: bytes) -> np.ndarray:
    """Tiles as most training code cuts them, with Pillow: uint8 [tiles, 3, size, size]."""
    image = Image.open(BytesIO(data)).convert("RGB")
    columns, rows = grid_for(*image.size, TILING)
    size = TILING.tile_size
    whole = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    boxes = [(x * size, y * size) for y in range(rows) for x in range(columns)]
    tiles = [whole.crop((x, y, x + size, y + size)) for x, y in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])


def _their_sequences(
    corpus: PhotoCorpus, files: Iterable[dict[str, Any]]
) -> Iterator[dict[str, torch.Tensor]]:
    held: list[dict[str, np.ndarray]] = []
    for sample in (_their_sample(corpus, members) for members in files):
        tokens = sum(len(other["input_ids"]) for other in held)
        if held and tokens + len(sample["input_ids"]) > MAX_TOKENS:
            yield _join(held)
            held = []
        held.append(sample)


def _join(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    lengths = [len(sample["input_ids"]) for sample in samples]
    joined = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    joined["cu_seqlens"] = np.cumsum([0, *lengths])
    return {name: torch.from_numpy(array) for name, array in joined.items()}


def _speed(packs: Generator[int, None, None], measured: int) -> tuple[float, float]:
    """(samples/s, CPU ms per sample) over `measured` samples, taken when the queues are full."""
    samples = 0
    while samples < measured // 2:
        samples += next(packs)
    samples, start, cpu = 0, time.perf_counter(), _cpu_s()
    while samples < measured:
        samples += next(packs)
    seconds, cpu = time.perf_counter() - start, _cpu_s() - cpu
    packs.close()
    return samples / seconds, 1e3 * cpu / samples


def _cpu_s() -> float:
    """CPU time so far of this process and, on Linux, of the worker processes it has now."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.is_file():
            fields = stat.read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _cpu_times(photos: list[bytes], repetitions: int) -> dict[str, float]:
    """Mean over the photographs of the least CPU time, in ms of one core."""

    def tiles(reduced: bool, resample: Resample) -> Callable[[bytes], np.ndarray]:
        return lambda data: image_tiles(data, None, TILING, reduced, resample=resample)

    ways: dict[str, Callable[[bytes], np.ndarray]] = {
        "usual way": their_tiles,
        "full, Pillow resizes": tiles(False, "pillow"),
        "reduced, Pillow resizes": tiles(True, "pillow"),
        "full, torch resizes": tiles(False, "torch"),
        "reduced, torch resizes": tiles(True, "torch"),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {name: [float("inf")] * len(photos) for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            for number, data in enumerate(photos):
                start = time.thread_time()
                way(data)
                elapsed = 1e3 * (time.thread_time() - start)
                times[name][number] = min(times[name][number], elapsed)
    torch.set_num_threads(threads)
    return {name: sum(best) / len(best) for name, best in times.items()}


def _kib(files: list[bytes]) -> float:
    return sum(map(len, files)) / len(files) / 1024


@contextmanager
def _on_cores(number: int) -> Iterator[None]:
    """Keep this process and those it starts on so many cores."""
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
