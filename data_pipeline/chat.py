"""Chat messages -> token ids and a mask of what is supervised, in the ChatML template.

    <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n...<|im_end|>\n
    <|im_start|>assistant\n{answer}<|im_end|>\n

The markers are placed by id and every stretch of text between them is tokenised by itself. A
prompt therefore has the ids it had in training, and text cannot forge a marker. An image leaves
only its <img> and </img> here: how many <IMG_CONTEXT> tokens go between them is drawn later.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from data_pipeline.captions import parse_metadata
from data_pipeline.config_file import Settings
from data_pipeline.errors import InputError, for_users
from data_pipeline.media_claims import check_no_claim
from data_pipeline.processor import prompt_tokenflex
from data_pipeline.processor.prompt_tokenflex import DEFAULT_SYSTEM, SPECIAL_TOKENS, kind_of
from data_pipeline.tokenizer import Tokenizer

# Part of every fingerprint: raise it when the same messages would get other ids or labels.
_TEMPLATE_VERSION = 1

Messages = Sequence[Mapping[str, Any]]

check_messages = for_users(prompt_tokenflex.check_messages)


class ChatSettings(Settings):
    """How messages become a prompt."""

    template: Literal["chatml"] = "chatml"
    system: str = DEFAULT_SYSTEM
    """Used where a sample has no system turn of its own; empty: no system turn."""


@dataclass
class TokenizedChat:
    """A sample before its images are given their tokens.

    input_ids: each image contributes only <img> and </img>.
    supervised: one flag per id; True on assistant content and its <|im_end|>.
    image_positions: per image, in reading order, the index in `input_ids` where its <IMG_CONTEXT>
        run is inserted, i.e. the index of its </img>.
    """

    input_ids: list[int]
    supervised: list[bool]
    image_positions: list[int]


def tokenize_chat(
    messages: Messages, tokenizer: Tokenizer, settings: ChatSettings, checked: bool = False
) -> TokenizedChat:
    """Tokenise a whole sample, its last turn being the assistant's.

    InputError if there is nothing whole to learn from; `checked` as in `check_sample`.
    """
    check_sample(messages, checked)
    return _render(messages, tokenizer, settings)


def tokenize_prompt(
    messages: Messages, tokenizer: Tokenizer, settings: ChatSettings
) -> TokenizedChat:
    """Tokenise messages that end with the user's turn, up to and with "<|im_start|>assistant\\n".

    The ids are exactly those with which the same messages begin in `tokenize_chat` when an answer
    follows. Nothing is supervised but earlier answers. InputError as in `tokenize_chat`.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise InputError("a prompt ends with the user's turn; leave out the answer")
    chat = _render(messages, tokenizer, settings)
    opening = [tokenizer.special_id("<|im_start|>"), *_fixed_ids(tokenizer, "assistant\n")]
    chat.input_ids += opening
    chat.supervised += [False] * len(opening)
    return chat


def expand_images(
    chat: TokenizedChat, image_tokens: Sequence[int], image_context_id: int
) -> tuple[list[int], list[bool]]:
    """Insert `image_tokens[i]` context tokens for image i; returns (input_ids, supervised).

    Both have length len(chat.input_ids) + sum(image_tokens). InputError unless there is one
    non-negative count per image.
    """
    if len(image_tokens) != len(chat.image_positions) or min(image_tokens, default=0) < 0:
        raise InputError(
            f"{len(chat.image_positions)} images in the sample need as many token counts >= 0, "
            f"got {list(image_tokens)}"
        )
    ids: list[int] = []
    supervised: list[bool] = []
    start = 0
    for position, count in zip(chat.image_positions, image_tokens, strict=True):
        ids += chat.input_ids[start:position]
        supervised += chat.supervised[start:position]
        ids += [image_context_id] * count
        supervised += [False] * count
        start = position
    return ids + chat.input_ids[start:], supervised + chat.supervised[start:]


def template_fingerprint(settings: ChatSettings) -> str:
    """Hex digest of everything besides the tokenizer that decides ids and labels."""
    definition = {"version": _TEMPLATE_VERSION, "specials": SPECIAL_TOKENS, **settings.model_dump()}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def image_names(messages: Messages) -> list[str]:
    """Image names of checked messages, in reading order; "0.png" is the member "{key}.0.png"."""
    return [
        part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"
    ]


def parse_sample(data: bytes) -> dict[str, Any]:
    """The JSON member of a sample: {"messages": [...], "metadata": {...}}, messages checked.

    InputError saying what is wrong with it, for any bytes whatever.
    """
    sample = parse_metadata(data)
    if "messages" not in sample:
        raise InputError('the JSON is not an object with the key "messages"')
    if not isinstance(sample.get("metadata", {}), dict):
        raise InputError(f'"metadata" is {kind_of(sample["metadata"])}, not an object')
    check_messages(sample["messages"])
    return sample


def check_sample(messages: Any, checked: bool = False) -> None:
    """InputError unless messages are a sample to learn from; the same rules for every reader.

    Besides `check_messages`: the last turn is the assistant's, every answer says something, every
    question has content, and no text but the assistant's claims a picture that is not shown.

    checked: messages have passed `check_messages`.
    """
    if not checked:
        check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise InputError("the last turn is not the assistant's: there is no answer to learn from")
    for number, turn in enumerate(messages):
        role, content = turn["role"], turn["content"]
        texts = [part["text"] for part in content if part["type"] == "text"]
        images = len(content) - len(texts)
        said = texts[0] if len(texts) == 1 else "".join(texts)
        is_empty = not said or said.isspace()
        if role == "assistant":
            if is_empty:
                raise InputError(f"turn {number} is an empty answer; leave the sample out")
            continue
        if role == "user" and not images and is_empty:
            raise InputError(f"turn {number} has no user text and no image; leave the sample out")
        for text in texts:
            check_no_claim(text, f"turn {number}", images)


def _render(messages: Messages, tokenizer: Tokenizer, settings: ChatSettings) -> TokenizedChat:
    if settings.system and messages[0]["role"] != "system":
        system = {"role": "system", "content": [{"type": "text", "text": settings.system}]}
        messages = [system, *messages]
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.end_of_turn_id
    image = [tokenizer.special_id("<img>"), tokenizer.special_id("</img>")]
    after_turn = _fixed_ids(tokenizer, "\n")
    ids: list[int] = []
    image_positions: list[int] = []
    answers: list[slice] = []
    for turn in messages:
        ids += [start, *_fixed_ids(tokenizer, turn["role"] + "\n")]
        begun = len(ids)
        for text in _segments(turn["content"]):
            if text is None:
                image_positions.append(len(ids) + 1)
            ids += image if text is None else tokenizer.encode(text)
        ids.append(end)
        if turn["role"] == "assistant":
            answers.append(slice(begun, len(ids)))
        ids += after_turn
    supervised = [False] * len(ids)
    for answer in answers:
        supervised[answer] = [True] * (answer.stop - answer.start)
    return TokenizedChat(ids, supervised, image_positions)


def _segments(parts: Sequence[Mapping[str, str]]) -> Iterator[str | None]:
    """The content in order: a text (neighbouring text parts joined), or None for an image."""
    texts: list[str] = []
    for part in parts:
        if part["type"] == "text":
            texts.append(part["text"])
            continue
        if texts:
            yield "".join(texts)
        texts = []
        yield None
    if texts:
        yield "".join(texts)


@lru_cache(maxsize=256)
def _fixed_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of the few texts that every sample has; tokenised once per tokenizer."""
    return tuple(tokenizer.encode(text))
