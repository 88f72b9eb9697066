"""ChatML prompts: from messages to a string that keeps text and markers apart, and back to pieces.

Text from messages travels through the chat template between two delimiters, which nothing else can
write; what is between them is never taken for a marker, and what the template writes is.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MARKERS = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE = "<image>"
"""Where an image goes, in a string."""

# Unicode noncharacters: no text should hold them, and where one does it is written as two.
_OPEN, _CLOSE, _ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
_ESCAPES = {_ESCAPE: _ESCAPE + "0", _OPEN: _ESCAPE + "1", _CLOSE: _ESCAPE + "2"}
_UNESCAPES = {written: char for char, written in _ESCAPES.items()}

# A role and its line end are a stretch of their own.
_PIECE = re.compile(
    f"{_OPEN}(?P<text>[^{_CLOSE}]*){_CLOSE}"
    rf"|{re.escape(TURN_START)}(?P<role>\w+\n)?|(?P<end>{re.escape(TURN_END)})"
    f"|(?P<image>{IMAGE})"
)
# Matches the empty place behind the first character of a marker's literal text.
_INSIDE_MARKER = re.compile(
    "|".join(f"(?<={re.escape(m[0])})(?={re.escape(m[1:])})" for m in MARKERS)
)
_IN_STRINGS = (TURN_START, TURN_END, IMAGE)

_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and SYSTEM -%}
{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: a marker, the place of an image, or a stretch of text."""

    text: str
    is_marker: bool = False
    is_image: bool = False


def chatml_template(system: str = "You are a helpful assistant.") -> str:
    """The Jinja chat template of training.

    system: what is said where a conversation has no system turn of its own; empty: nothing.
    ValueError if it holds a marker.
    """
    for marker in _IN_STRINGS:
        if marker in system:
            raise ValueError(
                f"system holds {marker}, which is a marker of the prompt; leave it out"
            )
    return _TEMPLATE.replace("SYSTEM", json.dumps(system, ensure_ascii=False))


def user_turn(text: str) -> dict[str, Any]:
    """What a user says, with `<image>` for images, as a message."""
    parts: list[dict[str, str]] = []
    for i, stretch in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": stretch}] * bool(stretch)
    return {"role": "user", "content": parts}


def protect(messages: Any, name: str, readable: bool = False) -> list[dict[str, Any]]:
    """A copy of messages whose texts the chat template can only pass on.

    With `readable` the texts stay as they are, and one that holds a marker is a ValueError. So are
    messages of another form than training takes; `name` is the argument that they came in.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{name} must be a list of at least one turn")
    result, before = [], None
    for i, turn in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(turn, Mapping) or "content" not in turn:
            raise ValueError(f'{where} is not a turn {{"role": ..., "content": ...}}')
        role = turn.get("role")
        expected = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        if role not in expected:
            raise ValueError(
                f"{where} has the role {role!r} where {' or '.join(expected)} is expected: an "
                "optional system turn, then user and assistant in turn, the user first"
            )
        parts = list(_checked_parts(turn["content"], role, where))
        for part in parts:
            if part["type"] == "text":
                part["text"] = _readable(part["text"], where) if readable else _quote(part["text"])
        result.append({**turn, "content": parts})
        before = role
    if before == "system":
        raise ValueError(f"{name} has a system turn and nothing after it")
    return result


def parse_prompt(prompt: str) -> list[Piece]:
    """A rendered prompt as its markers, images and stretches of text, in order.

    Neighbouring texts are one stretch, but for a role, which is always a stretch of its own.
    """
    pieces: list[Piece] = []
    run: list[str] = []

    def flush() -> None:
        if run:
            pieces.append(Piece("".join(run)))
            run.clear()

    start = 0
    for match in _PIECE.finditer(prompt):
        if prompt[start : match.start()]:
            run.append(prompt[start : match.start()])
        start = match.end()
        if match["text"] is not None:
            run.append(_unquote(match["text"]))
            continue
        flush()
        if match["image"]:
            pieces.append(Piece(IMAGE, is_image=True))
        elif match["end"]:
            pieces.append(Piece(TURN_END, is_marker=True))
        else:
            pieces.append(Piece(TURN_START, is_marker=True))
            pieces += [Piece(match["role"])] if match["role"] else []
    if prompt[start:]:
        run.append(prompt[start:])
    flush()
    return pieces


def encode_text(tokenizer: Any, text: str, marker_ids: Mapping[str, int], name: str) -> list[int]:
    """Ids of a stretch of text, none of them a marker's, whatever the text contains."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate (U+{ord(text[error.start]):04X}), which no tokenizer "
            "takes; repair the text"
        ) from error
    special = set(marker_ids.values())
    ids = _encode(tokenizer, text)
    if special.isdisjoint(ids):
        return ids
    # A vocabulary that holds a marker as an ordinary piece: cut inside the literal.
    ids = [i for part in _INSIDE_MARKER.split(text) for i in _encode(tokenizer, part)]
    if not special.isdisjoint(ids):
        raise ValueError(f"{name} holds text that the tokenizer turns into a marker: {text[:80]!r}")
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


def _checked_parts(content: Any, role: str, where: str) -> Iterator[dict[str, Any]]:
    """The content's parts, copied; ValueError for other ones than text and images."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where} has a content of type {type(content).__name__}, not parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        image = kind in ("image", "image_url")
        if image and role == "assistant":
            raise ValueError(f"{where} is the assistant's and has an image; move it to the user's")
        if not image and (kind != "text" or not isinstance(part.get("text"), str)):
            raise ValueError(
                f"{where} has a part of type {kind!r}; give "
                '{"type": "text", "text": "..."} or {"type": "image", "image": ...}'
            )
        yield dict(part)


def _readable(text: str, where: str) -> str:
    for marker in _IN_STRINGS:
        if marker in text:
            raise ValueError(
                f"{where} holds the text {marker}, which a string cannot tell from a marker; "
                "give tokenize=True, which can"
            )
    return text


def _quote(text: str) -> str:
    return _OPEN + "".join(_ESCAPES.get(char, char) for char in text) + _CLOSE


def _unquote(text: str) -> str:
    return re.sub(f"{_ESCAPE}[012]", lambda match: _UNESCAPES[match[0]], text)
