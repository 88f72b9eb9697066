"""ChatML prompts: from messages to a string that keeps text and markers apart, and back to pieces.

Text from messages travels through the chat template between two delimiters, which nothing else can
write; what is between them is never taken for a marker, and what the template writes is.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

SPECIAL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE = "<image>"
"""Where an image goes, in a string."""
DEFAULT_SYSTEM = "You are a helpful assistant."

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
# Matches the empty place behind the first character of a special token's literal text.
_INSIDE_SPECIAL = re.compile(
    "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in SPECIAL_TOKENS)
)
_OBJECT = (dict, Mapping)  # the first alone is found at once
_MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
}
MARKERS = (TURN_START, TURN_END, IMAGE)


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: a marker, the place of an image, or a stretch of text."""

    text: str
    is_marker: bool = False
    is_image: bool = False


def check_messages(messages: Any, stored: bool = True) -> None:
    """ValueError unless messages are turns {"role", "content": [parts]} in a legal order.

    An optional system turn, then user and assistant in alternation, the user first. Parts are
    {"type": "text", "text": str} and {"type": "image", "image": str}; no images in assistant turns.

    stored: as samples hold them. Otherwise a content may also be a string, and an image anything
        that transformers knows: a picture, {"type": "image", "path": ...}, {"type": "image_url"}.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages is {kind_of(messages)}, not a list of at least one turn")
    before = None
    for number, turn in enumerate(messages):
        where = f"turn {number}"
        content = _content(turn, where, stored)
        role = _checked_role(turn.get("role"), before, where)
        for part in () if isinstance(content, str) else content:
            _check_part(part, role, where, stored)
        before = role
    if before == "system":
        raise ValueError("there is a system turn and nothing after it")


def protect(messages: Any, name: str, readable: bool = False) -> list[dict[str, Any]]:
    """A copy of messages whose texts the chat template can only pass on.

    With `readable` the texts stay as they are, and one that holds a marker is a ValueError. So are
    messages of another form than training takes; `name` is the argument that they came in.
    """
    try:
        check_messages(messages, stored=False)
        return [
            {**turn, "content": list(_protected(turn["content"], f"turn {i}", readable))}
            for i, turn in enumerate(messages)
        ]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


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


def encode_text(
    encode: Callable[[str], list[int]], text: str, special_ids: Set[int], name: str
) -> list[int]:
    """Ids of a stretch of text, none of them a special token's, whatever the text contains.

    encode: ids of any text, without BOS or EOS. special_ids: those of `SPECIAL_TOKENS`. name: of
        the text, for messages. ValueError for text that is not valid Unicode.
    """
    if not text.isascii():
        _check_unicode(text, name)
    ids = encode(text)
    if special_ids.isdisjoint(ids):
        return ids
    # A vocabulary that holds a special token as an ordinary piece: cut inside the literal.
    ids = [i for part in _INSIDE_SPECIAL.split(text) for i in encode(part)]
    if not special_ids.isdisjoint(ids):
        raise ValueError(
            f"{name} holds text that the tokenizer turns into a special token: {text[:80]!r}"
        )
    return ids


def encode_fast(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text by a fast tokenizer of transformers; literal special tokens are text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


def kind_of(value: Any) -> str:
    """What a value is, for messages; its repr could be endless, or recurse."""
    return "an empty list" if value in ([], ()) else f"of type {type(value).__name__}"


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate (U+{ord(text[error.start]):04X} at character "
            f"{error.start}), which no tokenizer takes; repair the text"
        ) from error


def _content(turn: Any, where: str, stored: bool) -> Any:
    """A turn's content: a list, or a string where that may be."""
    content = turn.get("content") if isinstance(turn, _OBJECT) else None
    if isinstance(content, list | tuple) or (isinstance(content, str) and not stored):
        return content
    found = f"its content is {kind_of(content)}" if isinstance(turn, Mapping) else kind_of(turn)
    raise ValueError(f'{where} is not an object with "role" and a list "content" of parts: {found}')


def _checked_role(role: Any, before: str | None, where: str) -> str:
    """A turn's role, which may follow the one before."""
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{where} has the role {_short(role)}, not system, user or assistant")
    expected = _MAY_FOLLOW[before]
    if role not in expected:
        raise ValueError(
            f"{where} has the role {role!r} where {' or '.join(expected)} is expected: after "
            "an optional system turn, user and assistant alternate, the user first; merge turns"
        )
    return role


def _check_part(part: Any, role: str, where: str, stored: bool) -> None:
    kind = part.get("type") if isinstance(part, _OBJECT) else None
    if kind == "text" or stored:
        known = kind in ("text", "image") and isinstance(part.get(kind), str)
    else:
        known = kind in ("image", "image_url")
    if not known:
        raise ValueError(
            f'{where} has a part that is neither {{"type": "text", "text": "..."}} nor '
            f'{{"type": "image", "image": "..."}}; its type is {_short(kind)}'
        )
    if kind != "text" and role == "assistant":
        raise ValueError(
            f"{where} is the assistant's and has an image; move it to the user's: an answer is text"
        )


def _short(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


def _protected(content: Any, where: str, readable: bool) -> Iterator[dict[str, Any]]:
    """Copies of a checked content's parts."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content:
        part = dict(part)
        if part["type"] == "text":
            part["text"] = _readable(part["text"], where) if readable else _quote(part["text"])
        yield part


def _readable(text: str, where: str) -> str:
    for marker in MARKERS:
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
