"""What a model's chat template adds to messages, read off what it renders."""

from typing import Any, NamedTuple

from data_pipeline.processor.prompt_tokenflex import IMAGE

_PROBE = "question"


class TemplateSettings(NamedTuple):
    """As `chatml_template` takes them."""

    system: str
    image_newline: bool


def template_settings(processor: Any) -> TemplateSettings:
    """The settings of a processor's chat template."""
    text = processor.apply_chat_template([{"role": "user", "content": _PROBE}])
    head, found, rest = text.partition("<|im_start|>system\n")
    system = rest.partition("<|im_end|>")[0] if found and not head else ""
    content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    return TemplateSettings(system, f"{IMAGE}\n{_PROBE}" in text)


def with_image_newlines(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of parts with the line ends that a template with `image_newline` writes."""
    return [
        {**turn, "content": _spaced(turn["content"])} if turn["role"] == "user" else turn
        for turn in messages
    ]


def _spaced(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    leading = True
    for part, following in zip(content, [*content[1:], {}], strict=True):
        leading &= part["type"] != "text"
        found.append(part)
        if leading and not following.get("text", "").startswith("\n"):
            found.append({"type": "text", "text": "\n"})
    return found
