"""Exported models loaded and asked: what generate, evaluate, demo and lmms-eval share."""

from training.generate.answer import Answer, TokenClock, generate_answer, greedy_settings
from training.generate.loaded_model import (
    LoadedModel,
    add_model_arguments,
    load_asked,
    load_model,
    user_errors,
)

__all__ = [
    "Answer",
    "LoadedModel",
    "TokenClock",
    "add_model_arguments",
    "generate_answer",
    "greedy_settings",
    "load_asked",
    "load_model",
    "user_errors",
]
