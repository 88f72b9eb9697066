"""A corpus to measure with: photographs that nobody owns, in shards, and a tokenizer."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.prepare.shard_writer import SampleWriter, ShardLimits
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

SIZES = ((640, 480), (480, 640), (800, 600), (1024, 768), (1280, 960), (1200, 1600), (1600, 1200))
_CANVAS = 1600  # pictures of up to this size are cut from a few that are painted once
_NUM_CANVASES = 2
_TEXT = (
    "a the red house with small windows stands beside an old tree and two people walk along "
    "the river while boats wait under a bridge in front of distant hills"
)


@dataclass(frozen=True)
class PhotoCorpus:
    """Shards with their index, and what they were indexed with."""

    shards: Path
    tokenizer: Tokenizer
    chat: ChatSettings
    num_samples: int


def make_corpus(folder: Path, num_samples: int, num_shards: int) -> PhotoCorpus:
    """Samples of one photograph and a few sentences; every tenth has no image."""
    rng = np.random.default_rng(0)
    limits = ShardLimits(samples=-(-num_samples // num_shards))
    texts = []
    with SampleWriter(folder / "shards", limits) as writer:
        for number in range(num_samples):
            question = make_sentence(rng, 12)
            answer = make_sentence(rng, int(rng.integers(20, 200)))
            texts.append(f"{question}\n{answer}")
            content = [{"type": "text", "text": question}]
            images = {}
            if number % 10:
                images = {"0.jpg": make_photo(*SIZES[number % len(SIZES)], seed=number)}
                content.insert(0, {"type": "image", "image": "0.jpg"})
            learned = [{"type": "text", "text": answer}]
            turns = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": learned},
            ]
            writer.write(f"{number:06d}", turns, images)
    train_sentencepiece(texts, folder / "tokenizer.model", 600)
    tokenizer, chat = load_tokenizer(folder / "tokenizer.model"), ChatSettings()
    build_index(str(folder / "shards"), tokenizer, chat)
    return PhotoCorpus(folder / "shards", tokenizer, chat, num_samples)


def make_photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG with the statistics of a photograph: detail at all scales, edges, some grain."""
    rng = np.random.default_rng(seed)
    scale = max(1.0, width / _CANVAS, height / _CANVAS)
    cut = (round(width / scale), round(height / scale))
    left, top = (int(rng.integers(_CANVAS - side + 1)) for side in cut)
    canvas = _canvas(seed % _NUM_CANVASES)
    box = (left, top, left + cut[0], top + cut[1])
    image = canvas.resize((width, height), Image.Resampling.BICUBIC, box)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@lru_cache
def _canvas(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    total = np.zeros((_CANVAS, _CANVAS, 3), dtype=np.float32)
    for octave in range(2, 11):  # amplitude falls with frequency, as in nature
        coarse = rng.normal(0, 150 / 1.7**octave, (2**octave, 2**octave, 3)).astype(np.float32)
        total += np.stack([_enlarge(coarse[..., band]) for band in range(3)], axis=-1)
    image = Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(150):
        x, y, size = (int(value) for value in rng.integers(_CANVAS, size=3))
        color = tuple(int(value) for value in rng.integers(256, size=3))
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape((x, y, x + size // 12, y + size // 12), fill=color)
    grain = rng.normal(0, 3, (_CANVAS, _CANVAS, 1)).astype(np.float32)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def _enlarge(plane: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((_CANVAS, _CANVAS), Image.Resampling.BICUBIC))


def make_sentence(rng: np.random.Generator, words: int) -> str:
    """Words of a few dozen, in no order."""
    known = _TEXT.split()
    return " ".join(known[i] for i in rng.integers(len(known), size=words).tolist())
