"""An exported model as a chat model of lmms-eval."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from data_pipeline.errors import InputError
from training.distributed import local_device
from training.generate import greedy_settings, load_model
from training.generate.answer import prepare_messages

try:
    from lmms_eval.api.model import lmms as _Base
except ImportError:  # only `main` needs it
    _Base = object

MODEL_ID = "tokenflex"
_MAX_NEW_TOKENS = 1024
_TRUE = (True, 1, "True", "true", "1")


class TokenFlexLmmsEval(_Base):
    """A chat model of lmms-eval; the arguments are its `--model_args`.

    pretrained: an exported folder, or a name on the hub. num_image_tokens: per tile; the folder's
    default where it is not given. batch_size, device: lmms-eval's. dtype, trust_remote_code: as in
    `load_model`. max_new_tokens: where a task says nothing.

    Raises InputError (a ValueError) for a model or count that cannot be used.
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
    ) -> None:
        super().__init__()
        # One GPU per process, as `accelerate launch` and torchrun number them.
        place = (
            torch.device(device) if device else local_device(int(os.environ.get("LOCAL_RANK", 0)))
        )
        if place.type == "cuda" and "LOCAL_RANK" in os.environ:
            place = local_device(int(os.environ["LOCAL_RANK"]))
        self._loaded = load_model(pretrained, dtype, place, trust_remote_code in _TRUE)
        count = num_image_tokens or self._loaded.processor.num_image_tokens
        (self.num_image_tokens,) = self._loaded.check_counts([int(count)], "num_image_tokens")
        self.batch_size = int(batch_size)
        self._max_new_tokens = int(max_new_tokens)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))

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
        quiet = True if self._rank else None
        bar = tqdm(total=len(requests), unit="answer", disable=quiet)
        for batch in _batches(requests, self.batch_size, self._wanted):
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
        conversations = [as_messages(self._messages(request)) for request in batch]
        loaded, wanted = self._loaded, self._wanted(batch[0])
        inputs = prepare_messages(loaded, conversations, self.num_image_tokens)
        output = loaded.model.generate(
            **loaded.on_device(inputs), generation_config=self._settings(wanted)
        )
        texts = loaded.processor.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [cut_at(text, wanted.get("until")) for text in texts]

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        """lmms-eval's messages of a request."""
        _, doc_to_messages, _, number, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][number])

    def _wanted(self, request: Any) -> dict[str, Any]:
        """The generation settings of a request."""
        return request.args[2]

    def _settings(self, wanted: Mapping[str, Any]) -> Any:
        """Greedy unless the task asks for a temperature."""
        new_tokens = int(wanted.get("max_new_tokens") or self._max_new_tokens)
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


def as_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages as the processor takes them; InputError for video and sound."""
    result = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        result.append({"role": message["role"], "content": [_part(part) for part in parts]})
    return result


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the task's stop strings.

    An empty line, lmms-eval's default, is none of them: it would cut an answer's reasoning off.
    """
    stops = [until] if isinstance(until, str) else list(until or [])
    for stop in stops:
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image", "image": part["url"]}
    raise InputError(f"a task has a {part['type']}; tokenflex takes images and text only")


def _batches(
    requests: Sequence[Any], size: int, wanted: Callable[[Any], dict[str, Any]]
) -> Iterator[list[Any]]:
    """Neighbours with the same generation settings, at most `size` of them."""
    batch: list[Any] = []
    for request in requests:
        if batch and (len(batch) == size or wanted(request) != wanted(batch[0])):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch
