"""What the export tests run on every rank: a small run, with what it evaluated sample by sample."""

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_pipeline.batch import IGNORE
from data_pipeline.chat import ChatSettings
from data_pipeline.index import load_index
from data_pipeline.loader import PackedBatch
from data_pipeline.plan import PlanState
from data_pipeline.tokenizer import load_tokenizer
from tests.training.scenarios import full_parameters, one_step, tiny_config
from training import checkpoint
from training.config import save_config
from training.distributed import Ranks
from training.evaluate.in_training import evaluate
from training.metrics import MetricsLog, StepMeter
from training.run import Run
from training.zero3.engine import build_engine

Outcome = tuple[bool, int]
"""Whether an answer was right, and how many of its first tokens were, end of turn included."""


def train_and_evaluate(
    ranks: Ranks, corpus: Path, out: Path, steps: int, overrides: list[str]
) -> tuple[dict[str, Any], dict[tuple[int, int], Outcome]]:
    """All parameters after a run, and its outcome by (held-out sample, token count)."""
    config = tiny_config(corpus, f"output_dir={out}", f"train.steps={max(steps, 1)}", *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    run.announce(engine)
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        save_config(config, out / "config.yaml")
    log = MetricsLog(out, ranks, steps, 0)
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    batches = run.loader.steps(PlanState())
    for step in range(1, steps + 1):
        meter.start()
        log.write(step, one_step(engine, next(batches), step, meter, run), show=False)
    batches.close()
    with checkpoint.Saver(out / "checkpoints", config.checkpoint, ranks) as saver:
        saver.save(engine, checkpoint.Progress(steps), run.fingerprints, wait=True)
    with recorded() as outcomes:
        run.evaluate(engine, steps, log)
    log.close()
    return full_parameters(engine), outcomes


@contextmanager
def recorded() -> Iterator[dict[tuple[int, int], Outcome]]:
    """What this rank's evaluations meanwhile find, by (held-out sample, token count)."""
    outcomes: dict[tuple[int, int], Outcome] = {}
    scoring: Any = sys.modules[evaluate.__module__]
    real = scoring.score_answers

    def recording(batch: PackedBatch, predictions: torch.Tensor, losses: torch.Tensor) -> Any:
        scores = real(batch, predictions, losses)
        outcomes.update(_outcomes(batch, predictions, dict(scores)))
        return scores

    scoring.score_answers = recording
    try:
        yield outcomes
    finally:
        scoring.score_answers = real


def generated(
    folder: Path, corpus: Path, asked: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], Outcome]:
    """What a user's greedy decoding of an exported folder finds for these samples and counts."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    index = load_index([str(corpus / "eval")], tokenizer, ChatSettings(system=""))
    outcomes = {}
    for sample, count in asked:
        *prompt, answer = index.read_sample(sample)["messages"]
        expected = tokenizer.encode("".join(part["text"] for part in answer["content"]))
        expected = [*expected, tokenizer.end_of_turn_id]
        images = [Image.open(io.BytesIO(data)) for data in index.read_images(sample)]
        inputs = processor.apply_chat_template(
            _with_images(prompt, images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            num_image_tokens=count,
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=len(expected))
        found = output[0, inputs["input_ids"].shape[1] :].tolist()
        same = [a == b for a, b in zip(found, expected, strict=False)]
        leading = len(same) if all(same) else same.index(False)
        outcomes[sample, count] = (found == expected, leading)
    return outcomes


def _with_images(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    remaining = iter(images)
    return [
        {
            **turn,
            "content": [
                {"type": "image", "image": next(remaining)} if part["type"] == "image" else part
                for part in turn["content"]
            ],
        }
        for turn in messages
    ]


def _outcomes(
    batch: PackedBatch, predictions: torch.Tensor, scores: dict[int, Any]
) -> dict[tuple[int, int], Outcome]:
    right = torch.zeros(len(batch.labels), dtype=torch.bool)
    supervised = batch.labels != IGNORE
    right[supervised] = predictions == batch.labels[supervised]
    found = {}
    for i, sample in enumerate(batch.sample_ids):
        own = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        answer = right[own][supervised[own]]
        leading = int(answer.int().cumprod(0).sum())
        found[sample, batch.sample_sides[i] ** 2] = (bool(scores[sample].exact), leading)
    return found
