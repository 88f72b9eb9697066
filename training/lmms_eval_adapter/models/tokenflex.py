"""The model as LMMS_EVAL_PLUGINS has it: such a model is given images and text, no messages."""

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL.Image import Image

from data_pipeline.errors import InputError
from training.lmms_eval_adapter.adapter import TokenFlexLmmsEval


class TokenFlexPlugin(TokenFlexLmmsEval):
    """As TokenFlexLmmsEval; the images come before the text."""

    is_simple = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _fatal():
            super().__init__(*args, **kwargs)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """As in TokenFlexLmmsEval."""
        with _fatal():
            return super().generate_until(requests)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered."""
        with _fatal():
            return super().loglikelihood(requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        with _fatal():
            return super().generate_until_multi_round(requests)

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        """Of (context, generation settings, doc_to_visual, document number, task, split)."""
        text, _, doc_to_visual, number, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][number]) or []
        content = [{"type": _kind(image), "url": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    def _wanted(self, request: Any) -> dict[str, Any]:
        return request.args[1]


@contextmanager
def _fatal() -> Iterator[None]:
    """End the process where lmms-eval's command line would pass an exception over, and exit with 0.

    Callers in Python get the exception.
    """
    try:
        yield
    except Exception as error:
        if not _runs_the_command_line():
            raise
        if isinstance(error, InputError):
            raise SystemExit(f"error: {error}") from error
        traceback.print_exc()
        raise SystemExit(1) from error


def _runs_the_command_line() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "lmms_eval.__main__" in (*sys.modules, getattr(spec, "name", None))


def _kind(visual: Any) -> str:
    return "image" if isinstance(visual, Image) else type(visual).__name__
