"""Indexing in samples/s of one core, and time and memory of loading the index of a large set."""

import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from tqdm import tqdm

from data_pipeline.chat import ChatSettings
from data_pipeline.index import load_index
from data_pipeline.index.columns import OF_IMAGES, OF_SAMPLES, ShardColumns, save_columns
from data_pipeline.index.header import ShardHeader
from data_pipeline.index.index_files import find_index_files
from data_pipeline.index.index_shard import index_shard
from data_pipeline.prepare.demo_corpus import prepare_demo
from data_pipeline.prepare.shard_writer import ShardLimits
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

CHAT = ChatSettings()
SAMPLES_PER_SHARD = 10_000
WINDOW_SAMPLES = 20_000


def measure(quick: bool) -> dict[str, Any]:
    """samples/s per core of two corpora with two kinds of tokenizer; loading an index."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        samples = 400 if quick else 10_000
        prepare_demo(
            "digits",
            place / "digits",
            train_samples=samples,
            eval_samples=16,
            limits=ShardLimits(samples=samples // 4),
        )
        _write_captions(place / "captions", 200 if quick else 6_000)
        texts = _captions(np.random.default_rng(1), 2_000)
        train_sentencepiece(texts, place / "captions.model", 4_000)
        _train_hugging_face(texts, place / "hugging-face")
        for tokenizer in ("captions.model", "hugging-face"):
            loaded = load_tokenizer(place / tokenizer)
            for corpus in ("digits/train", "captions"):
                name = f"samples_per_s_per_core {corpus.split('/')[0]} {tokenizer.split('.')[-1]}"
                result[name] = _indexing_speed(place / corpus, loaded)
        samples = 50_000 if quick else 1_000_000
        result["loaded_samples"] = samples
        result |= _loading(place, samples)
    return result


def _indexing_speed(folder: Path, tokenizer: Tokenizer) -> float:
    """Samples per second of CPU time; the first shard only warms up."""
    storage = Storage()
    first, *shards = storage.expand(str(folder))
    index_shard(first, tokenizer, CHAT, storage)
    start, samples = time.process_time(), 0
    for shard in tqdm(shards, desc="index", disable=None):
        header, _ = index_shard(shard, tokenizer, CHAT, storage)
        samples += header.samples
    return round(samples / (time.process_time() - start))


def _captions(rng: np.random.Generator, number: int) -> list[str]:
    """Texts of 10 to 80 words from a vocabulary of 3000."""
    letters = np.array(list("aaabcdeeeefghiijklmnooprsstttuvwy"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(3_000)]
    return [" ".join(rng.choice(words, rng.integers(10, 80))) for _ in range(number)]


def _write_captions(folder: Path, number: int) -> None:
    """Captioned JPEG files as img2dataset writes them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(buffer, "JPEG")
    pattern = str(folder / "%05d.tar")
    maxcount = max(number // 4, 1)
    with webdataset.ShardWriter(pattern, maxcount=maxcount, verbose=0, encoder=False) as writer:
        for i, caption in enumerate(_captions(rng, number)):
            metadata = {"caption": caption, "url": f"https://host/{i}.jpg", "status": "success"}
            writer.write(
                {
                    "__key__": f"{i:09d}",
                    "jpg": buffer.getvalue(),
                    "txt": caption.encode(),
                    "json": json.dumps(metadata).encode(),
                }
            )


def _train_hugging_face(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4_000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def _loading(place: Path, samples: int) -> dict[str, Any]:
    """Write the index of a large set (its shards are empty space), then load it in a process."""
    tokenizer = load_tokenizer(place / "captions.model")
    folder = place / "large"
    folder.mkdir()
    (files,) = [find_index_files(Storage().expand(str(_shard(folder, 0))), None)[str(folder)]]
    storage = Storage()
    like, _ = index_shard(storage.expand(str(place / "digits/train"))[0], tokenizer, CHAT, storage)
    headers = {}
    for number in tqdm(range(samples // SAMPLES_PER_SHARD), desc="write", disable=None):
        (shard,) = Storage().expand(str(_shard(folder, number)))
        columns = _random_columns(number)
        header = _header(like, shard.name, columns)
        save_columns(files.columns(shard), header.to_dict(), columns)
        headers[shard.name] = header
    files.write_manifest(headers)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_load, (str(folder), str(place / "captions.model")))


def _load(folder: str, model: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    before = _memory_mib()
    start = time.perf_counter()
    index = load_index(folder, tokenizer, CHAT)
    loaded = time.perf_counter()
    for shard in range(min(-(-WINDOW_SAMPLES // SAMPLES_PER_SHARD), len(index.shards))):
        index.columns(shard)
    window = time.perf_counter()
    window_memory = _memory_mib()
    for shard in range(len(index.shards)):
        index.columns(shard)
    everything = time.perf_counter()
    return {
        "load_s": round(loaded - start, 4),
        "first_window_columns_s": round(window - loaded, 4),
        "first_window_memory_MiB": round(window_memory - before, 1),
        "all_columns_s": round(everything - window, 3),
        "all_columns_memory_MiB": round(_memory_mib() - before, 1),
        "columns_bytes_per_sample": round(index.columns(0).nbytes / len(index.columns(0)), 1),
    }


def _memory_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def _shard(folder: Path, number: int) -> Path:
    path = folder / f"{number:06d}.tar"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


def _random_columns(number: int) -> ShardColumns:
    rng = np.random.default_rng(number)
    counts = rng.choice(5, SAMPLES_PER_SHARD, p=(0.15, 0.6, 0.12, 0.07, 0.06))
    image_start = np.concatenate([[0], np.cumsum(counts)])

    def numbers(names: tuple[str, ...], size: int) -> dict[str, Any]:
        return {name: rng.integers(0, 200, size) for name in names}

    return ShardColumns.from_lists(
        [f"{number:05d}{i:04d}" for i in range(SAMPLES_PER_SHARD)],
        image_start=image_start,
        **numbers(OF_SAMPLES, SAMPLES_PER_SHARD),
        **numbers(OF_IMAGES, int(image_start[-1])),
    )


def _header(like: ShardHeader, name: str, columns: ShardColumns) -> ShardHeader:
    """That of a shard which was indexed, with what differs in this one."""
    return replace(
        like,
        shard=name,
        bytes=1 << 20,
        version="0",
        samples=len(columns),
        images=len(columns.image_offset),
        text_tokens=int(columns.text_tokens.sum(dtype=np.int64)),
        supervised_tokens=int(columns.supervised_tokens.sum(dtype=np.int64)),
        digest=columns.digest(),
    )
