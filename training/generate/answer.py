"""Greedy answers, and when each of their tokens came."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from data_pipeline.errors import InputError
from training.generate.loaded_model import LoadedModel, user_errors

END_OF_TURN = "<|im_end|>"


class TokenClock(StoppingCriteria):
    """Notes the time of every token and stops nothing; create it when the question is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []  # seconds since the start, one per token
        self.start = self._now()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Called by `generate` after each token."""
        self.times.append(self._now() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    ids: without the end of turn. prompt_tokens: image tokens included. first_token_s: from the
    prepared inputs to the first token, vision tower included; total_s: to the last. generated:
    tokens, the end of turn included. ended: whether the model ended it, not max_new_tokens.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    image_tokens: int
    first_token_s: float
    total_s: float
    generated: int
    ended: bool

    @property
    def tokens_per_s(self) -> float:
        """Speed behind the first token; 0 where there is no second."""
        seconds = self.total_s - self.first_token_s
        return (self.generated - 1) / seconds if self.generated > 1 and seconds > 0 else 0.0


def stats_line(answer: Answer) -> str:
    """What an answer cost."""
    speed = f"{answer.tokens_per_s:.1f} tokens/s" if answer.tokens_per_s else "one token"
    return (
        f"{answer.prompt_tokens} prompt tokens ({answer.image_tokens} of images), first token "
        f"after {1000 * answer.first_token_s:.0f} ms, then {speed}, {answer.generated} tokens in "
        f"{1000 * answer.total_s:.0f} ms"
    )


def greedy_settings(loaded: LoadedModel, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, whatever the folder's generation_config.json prefers."""
    saved = loaded.model.generation_config
    end = loaded.processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)
    more = saved.eos_token_id
    ends = {end, *(more if isinstance(more, list) else [] if more is None else [more])}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=loaded.processor.tokenizer.pad_token_id,
        suppress_tokens=[loaded.config.image_token_id],
    )


@torch.inference_mode()
def generate_answer(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    streamer: Any = None,
) -> Answer:
    """The greedy answer to one prompt (B = 1), as the processor prepared it.

    It ends where the context does.

    Raises:
        InputError: the prompt is longer than the context.
    """
    room = answer_room(loaded, inputs["input_ids"].shape[1])
    settings = greedy_settings(loaded, min(max_new_tokens, room))
    clock = TokenClock(loaded.device)
    with user_errors():
        output = loaded.model.generate(
            **loaded.on_device(inputs),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([clock]),
            streamer=streamer,
        )
    prompt = inputs["input_ids"]
    ids = output[0, prompt.shape[1] :].tolist()
    ended = bool(ids) and ids[-1] in settings.eos_token_id
    answer = ids[:-1] if ended else ids
    return Answer(
        text=loaded.processor.tokenizer.decode(answer, skip_special_tokens=True),
        ids=answer,
        prompt_tokens=prompt.shape[1],
        image_tokens=int((prompt == loaded.config.image_token_id).sum()),
        first_token_s=clock.times[0],
        total_s=clock.times[-1],
        generated=len(ids),
        ended=ended,
    )


def answer_room(loaded: LoadedModel, prompt_tokens: int) -> int:
    """Tokens of the longest answer: the last one is never read, so that it needs no place."""
    return sys.maxsize if loaded.context is None else loaded.context - prompt_tokens + 1


def prepare_messages(
    loaded: LoadedModel,
    messages: Sequence[Any],
    num_image_tokens: Any,
    max_tiles: int | None = None,
) -> Any:
    """The inputs of a conversation that ends with the user's turn, or of several.

    max_tiles: instead of the processor's.

    Raises:
        InputError: an image cannot be used, or a prompt is too long.
    """
    with user_errors():
        inputs = loaded.processor.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            num_image_tokens=num_image_tokens,
            processor_kwargs={} if max_tiles is None else {"max_tiles": max_tiles},
        )
    longest = int(inputs["attention_mask"].sum(1).max())
    if answer_room(loaded, longest) < 1:
        raise InputError(
            f"the prompt has {longest} tokens, and the context holds {loaded.context}; shorten it, "
            "give fewer images, or lower num_image_tokens or max_tiles"
        )
    return inputs
