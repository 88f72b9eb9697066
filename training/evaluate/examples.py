"""Held-out samples as prompts and reference answers, in batches that do not depend on the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chat import (
    ChatSettings,
    TokenizedChat,
    expand_images,
    tokenize_chat,
    tokenize_prompt,
)
from data_pipeline.decode import image_tiles
from data_pipeline.errors import InputError
from data_pipeline.index import Index, load_index
from data_pipeline.index.index_files import find_index_files
from data_pipeline.index.open_index import read_headers
from data_pipeline.mixture import Mixture
from data_pipeline.plan.window_samples import gather
from data_pipeline.storage import Storage, StoreError
from data_pipeline.tiling import TilingSettings
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from training.evaluate.in_training import ALL
from training.evaluate.options import NO_OPTIONS, Options, options_in, options_of
from training.evaluate.scorers import CHOICE, EXACT, METRICS, option_letter
from training.generate import LoadedModel, user_errors
from training.generate.template import template_settings, with_image_newlines

MAX_ROWS = 32


@dataclass(frozen=True)
class Example:
    """A sample's last answer, and what comes before it.

    chat: the prompt, up to the answer's first token. answer_ids: the reference, end of turn
    included. options: of multiple choice, label -> text. tiles: per image, uint8 [tiles, 3, S, S].
    bad: why it cannot be used, else None.
    """

    sample: int
    name: str
    detail: str = ALL
    metric: str = EXACT
    references: list[str] = field(default_factory=list)
    has_alternatives: bool = False
    options: Options = field(default_factory=lambda: NO_OPTIONS)
    chat: TokenizedChat = field(default_factory=lambda: TokenizedChat([], [], []))
    answer_ids: list[int] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)
    bad: str | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return sum(map(len, self.tiles))


class HeldOut:
    """The samples of indexed shards, as the model takes them.

    Args:
        loaded: whose tokenizer, chat template and tiling are used.
        patterns: the shards.
        tokenizer: what the index was made with, where it is not the model folder's.
        index_dir: where the index is, if not beside the shards.
        limit: so many samples, evenly spread; None for all.
        reduced_jpeg: decode large photographs at a smaller scale, as training may.

    Raises:
        InputError: the shards are not indexed for this model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        patterns: Sequence[str],
        tokenizer: str | None = None,
        index_dir: Path | None = None,
        limit: int | None = None,
        reduced_jpeg: bool = False,
    ) -> None:
        template = template_settings(loaded.processor)
        self.chat, self._image_newline = (
            ChatSettings(system=template.system),
            template.image_newline,
        )
        self.tokenizer, index = _open_index(loaded, list(patterns), tokenizer, self.chat, index_dir)
        self.index, self.mixture = index, Mixture.of(index)
        images = loaded.processor.image_processor
        self.tiling = TilingSettings(
            **{name: getattr(images, name) for name in TilingSettings.model_fields}
        )
        self.reduced_jpeg = reduced_jpeg
        self._image_id = self.tokenizer.special_id("<IMG_CONTEXT>")
        total = len(index)
        wanted = min(total, limit or total)
        self.samples = np.unique(np.arange(wanted) * total // wanted)
        self._check_ids(loaded)

    def batches(self, largest_side: int, max_tokens: int) -> list[list[int]]:
        """Every sample once: the longest first, so that too little memory shows at once.

        A batch holds at most `max_tokens` tokens, padding and answers included, at the largest
        side, or one sample.
        """
        every = gather(self.mixture, self.tiling, self.samples, np.zeros(len(self.samples), int))
        lengths = every.lengths_at(largest_side)
        batches: list[list[int]] = []
        longest = 0
        for i in np.lexsort((self.samples, -lengths)).tolist():
            full = not batches or len(batches[-1]) == MAX_ROWS
            if full or (len(batches[-1]) + 1) * longest > max_tokens:
                batches.append([])
                longest = int(lengths[i])
            batches[-1].append(int(self.samples[i]))
        return batches

    def read(self, sample: int) -> Example:
        """One sample; what is wrong with it is in its `bad`."""
        name = self.mixture.name(sample)
        try:
            return self._read(sample, name)
        except (MemoryError, StoreError):  # no fault of the sample
            raise
        except Exception as error:  # decoders meet anything; one sample must not end the run
            known = isinstance(error, InputError)
            return Example(sample, name, bad=str(error) if known else repr(error))

    def prompt_ids(self, example: Example, side: int) -> list[int]:
        """Ids of the prompt with n^2 tokens for each tile."""
        counts = [side * side * len(tiles) for tiles in example.tiles]
        return expand_images(example.chat, counts, self._image_id)[0]

    def _read(self, sample: int, name: str) -> Example:
        content, images = self.mixture.read(sample)
        metadata = content.get("metadata") or {}
        metric = str(metadata.get("metric", EXACT))
        if metric not in METRICS:
            raise InputError(f"metric is {metric!r}; use one of {', '.join(METRICS)}")
        messages = content["messages"]
        if self._image_newline:
            messages = with_image_newlines(messages)
        chat = tokenize_chat(messages, self.tokenizer, self.chat)
        prompt, answer_ids = split_answer(chat)
        sizes = self.mixture.image_sizes(sample).tolist()
        tiles = [
            image_tiles(data, (width, height), self.tiling, self.reduced_jpeg)
            for data, (width, height) in zip(images, sizes, strict=True)
        ]
        said = _text(content["messages"][-1])
        others = metadata.get("answers") or []
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise InputError('metadata "answers" must be a list of texts')
        return Example(
            sample=sample,
            name=name,
            detail=str(metadata.get("detail", ALL)),
            metric=metric,
            references=[said, *others],
            has_alternatives=any(text != said for text in others),
            options=reference_options(metadata, content["messages"], said)
            if metric == CHOICE
            else NO_OPTIONS,
            chat=prompt,
            answer_ids=answer_ids,
            tiles=tiles,
        )

    def _check_ids(self, loaded: LoadedModel) -> None:
        """InputError unless tokenizer and processor turn a few samples into the same ids."""
        for sample in self.samples[:: max(1, len(self.samples) // 4)][:4].tolist():
            messages = self.mixture.read_sample(sample)["messages"]
            for text in map(_text, messages):
                part = {"type": "text", "text": text}
                plain: list[dict[str, Any]] = [{"role": "user", "content": [part]}]
                with user_errors():
                    found = loaded.processor.apply_chat_template(
                        plain, tokenize=True, return_dict=True, return_tensors=None
                    )["input_ids"][0]
                expected = tokenize_prompt(plain, self.tokenizer, self.chat).input_ids
                if list(found) != expected[: len(found)]:
                    raise InputError(
                        f"the tokenizer {self.tokenizer.source}, with which the shards are "
                        f"indexed, gives other ids than {loaded.source}; index the shards with "
                        "the model's tokenizer"
                    )


def _text(turn: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in turn["content"])


def reference_options(
    metadata: Mapping[str, Any], messages: Sequence[dict[str, Any]], said: str
) -> Options:
    """The options of a sample: those of its metadata, those that the question lists, or letters.

    Args:
        said: the reference, which is one of them.

    Raises:
        InputError: the metadata's do not have it.
    """
    given = options_of(metadata)
    listed = given or options_in(_text(messages[-2]))
    if option_letter(said, listed):
        return listed
    if given:
        names = ", ".join(f"{label}: {text}" for label, text in given.items())
        raise InputError(f"the answer {said[:40]!r} is none of the choices {names[:200]}")
    return NO_OPTIONS


def split_answer(chat: TokenizedChat) -> tuple[TokenizedChat, list[int]]:
    """The prompt of a sample's last answer, and the answer's ids with the end of turn."""
    end = len(chat.supervised) - chat.supervised[::-1].index(True)
    begin = end
    while begin and chat.supervised[begin - 1]:
        begin -= 1
    prompt = TokenizedChat(chat.input_ids[:begin], chat.supervised[:begin], chat.image_positions)
    return prompt, chat.input_ids[begin:end]


def _open_index(
    loaded: LoadedModel,
    patterns: list[str],
    tokenizer: str | None,
    chat: ChatSettings,
    index_dir: Path | None,
) -> tuple[Tokenizer, Index]:
    """The index, with the tokenizer given, else the folder's, else the one it was made with."""
    sources = [tokenizer] if tokenizer else [loaded.source]
    first: InputError | None = None
    while sources:
        source = sources.pop(0)
        try:
            opened = load_tokenizer(source)
            return opened, load_index(patterns, opened, chat, index_dir)
        except InputError as error:
            if first is None and not tokenizer:
                sources += _recorded_tokenizers(patterns, index_dir)
            first = first or error
    hint = "" if tokenizer else " (or give the tokenizer of the index with --tokenizer)"
    raise InputError(f"{first}{hint}") from first


def _recorded_tokenizers(patterns: list[str], index_dir: Path | None) -> list[str]:
    """Where the tokenizer of the index was, if the index says so; `_check_ids` trusts nothing."""
    try:
        shards = Storage().expand(patterns)
        headers = read_headers(shards, find_index_files(shards, index_dir))
    except InputError:
        return []
    return sorted({header.tokenizer_source for header in headers})
