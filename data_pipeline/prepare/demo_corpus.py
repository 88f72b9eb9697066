"""One call that makes a demo corpus, for the command line and for the trainer."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import file_lock
from data_pipeline.prepare.cells import CellCorpus, CellSample, Pictures, Split, draw_samples
from data_pipeline.prepare.digits import digits_corpus
from data_pipeline.prepare.grid import grid_corpus
from data_pipeline.prepare.shard_writer import (
    SampleWriter,
    ShardLimits,
    staged_output,
    write_report,
)

if TYPE_CHECKING:
    from data_pipeline.settings import PrepareSettings  # which load torch

CORPORA = {"digits": digits_corpus, "grid": grid_corpus}

# Text that the chat template adds, so that it costs few tokens too.
CHAT_TEXTS = ("system\n", "user\n", "assistant\n", "You are a helpful assistant.", "\n")
TOKENIZER_SAMPLES = 2_000
# 256 bytes, the special tokens and the letters alone are about 300 pieces; for its words digits
# needs 360 in all and grid 400.
SMALLEST_VOCAB, VOCAB_STEP, LARGEST_VOCAB = 320, 16, 640


def prepare_demo(
    format: Literal["digits", "grid"],
    out: Path,
    *,
    train_samples: int,
    eval_samples: int,
    seed: int = 0,
    image_size: int = 32,
    details: Sequence[int] | None = None,
    limits: ShardLimits | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a demo corpus to `out`: train/*.tar, eval/*.tar, tokenizer.model, prepare.json.

    The content is a pure function of the arguments. Either all of it is written or nothing.

    Args:
        image_size: side of the square images in pixels; every k has to divide it.
        details: grid sides k; None for the corpus' own (digits 1, 2; grid 1, 2, 4).
        limits: how large a shard gets.
        overwrite: replace what an earlier call wrote to `out`.

    Returns:
        The report, which is also in prepare.json.

    Raises:
        InputError: a setting that cannot work, or an `out` that may not be written.
    """
    corpus = CORPORA[format]()
    details = corpus.details if details is None else tuple(details)
    num_samples: dict[Split, int] = {"train": train_samples, "eval": eval_samples}
    _check_settings(details, image_size, num_samples, seed)
    pictures = Pictures(corpus, image_size)
    report: dict[str, Any] = {
        "format": format,
        "seed": seed,
        "image_size": image_size,
        "details": details,
    }
    with staged_output(out, overwrite=overwrite) as staged:
        for split, total in num_samples.items():
            samples = draw_samples(corpus, split, total, details, seed)
            progress = tqdm(samples, desc=split, total=total, unit="sample", disable=None)
            with SampleWriter(staged / split, limits or ShardLimits()) as writer:
                for number, sample in enumerate(progress):
                    _write_sample(writer, f"{split}-{number:06d}", sample, pictures.draw(sample))
            report[split] = {"samples": writer.num_samples, "images": writer.num_images}
        report["vocab_size"] = train_tokenizer(corpus, seed, staged / "tokenizer.model")
        write_report(staged, report)
    return report


def train_tokenizer(corpus: CellCorpus, seed: int, out: Path) -> int:
    """Train the smallest sentencepiece model in which every word of the corpus is one token.

    A cell of an answer is one token, its leading space included. Returns the vocabulary size.
    """
    # Imported here: it brings in transformers, which takes seconds.
    from data_pipeline.tokenizer import load_tokenizer, train_sentencepiece

    texts: list[str] = []
    for sample in draw_samples(corpus, "train", TOKENIZER_SAMPLES, corpus.details, seed):
        texts += [*CHAT_TEXTS, sample.question, sample.answer]
    # Every name with and without a space in front, however seldom the samples hold it.
    texts += [f"{name} {name}" for name in corpus.names] * (TOKENIZER_SAMPLES // 10)
    words = {word for text in set(texts) for word in re.findall(r" ?(?:[A-Za-z]+|[0-9])", text)}
    split_up: list[str] = []
    for vocab_size in range(SMALLEST_VOCAB, LARGEST_VOCAB + 1, VOCAB_STEP):
        train_sentencepiece(texts, out, vocab_size, split_digits=False)
        tokenizer = load_tokenizer(out)
        split_up = sorted(word for word in words if len(tokenizer.encode(word)) != 1)
        if not split_up:
            return tokenizer.vocab_size
    raise RuntimeError(f"with {LARGEST_VOCAB} tokens these words still fall to pieces: {split_up}")


def _write_sample(writer: SampleWriter, name: str, sample: CellSample, image: bytes) -> None:
    question = [{"type": "image", "image": "0.png"}, {"type": "text", "text": sample.question}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
    ]
    metadata = {
        "detail": f"k={sample.k}",
        "question": sample.kind,
        "cells": list(sample.layout),
    }
    writer.write(name, messages, {"0.png": image}, metadata)


def _check_settings(
    details: Sequence[int], image_size: int, num_samples: Mapping[Split, int], seed: int
) -> None:
    if not details or len(set(details)) != len(details):
        raise InputError(f"the grid sides are {list(details)}; give one or more different ones.")
    for k in details:
        if not 1 <= k <= 9 or image_size % k or image_size < 4 * k:
            raise InputError(
                f"a grid side of {k} does not go with an image size of {image_size}: it has to be "
                "1 to 9, divide the image size, and leave at least 4 px for a cell."
            )
    for split, number in num_samples.items():
        if number < 1:
            raise InputError(f"the number of {split} samples is {number}; it must be at least 1.")
    if num_samples["eval"] % len(details):
        raise InputError(
            f"the number of eval samples is {num_samples['eval']}; it must be a multiple of "
            f"{len(details)}, so that every grid side gets the same number."
        )
    if seed < 0:
        raise InputError(f"the seed is {seed}; it must not be negative.")


def prepare_once(settings: "PrepareSettings") -> None:
    """Write the demo corpus of a run's settings unless it is there.

    Raises:
        InputError: if the corpus there was written with other settings.
    """
    if not settings.out.exists():
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(settings.out.with_name(f".{settings.out.name}.lock")):
            if not settings.out.exists():  # else another run wrote it meanwhile
                prepare_demo(
                    settings.format,
                    settings.out,
                    train_samples=settings.train_samples,
                    eval_samples=settings.eval_samples,
                    seed=settings.seed,
                )
    _check_prepared(settings)


def _check_prepared(settings: "PrepareSettings") -> None:
    """InputError if the demo corpus on disk was written with other settings."""
    report = settings.out / "prepare.json"
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    wanted = {
        "format": settings.format,
        "seed": settings.seed,
        "train": settings.train_samples,
        "eval": settings.eval_samples,
    }
    there = {
        key: found[key]["samples"] if key in ("train", "eval") else found[key]
        for key in wanted
        if key in found
    }
    if there != wanted:
        raise InputError(
            f"{settings.out} was prepared with {there or 'something else'}, data.prepare asks for "
            f"{wanted}; remove the folder, or name another in data.prepare.out"
        )
