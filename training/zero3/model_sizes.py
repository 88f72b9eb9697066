"""How far ahead ZeRO-3 gathers weights, and which it never parts with, from the model's sizes."""

from typing import Any

from data_pipeline.balance.cost import decoder_stack
from training.config import RunConfig


def prefetch_of_model(config: RunConfig) -> dict[str, Any]:
    """Options of ZeRO-3, in elements, by the rules of transformers' Trainer for a width W:

    0.9 W^2 are gathered ahead, parameters of up to 10 W stay whole. Live at a time are the head and
    two decoder layers at most, which no gathering ahead passes.
    """
    llm = dict(config.model.llm.config)
    width = max(int(llm["hidden_size"]), int(config.model.vision.config["hidden_size"]))
    head = width * int(llm.get("vocab_size", 0))  # else the tokenizer's, not known here
    live = int(head + 2 * decoder_stack(llm).weights)
    return {
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }
