"""How long answers take, one at a time."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from training.evaluate.examples import HeldOut
from training.generate import LoadedModel, generate_answer

WARM_UP = 2


def measure_latency(
    loaded: LoadedModel, held_out: HeldOut, side: int, samples: int, max_new_tokens: int
) -> dict[str, Any] | None:
    """Medians over a few samples, evenly spread; None if none of them can be used.

    first_token_ms: vision tower and prompt, to the first token; answer_ms: to the last. Reading and
    cutting the image is not in it.
    """
    first, whole, speeds = [], [], []
    chosen = held_out.samples[np.arange(samples) * len(held_out.samples) // samples]
    for number, sample in enumerate([*chosen[:WARM_UP], *chosen]):
        example = held_out.read(int(sample))
        ids = held_out.prompt_ids(example, side) if example.bad is None else []
        if not ids or (loaded.context and len(ids) > loaded.context):
            continue
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if example.tiles:
            pixels = torch.from_numpy(np.concatenate(example.tiles))
            inputs |= {"pixel_values": pixels, "tile_sides": torch.full((len(pixels),), side)}
        answer = generate_answer(loaded, inputs, max_new_tokens)
        if number >= min(WARM_UP, len(chosen)):
            first.append(1000 * answer.first_token_s)
            whole.append(1000 * answer.total_s)
            speeds.append(answer.tokens_per_s)
    if not whole:
        return None
    return {
        "first_token_ms": median(first),
        "answer_ms": median(whole),
        "answer_ms_p90": percentile(whole, 90),
        "tokens_per_s": median(speeds),
        "samples": len(whole),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed."""
    return float(np.percentile(values, percent, method="higher"))
