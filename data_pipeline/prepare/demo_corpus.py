"""One call that makes a demo corpus, for the command line and for the trainer."""

import json
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import file_lock
from data_pipeline.prepare.cells import CellGrids
from data_pipeline.prepare.demo_sample import DemoCorpus, DemoSample, Split
from data_pipeline.prepare.digits import digits_corpus, scans_corpus
from data_pipeline.prepare.grid import grid_corpus
from data_pipeline.prepare.pages import Pages
from data_pipeline.prepare.shard_writer import (
    SampleWriter,
    ShardLimits,
    staged_output,
    write_report,
)

if TYPE_CHECKING:
    from data_pipeline.settings import PrepareSettings  # which load torch

DemoFormat = Literal["digits", "scans", "grid", "pages"]
CELL_CORPORA = {"digits": digits_corpus, "scans": scans_corpus, "grid": grid_corpus}

# Text that the chat template adds, so that it costs few tokens too.
CHAT_TEXTS = ("system\n", "user\n", "assistant\n", "You are a helpful assistant.", "\n")
TOKENIZER_SAMPLES = 2_000
# 256 bytes, the special tokens and the letters alone are about 300 pieces; for its words digits
# needs 360 in all and grid 400.
SMALLEST_VOCAB, VOCAB_STEP, LARGEST_VOCAB = 320, 16, 640


def prepare_demo(
    format: DemoFormat,
    out: Path,
    *,
    train_samples: int,
    eval_samples: int,
    seed: int = 0,
    image_size: int | None = None,
    details: Sequence[int] | None = None,
    limits: ShardLimits | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a demo corpus to `out`: train/*.tar, eval/*.tar, tokenizer.model, prepare.json.

    The content is a pure function of the arguments. Either all of it is written or nothing.

    Args:
        image_size: side of square images in pixels, which every k has to divide; None for the
            corpus' own (32; scans 60). Pages have several sizes.
        details: grid sides k; None for the corpus' own (digits 1, 2; scans 1 to 5; grid 1, 2, 4).
        limits: how large a shard gets.
        overwrite: replace what an earlier call wrote to `out`.

    Returns:
        The report, which is also in prepare.json.

    Raises:
        InputError: a setting that cannot work, or an `out` that may not be written.
    """
    demo = demo_corpus(format, image_size, details)
    num_samples: dict[Split, int] = {"train": train_samples, "eval": eval_samples}
    _check_settings(demo, num_samples, seed)
    report: dict[str, Any] = {"format": format, "seed": seed, **demo.settings}
    with staged_output(out, overwrite=overwrite) as staged:
        for split, total in num_samples.items():
            samples = demo.samples(split, total, seed)
            progress = tqdm(samples, desc=split, total=total, unit="sample", disable=None)
            with SampleWriter(staged / split, limits or ShardLimits()) as writer:
                for number, sample in enumerate(progress):
                    _write_sample(writer, f"{split}-{number:06d}", sample)
            report[split] = {"samples": writer.num_samples, "images": writer.num_images}
        # Of the corpus' own levels, so that all its choices of levels have one vocabulary.
        report["vocab_size"] = train_tokenizer(
            demo_corpus(format), seed, staged / "tokenizer.model"
        )
        write_report(staged, report)
    return report


def demo_corpus(
    format: DemoFormat, image_size: int | None = None, details: Sequence[int] | None = None
) -> DemoCorpus:
    """The corpus of a format; None is its own default.

    Raises:
        InputError: settings that it cannot have, or a package that it needs.
    """
    if format == "pages":
        if image_size is not None or details is not None:
            raise InputError("pages have their own sizes and levels of detail; give neither")
        return Pages()
    return CellGrids(CELL_CORPORA[format](), image_size, details)


def train_tokenizer(demo: DemoCorpus, seed: int, out: Path) -> int:
    """Train the smallest sentencepiece model in which every word of the corpus is one token.

    A cell of an answer is one token, its leading space included. Returns the vocabulary size.
    """
    # Imported here: it brings in transformers, which takes seconds.
    from data_pipeline.tokenizer import load_tokenizer, train_sentencepiece

    texts: list[str] = []
    for sample in demo.texts(TOKENIZER_SAMPLES, seed):
        texts += [*CHAT_TEXTS, *sample]
    # Every name with and without a space in front, however seldom the samples hold it.
    texts += [f"{name} {name}" for name in demo.names] * (TOKENIZER_SAMPLES // 10)
    words = {word for text in set(texts) for word in re.findall(r" ?(?:[A-Za-z]+|[0-9])", text)}
    split_up: list[str] = []
    for vocab_size in range(SMALLEST_VOCAB, LARGEST_VOCAB + 1, VOCAB_STEP):
        train_sentencepiece(texts, out, vocab_size, split_digits=False)
        tokenizer = load_tokenizer(out)
        split_up = sorted(word for word in words if len(tokenizer.encode(word)) != 1)
        if not split_up:
            return tokenizer.vocab_size
    raise RuntimeError(f"with {LARGEST_VOCAB} tokens these words still fall to pieces: {split_up}")


def _write_sample(writer: SampleWriter, name: str, sample: DemoSample) -> None:
    question = [{"type": "image", "image": "0.png"}, {"type": "text", "text": sample.question}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
    ]
    buffer = BytesIO()
    sample.paint().image.save(buffer, "png")
    writer.write(name, messages, {"0.png": buffer.getvalue()}, sample.metadata)


def _check_settings(demo: DemoCorpus, num_samples: Mapping[Split, int], seed: int) -> None:
    for split, number in num_samples.items():
        if number < 1:
            raise InputError(f"the number of {split} samples is {number}; it must be at least 1.")
    if num_samples["eval"] % demo.levels:
        raise InputError(
            f"the number of eval samples is {num_samples['eval']}; it must be a multiple of "
            f"{demo.levels}, so that every level of detail gets the same number."
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
