"""An exported model as a chat model of lmms-eval."""

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipeline.errors import InputError
from training.distributed import local_device
from training.generate import greedy_settings, load_model, user_errors
from training.generate.answer import answer_room, prepare_messages
from training.lmms_eval_adapter.chat_requests import as_messages, batches, cut_at, name_of
from training.lmms_eval_adapter.failed_answers import FailedAnswers
from training.lmms_eval_adapter.model_args import (
    RELEASED,
    share,
    text_or_file,
    whole,
    whole_or_released,
)
from training.lmms_eval_adapter.released_settings import (
    NUM_IMAGE_TOKENS,
    OTHER_NUM_IMAGE_TOKENS,
    released_max_tiles,
    released_num_image_tokens,
)

try:
    from lmms_eval.api.model import lmms as _Base
except ImportError:  # only `main` needs it
    _Base = object

MODEL_ID = "tokenflex"
_MAX_NEW_TOKENS = 1024
_MAX_FAILED_FRACTION = 0.1
_TRUE = (True, 1, "True", "true", "1")


class TokenFlexLmmsEval(_Base):
    """A chat model of lmms-eval; the arguments are its `--model_args`.

    pretrained: an exported folder, or a name on the hub. num_image_tokens, max_tiles: per tile and
    per image, the folder's where they are not given; "released": by the task, as the released
    Ristretto-3B is evaluated (`released_settings`). system: what a conversation begins with, or a
    file that says it. batch_size, device: lmms-eval's. dtype, trust_remote_code: as in
    `load_model`. max_new_tokens: where a task says nothing. max_failed_fraction: the share of
    questions that may fail, their answers empty.

    Raises InputError (a ValueError) for a model or setting that cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_image_tokens: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int | str = _MAX_NEW_TOKENS,
        trust_remote_code: bool | str = False,
        max_tiles: int | str | None = None,
        system: str | None = None,
        max_failed_fraction: float | str = _MAX_FAILED_FRACTION,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(
                f"there is no setting {', '.join(unknown)}; the settings are pretrained, "
                "num_image_tokens, max_tiles, system, dtype, max_new_tokens, max_failed_fraction "
                "and trust_remote_code"
            )
        self.batch_size = whole("batch_size", batch_size)
        self._max_new_tokens = whole("max_new_tokens", max_new_tokens)
        self._max_tiles = whole_or_released("max_tiles", max_tiles)
        self.num_image_tokens = whole_or_released("num_image_tokens", num_image_tokens)
        self._failed = FailedAnswers(share("max_failed_fraction", max_failed_fraction))
        # One GPU per process, as `accelerate launch` and torchrun number them.
        place = (
            torch.device(device) if device else local_device(int(os.environ.get("LOCAL_RANK", 0)))
        )
        if place.type == "cuda" and "LOCAL_RANK" in os.environ:
            place = local_device(int(os.environ["LOCAL_RANK"]))
        tiles = None if self._max_tiles == RELEASED else self._max_tiles
        system = text_or_file(system)
        remote = trust_remote_code in _TRUE
        self._loaded = load_model(pretrained, str(dtype), place, remote, tiles, system)
        self.num_image_tokens = self.num_image_tokens or self._loaded.processor.num_image_tokens
        counts = [self.num_image_tokens]
        if self.num_image_tokens == RELEASED:
            counts = [OTHER_NUM_IMAGE_TOKENS, *NUM_IMAGE_TOKENS.values()]
        self._loaded.check_counts(counts, "num_image_tokens")
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        atexit.register(self._failed.report)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._loaded.device

    @property
    def rank(self) -> int:
        """Of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in order.

        requests: their `args` are (context, doc_to_messages, generation settings, document number,
            task, split), as lmms-eval gives them to chat models.
        """
        from tqdm import tqdm

        answers: list[str] = []
        self._failed.ask(len(requests))
        quiet = True if self._rank else None
        bar = tqdm(total=len(requests), unit="answer", disable=quiet)
        for batch in batches(requests, self.batch_size, self._settings_of):
            answers += self._answer(batch)
            bar.update(len(batch))
        bar.close()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the benchmarks of generated answers need none."""
        raise NotImplementedError("tokenflex answers generate_until tasks only, no loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("tokenflex answers generate_until tasks of one round only")

    @torch.inference_mode()
    def _answer(self, batch: Sequence[Any]) -> list[str]:
        loaded, (wanted, count, tiles) = self._loaded, self._settings_of(batch[0])
        try:
            with user_errors():  # a task's own files, too
                conversations = [as_messages(self._messages(request)) for request in batch]
            inputs = prepare_messages(loaded, conversations, count, tiles)
        except InputError as error:
            if len(batch) > 1:
                return self._one_by_one(batch)
            self._failed.note(name_of(batch[0]), str(error))
            return [""]
        width = inputs["input_ids"].shape[1]
        new_tokens = int(wanted.get("max_new_tokens") or self._max_new_tokens)
        if answer_room(loaded, width) < new_tokens and len(batch) > 1:
            return self._one_by_one(batch)  # the longest prompt must not shorten another's answer
        settings = self._settings(wanted, min(new_tokens, answer_room(loaded, width)))
        output = loaded.model.generate(**loaded.on_device(inputs), generation_config=settings)
        texts = loaded.processor.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [cut_at(text, wanted.get("until")) for text in texts]

    def _one_by_one(self, batch: Sequence[Any]) -> list[str]:
        return [answer for request in batch for answer in self._answer([request])]

    def _settings_of(self, request: Any) -> tuple[dict[str, Any], int, int | None]:
        """A request's generation settings, num_image_tokens and max_tiles."""
        task = request.args[4]
        count, tiles = self.num_image_tokens, self._max_tiles
        if count == RELEASED:
            count = released_num_image_tokens(task)
        if tiles == RELEASED:
            tiles = released_max_tiles(task)
        return self._wanted(request), count, tiles

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        """lmms-eval's messages of a request."""
        _, doc_to_messages, _, number, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][number])

    def _wanted(self, request: Any) -> dict[str, Any]:
        """The generation settings of a request."""
        return request.args[2]

    def _settings(self, wanted: Mapping[str, Any], new_tokens: int) -> Any:
        """Greedy unless the task asks for a temperature."""
        settings = greedy_settings(self._loaded, new_tokens)
        settings.num_beams = int(wanted.get("num_beams") or 1)
        if (wanted.get("temperature") or 0) > 0:
            settings.do_sample, settings.temperature = True, float(wanted["temperature"])
            settings.top_p = float(wanted.get("top_p") or 1.0)
        return settings


def manifest() -> Any:
    """What lmms-eval registers the chat model by."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        chat_class_path=f"training.lmms_eval_adapter.{TokenFlexLmmsEval.__name__}",
    )
