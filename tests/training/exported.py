"""A small model that has learned a little, its folder, and held-out shards of all metrics."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.prepare.shard_writer import SampleWriter, ShardLimits
from data_pipeline.tokenizer import load_tokenizer
from tests.training.tiny import make_model, make_processor, picture
from training.model import TokenFlexForConditionalGeneration
from training.model.hub import chatml_template

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def make_folder(folder: Path, samples: int = 24, steps: int = 30) -> tuple[Path, Path]:
    """(model, shards): a model of 4, 9 and 16 tokens that answers some of the samples right."""
    torch.manual_seed(0)
    processor = make_processor(folder / "tokenizer", chat_template=chatml_template(""))
    processor.tokenizer.eos_token = "<|im_end|>"  # as an export has it
    model = make_model(TokenFlexForConditionalGeneration, processor, {"initializer_range": 0.05})
    teach(model, processor, steps)
    model.config.trained_num_image_tokens = [4, 16]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_shards(folder / "shards", samples)
    chat = ChatSettings(system="")
    build_index(str(folder / "shards"), load_tokenizer(folder / "model"), chat)
    return folder / "model", folder / "shards"


def teach(model: Any, processor: Any, steps: int) -> None:
    """Answers to plain coloured pictures."""
    names = list(COLOURS)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for step in range(steps):
        batch = processor(
            messages=[
                [user([{"type": "image", "image": image}, text("What colour?")])]
                for image in (Image.new("RGB", (20, 20), COLOURS[name]) for name in names)
            ],
            num_image_tokens=[4, 16][step % 2],
        )
        answers = [
            processor.tokenizer(name, add_special_tokens=False)["input_ids"] for name in names
        ]
        width = max(map(len, answers)) + 1
        more = torch.full((len(names), width), end)
        labels = torch.full((len(names), batch["input_ids"].shape[1] + width), -100)
        for row, ids in enumerate(answers):
            more[row, : len(ids)] = torch.tensor(ids)
            labels[row, -width : len(ids) + 1 - width or None] = more[row, : len(ids) + 1]
        batch["input_ids"] = torch.cat([batch["input_ids"], more], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def write_shards(out: Path, samples: int) -> None:
    """Plain colours (exact), noise, two images, two turns, other metrics, one damaged image."""
    with SampleWriter(out, ShardLimits(samples=5)) as writer:
        for i in range(samples):
            name = list(COLOURS)[i % 4]
            size = [(20, 20), (40, 20), (20, 60)][i % 3]
            image = Image.new("RGB", size, COLOURS[name])
            metadata: dict[str, Any] = {"detail": ["plain", "wide"][i % 2]}
            answer, images = name, [image]
            if i % 6 == 4:
                metadata = {"detail": "other", "metric": "anls", "answers": [name + "s"]}
            if i == 10:
                metadata = {"detail": "other", "metric": "choice", "choices": [*COLOURS]}
            if i % 6 == 5:
                images.append(picture(i))
            content = [{"type": "image", "image": f"{n}.png"} for n in range(len(images))]
            turns = [user([*content, text("What colour?")]), assistant(answer)]
            if i % 6 == 3:
                turns += [user([text("What colour?")]), assistant(answer)]
            files = {f"{n}.png": png(p) for n, p in enumerate(images)}
            if i == 7:
                files["0.png"] = files["0.png"][:60]  # its header is whole, and indexed
            writer.write(str(i), turns, files, metadata)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}
