"""Reading samples from a web server on this machine: requests, bytes beyond use, samples/s.

Each member by itself, and neighbours together; the server waits before each answer as a store does.
"""

import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from data_pipeline.bench.photos import PhotoCorpus, make_corpus
from data_pipeline.index import Index, load_index
from data_pipeline.storage import Storage, StorageSettings

LATENCY_S = 0.02  # until the first byte: what object stores take at best
THREADS = 4
_SEPARATE = {"max_gap_bytes": 0}


def measure(quick: bool) -> dict[str, Any]:
    """Of photographs with a text each, drawn in random order as training does."""
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as folder:
        corpus = make_corpus(Path(folder), *((60, 2) if quick else (1_000, 4)))
        with _serve(corpus.shards) as url:
            return {
                "latency_ms": 1e3 * LATENCY_S,
                "threads": THREADS,
                "each member": _read_all(_open(corpus, url, _SEPARATE)),
                "members together": _read_all(_open(corpus, url, {})),
            }


def _open(corpus: PhotoCorpus, url: str, settings: dict[str, int]) -> Index:
    """The index of the local shards, read from the server."""
    local = load_index(str(corpus.shards), corpus.tokenizer, corpus.chat)
    names = ",".join(shard.stem for shard in local.shards)
    storage = Storage(StorageSettings(**settings))
    local.shards = storage.expand(f"{url}/{{{names}}}.tar")
    local.storage = storage
    return local


def _read_all(index: Index) -> dict[str, float]:
    order = np.random.default_rng(0).permutation(len(index)).tolist()
    index.storage.read(index.shards[0], 0, 1)  # connects
    before, start = replace(index.storage.counts), time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(index.read, order):
            pass
    seconds, counts = time.perf_counter() - start, index.storage.counts
    received = counts.bytes - before.bytes
    return {
        "samples_per_s": len(index) / seconds,
        "requests_per_sample": (counts.requests - before.requests) / len(index),
        "unused_bytes_per_sample": (counts.bytes_unused - before.bytes_unused) / len(index),
        "unused_share": (counts.bytes_unused - before.bytes_unused) / received,
        "retries": counts.retries - before.retries,
    }


@contextmanager
def _serve(folder: Path) -> Iterator[str]:
    """The URL of a server of the folder's files, with ranges; it runs in a thread."""

    @web.middleware
    async def late(request: web.Request, handler: Any) -> web.StreamResponse:
        await asyncio.sleep(LATENCY_S)
        response: web.StreamResponse = await handler(request)
        return response

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application(middlewares=[late])
        app.router.add_static("/", folder)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
