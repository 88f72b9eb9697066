"""lmms-eval's requests and messages as this project's, and what a task cuts off an answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.errors import InputError


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


def name_of(request: Any) -> str:
    """Where a question is from, for messages."""
    _, _, _, number, task, split = request.args
    return f"document {number} of {task} ({split})"


def batches(
    requests: Sequence[Any], size: int, settings_of: Callable[[Any], Any]
) -> Iterator[list[Any]]:
    """Neighbours with the same settings, at most `size` of them."""
    batch: list[Any] = []
    for request in requests:
        if batch and (len(batch) == size or settings_of(request) != settings_of(batch[0])):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch
