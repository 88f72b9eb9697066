"""What a run's newest checkpoint answers to held-out samples, at every token count it trained."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.inspect.content import picture
from data_pipeline.tiling import grid_for
from training.config import load_config
from training.evaluate.examples import Example, HeldOut
from training.export import export
from training.generate import LoadedModel, generate_answer, load_model

_MOST_TOKENS = 64


@dataclass(frozen=True)
class CountAnswer:
    """The answer with `count` = side * side tokens for each tile."""

    count: int
    side: int
    text: str
    right: bool


@dataclass(frozen=True)
class SampleAnswers:
    """A held-out sample; pictures: (data URI, columns, rows) of each image's tiles."""

    name: str
    question: str
    reference: str
    pictures: list[tuple[str, int, int]]
    answers: list[CountAnswer]


def read_answers(run: Path, number: int) -> list[SampleAnswers]:
    """Greedy answers to so many samples, spread evenly over the run's held-out shards.

    The checkpoint is exported to a temporary folder for it.

    Raises:
        InputError: the run has no held-out shards or no whole checkpoint.
    """
    data = load_config(run / "config.yaml").data
    if not data.eval_shards:
        raise InputError(f"{run} has no held-out shards (data.eval_shards): leave out --samples")
    with tempfile.TemporaryDirectory() as folder:
        export(run, Path(folder) / "model")
        loaded = load_model(str(Path(folder) / "model"))
        held_out = HeldOut(
            loaded, data.eval_shards, data.tokenizer, data.index_dir, number, reduced_jpeg=False
        )
        samples = tqdm(held_out.samples.tolist(), desc="samples", disable=None, leave=False)
        return [_answered(loaded, held_out, sample) for sample in samples]


def _answered(loaded: LoadedModel, held_out: HeldOut, sample: int) -> SampleAnswers:
    example = held_out.read(sample)
    if example.bad:
        return SampleAnswers(example.name, example.bad, "", [], [])
    turns = held_out.mixture.read_sample(sample)["messages"]
    question = "".join(part.get("text", "") for part in turns[-2]["content"]).strip()
    pictures = []
    for tiles, (width, height) in zip(
        example.tiles, held_out.mixture.image_sizes(sample).tolist(), strict=True
    ):
        columns, rows = grid_for(width, height, held_out.tiling)
        pictures.append((picture(tiles[: columns * rows], columns), columns, rows))
    counts = loaded.trained_counts or [loaded.processor.num_image_tokens]
    answers = [_answer(loaded, held_out, example, count) for count in counts]
    return SampleAnswers(example.name, question, example.references[0], pictures, answers)


def _answer(loaded: LoadedModel, held_out: HeldOut, example: Example, count: int) -> CountAnswer:
    side = round(count**0.5)
    ids = torch.tensor([held_out.prompt_ids(example, side)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if example.tiles:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(example.tiles))
        inputs["tile_sides"] = torch.full((example.num_tiles,), side)
    text = generate_answer(loaded, inputs, _MOST_TOKENS).text
    return CountAnswer(count, side, text, text.strip() in map(str.strip, example.references))
