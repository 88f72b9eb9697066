"""A mixture to look at: cut photographs beside captions of text files, with every kind of fault."""

import io
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.prepare.shard_writer import SampleWriter, ShardLimits
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece

EVIL = (
    '<script>document.title = "run"</script> & <img src="http://127.0.0.1:9/x.png"> \u202eabc\u202c'
)
SIZES = [(96, 64), (200, 60), (64, 64), (60, 190), (150, 100), (90, 90)]


def write_mixture(folder: Path) -> Path:
    """Photographs (one to three a sample), captions, faults; all indexed. Returns the config."""
    tokenizer = save_sentencepiece(folder)
    photos = [Image.fromarray(picture) for picture in load_sample_images().images]
    _write_chats(folder / "photos", photos)
    _write_captions(folder / "captions", photos)
    for name in ("photos", "captions"):
        build_index(str(folder / name), load_tokenizer(tokenizer), ChatSettings(system=""))
    _damage_an_image(folder / "photos")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(folder, tokenizer)), encoding="utf-8")
    return config


def write_texts(folder: Path) -> Path:
    """A dataset without a single image; returns the config."""
    tokenizer = save_sentencepiece(folder)
    with SampleWriter(folder / "texts", ShardLimits()) as writer:
        for number in range(40):
            turns = [("user", "hello world"), ("assistant", "a small text " * (1 + number % 7))]
            messages = [{"role": role, "content": [text(content)]} for role, content in turns]
            writer.write(f"text {number}", messages, {})
    build_index(str(folder / "texts"), load_tokenizer(tokenizer), ChatSettings(system=""))
    config = _config(folder, tokenizer)
    config["data"]["datasets"] = {"texts": {"shards": [str(folder / "texts")]}}
    config["data"]["pack"]["max_tokens"] = 128
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def _write_chats(folder: Path, photos: list[Image.Image]) -> None:
    with SampleWriter(folder, ShardLimits(samples=40)) as writer:
        for number in range(90):
            cuts = [_cut(photos, 3 * number + i) for i in range(number % 4)]
            images = {f"{i}.jpg": cut for i, cut in enumerate(cuts)}
            prompt = [*({"type": "image", "image": name} for name in images), text("What is it?")]
            answer = "A small picture in the world. " * (1 + number % 3)
            if number == 5:
                answer = EVIL
            if number == 6:
                answer = "too long " * 300
            turns = [("user", prompt), ("assistant", [text(answer)])]
            if number % 5 == 0:
                turns += [
                    ("user", [text("And?\n\tWhy")]),
                    ("assistant", [text("Gr\u00fc\u00dfe \u4f60\u597d")]),
                ]
            messages = [{"role": role, "content": content} for role, content in turns]
            writer.write(f"photo {number}", messages, images)


def _cut(photos: list[Image.Image], number: int) -> bytes:
    """A part of a photograph as a JPEG file."""
    rng = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    left, top = (int(rng.integers(0, limit)) for limit in (640 - 3 * width, 427 - 2 * height))
    part = photos[number % 2].crop((left, top, left + 3 * width, top + 2 * height))
    buffer = io.BytesIO()
    part.resize((width, height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_captions(folder: Path, photos: list[Image.Image]) -> None:
    """As img2dataset writes them; one caption is empty, and one image no image."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(30):
            caption = "" if number == 3 else f"a red cell in row {number}"
            image = b"<b>not an image</b>" if number == 4 else _cut(photos, number)
            for name, data in ((f"{number:05}.jpg", image), (f"{number:05}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _damage_an_image(folder: Path) -> None:
    """Change one byte of an image that was indexed: it is found when a pack is built."""
    shard = folder / "000000.tar"
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".jpg"))
    data = bytearray(shard.read_bytes())
    data[member.offset_data + member.size // 2] ^= 0xFF
    shard.write_bytes(data)


def _config(folder: Path, tokenizer: Path) -> dict:
    return {
        "seed": 3,
        "data": {
            "datasets": {
                "photos": {"shards": [str(folder / "photos")], "weight": 2},
                "captions": {"shards": [str(folder / "captions")], "weight": 1},
            },
            "tokenizer": str(tokenizer),
            "chat": {"system": ""},
            "tiling": {"tile_size": 32, "max_tiles": 6},
            "tokens": {"counts": [4, 16, 64], "probabilities": [0.3, 0.3, 0.4]},
            "pack": {"max_tokens": 1024, "packs_per_step": 4, "window_samples": 80},
        },
        "model": {
            "vision": {
                "config": {
                    "model_type": "siglip_vision_model",
                    "image_size": 32,
                    "patch_size": 4,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                }
            },
            "llm": {
                "config": {
                    "model_type": "qwen2",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                }
            },
        },
    }
