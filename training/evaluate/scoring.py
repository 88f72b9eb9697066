"""Scores of a batch of examples at one token count.

An answer that must be exact is right when greedy decoding would produce it, which one forward pass
tells (`forced_decoding`). What other metrics score is generated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.evaluate.examples import Example, HeldOut
from training.evaluate.forced_decoding import forced_answer
from training.evaluate.multiple_choice import read_choice
from training.evaluate.scorers import CHOICE, EXACT, score_text
from training.generate import LoadedModel, greedy_settings, user_errors
from training.generate.answer import answer_room

Row = dict[str, Any]


class Scorer:
    """Scores examples; see the module.

    Args:
        loaded: the model.
        held_out: where the examples are from.
        max_new_tokens: of a generated answer.
        generate_all: generate the answers that must be exact, too.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        held_out: HeldOut,
        max_new_tokens: int,
        generate_all: bool = False,
    ) -> None:
        self._loaded, self._held_out = loaded, held_out
        self._max_new_tokens, self._generate_all = max_new_tokens, generate_all
        self._settings = greedy_settings(loaded, max_new_tokens)

    def score(self, examples: Sequence[Example], side: int) -> list[Row]:
        """One row per example, in order."""
        rows: dict[int, Row] = {}
        forced: list[Example] = []
        asked: list[Example] = []
        for example in examples:
            if example.bad is not None:
                rows[example.sample] = {"bad": example.bad}
            elif self._room(example, side) < self._least(example):
                rows[example.sample] = {"score": 0.0, "answer": None, "too_long": True}
            else:
                (forced if self._can_be_forced(example) else asked).append(example)
        if forced:
            rows |= self._force(forced, side)
        # Alone where an answer may have to end with the context: others would end with it.
        most = self._most([e for e in asked if e.metric == EXACT])
        tight = [e for e in asked if self._room(e, side) < most]
        free = [e for e in asked if self._room(e, side) >= most]
        for batch in ([free] if free else []) + [[example] for example in tight]:
            rows |= self._generate(batch, side, most)
        return [self._describe(example, side) | rows[example.sample] for example in examples]

    def _room(self, example: Example, side: int) -> int:
        """Tokens that an answer can have before the context is full."""
        return answer_room(self._loaded, len(self._held_out.prompt_ids(example, side)))

    def _least(self, example: Example) -> int:
        """Tokens without which the answer cannot be right."""
        return len(example.answer_ids) if self._can_be_forced(example) else 1

    def _most(self, exact: Sequence[Example]) -> int:
        """Tokens of the longest answer generated: none must be wrong for being cut off."""
        return max([self._max_new_tokens, *(len(e.answer_ids) for e in exact)])

    def _can_be_forced(self, example: Example) -> bool:
        alone = example.metric == EXACT and not example.has_alternatives
        return alone and not self._generate_all

    def _describe(self, example: Example, side: int) -> Row:
        row = {"sample": example.sample, "name": example.name}
        if example.bad is not None:
            return row
        return row | {
            "detail": example.detail,
            "metric": example.metric,
            "prompt_tokens": len(self._held_out.prompt_ids(example, side)),
            "answer_tokens": len(example.answer_ids),
            "tiles": example.num_tiles,
        }

    @torch.inference_mode()
    def _force(self, examples: Sequence[Example], side: int) -> dict[int, Row]:
        """One forward over prompts with their reference answers."""
        prompts = [self._held_out.prompt_ids(example, side) for example in examples]
        texts = [p + e.answer_ids for p, e in zip(prompts, examples, strict=True)]
        longest = max(len(e.answer_ids) for e in examples)
        inputs = self._inputs(texts, examples, side)
        mask = inputs["attention_mask"]
        logits = self._loaded.model(
            **inputs,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits
        predictions = logits.argmax(-1).cpu()  # [B, longest + 1]
        rows = {}
        for example, predicted in zip(examples, predictions, strict=True):
            reference = torch.tensor(example.answer_ids)
            found = forced_answer(predicted[-len(reference) - 1 : -1], reference)
            text = self._held_out.tokenizer.decode(found.decoded)
            answer = {"answer": text} if found.exact else {"answer_begins": text}
            rows[example.sample] = {"score": float(found.exact), **answer}
        return rows

    @torch.inference_mode()
    def _generate(self, examples: Sequence[Example], side: int, most: int) -> dict[int, Row]:
        prompts = [self._held_out.prompt_ids(example, side) for example in examples]
        inputs = self._inputs(prompts, examples, side)
        room = answer_room(self._loaded, inputs["input_ids"].shape[1])
        settings = greedy_settings(self._loaded, min(most, room))
        with user_errors():
            output = self._loaded.model.generate(**inputs, generation_config=settings)
        rows = {}
        for example, ids in zip(examples, output[:, inputs["input_ids"].shape[1] :], strict=True):
            answer, ended = self._cut(ids.tolist())
            text = self._held_out.tokenizer.decode(answer)
            if example.metric == EXACT and ended and answer == example.answer_ids[:-1]:
                score = 1.0
            elif example.metric == EXACT and not example.has_alternatives:
                score = 0.0
            else:
                score = score_text(example.metric, text, example.references, example.options)
            rows[example.sample] = {"score": score, "answer": text}
            if example.metric == CHOICE:
                rows[example.sample] |= vars(read_choice(text, example.options))
        return rows

    def _cut(self, ids: list[int]) -> tuple[list[int], bool]:
        """The ids before the end of turn, and whether there is one."""
        ends = self._settings.eos_token_id
        length = next((i for i, id_ in enumerate(ids) if id_ in ends), len(ids))
        return ids[:length], length < len(ids)

    def _inputs(
        self, texts: Sequence[list[int]], examples: Sequence[Example], side: int
    ) -> dict[str, Any]:
        """The model's arguments for these ids, padded on the left."""
        width = max(map(len, texts))
        input_ids = np.full((len(texts), width), self._settings.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(texts), width), dtype=np.int64)
        for row, ids in enumerate(texts):
            input_ids[row, width - len(ids) :] = ids
            mask[row, width - len(ids) :] = 1
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask),
        }
        tiles = [tile for example in examples for tile in example.tiles]
        if tiles:
            pixels = torch.from_numpy(np.concatenate(tiles))
            inputs |= {"pixel_values": pixels, "tile_sides": torch.full((len(pixels),), side)}
        return self._loaded.on_device(inputs)
