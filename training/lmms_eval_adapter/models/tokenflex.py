"""The model as LMMS_EVAL_PLUGINS has it: such a model is given images and text, no messages."""

from typing import Any

from PIL.Image import Image

from training.lmms_eval_adapter.adapter import TokenFlexLmmsEval


class TokenFlexPlugin(TokenFlexLmmsEval):
    """As TokenFlexLmmsEval; the images come before the text."""

    is_simple = True

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        """Of (context, generation settings, doc_to_visual, document number, task, split)."""
        text, _, doc_to_visual, number, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][number]) or []
        content = [{"type": _kind(image), "url": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    def _wanted(self, request: Any) -> dict[str, Any]:
        return request.args[1]


def _kind(visual: Any) -> str:
    return "image" if isinstance(visual, Image) else type(visual).__name__
