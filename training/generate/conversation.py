"""A conversation: what was said, the images shown, the token count in use."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.processor.source_tokenflex import load_rgb
from training.generate.loaded_model import LoadedModel, user_errors


def user_message(prompt: str, images: Sequence[Any]) -> dict[str, Any]:
    """A user's turn; images go where the prompt says `<image>`, or before it.

    Raises:
        InputError: the prompt has placeholders, but not one per image.
    """
    pictures = [{"type": "image", "image": _source(image)} for image in images]
    stretches = prompt.split(PLACEHOLDER)
    if len(stretches) == 1:
        return {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}
    if len(stretches) - 1 != len(images):
        raise InputError(
            f"--prompt has {len(stretches) - 1} {PLACEHOLDER} for {len(images)} images; give one "
            "--image for each, or leave the placeholders out"
        )
    content: list[dict[str, Any]] = []
    for i, stretch in enumerate(stretches):
        content += pictures[i - 1 : i] if i else []
        content += [{"type": "text", "text": stretch}] if stretch else []
    return {"role": "user", "content": content}


@dataclass
class Conversation:
    """Turns so far; `pending` images are shown with the next question."""

    pending: list[Path]
    num_image_tokens: int
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> list[dict[str, Any]]:
        """The conversation with this question as its last turn."""
        return [*self.messages, user_message(question, self.pending)]

    def answered(self, messages: Sequence[dict[str, Any]], answer: str) -> None:
        """Keep what `ask` gave, and its answer."""
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.messages, self.pending = [*messages, turn], []

    def show(self, path: Path) -> None:
        """Show an image with the next question.

        Raises:
            InputError: it cannot be used; with it every question to come would fail.
        """
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        with user_errors():
            load_rgb(path, "the image")
        self.pending.append(path)

    def command(self, line: str, loaded: LoadedModel) -> bool:
        """Obey a line that begins with "/"; False ends the conversation.

        Raises:
            InputError: it is none of the commands, or what it names cannot be used.
        """
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self.messages, self.pending = [], []
        elif name == "/image" and rest:
            self.show(Path(_unquoted(rest)))
        elif name == "/tokens" and rest.strip().isdigit():
            (self.num_image_tokens,) = loaded.check_counts([int(rest)], "/tokens")
        else:
            raise InputError(f"{line.strip()!r} is none of /image PATH, /tokens N, /reset, /quit")
        return True


def _unquoted(text: str) -> str:
    try:
        return " ".join(shlex.split(text)) if text[:1] in "\"'" else text.strip()
    except ValueError:
        return text.strip()


def _source(image: Any) -> Any:
    return str(image) if isinstance(image, Path) else image
