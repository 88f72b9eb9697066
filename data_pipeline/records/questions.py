"""Records of a question with its answer, and choices, as turns."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.records import vocabulary
from data_pipeline.records.turns import Turn, read_turns
from data_pipeline.records.values import Present, describe, first_of, is_absent, structured

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BEHIND = (".", ")", ":")
"""What stands behind the letter of a choice that has its own, as in "A. a cat"."""


def question_turns(held: Present, key: str, said: Any) -> list[Turn]:
    """The turns of a record told by what is `said` under `key`, a question.

    InputError for what cannot be read.
    """
    if isinstance(said := _turns_in(said), list | tuple):
        return _of_list(held, key, said)
    question = text_of(said, key)
    more = first_of(held, vocabulary.MORE_QUESTION, "more of the question")
    if more:
        question = f"{question}\n{text_of(more[1], more[0])}"
    options = _options(held)
    answer = _answer(held, options)
    lettered = all(option[:1] == x and option[1:2] in _BEHIND for x, option in _numbered(options))
    lines = options if lettered else [f"{x}. {option}" for x, option in _numbered(options)]
    turns = [{"role": "user", "content": "\n".join([question, *lines])}]
    return read_turns([*turns, {"role": "assistant", "content": answer}], key)


def _numbered(options: list[str]) -> Iterator[tuple[str, str]]:
    return zip(_LETTERS, options, strict=False)


def text_of(value: Any, key: str) -> str:
    """A text or number as text; InputError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{key!r} is {describe(value)}, expected a text")
    return value


def _turns_in(value: Any) -> Any:
    """The turns that a cell holds as text; a text that only looks like a list stays one."""
    parsed = structured(value)
    if isinstance(parsed, list) and all(isinstance(turn, Mapping) for turn in parsed):
        return parsed
    return value


def _of_list(held: Present, key: str, said: Any) -> list[Turn]:
    """TRL's prompt and completion, which are turns; or questions with an answer for each."""
    if isinstance(said[0], Mapping):
        found = first_of(held, vocabulary.ANSWER, "the answer")
        return read_turns([*said, *(_turns_in(found[1]) if found else ())], key)
    found = _found_answer(held)
    answers = found[1]
    if not isinstance(answers, list | tuple) or len(answers) != len(said):
        count = len(answers) if isinstance(answers, list | tuple) else 1
        raise InputError(f"{key!r} has {len(said)} questions and {found[0]!r} {count} answers")
    pairs = zip(said, answers, strict=True)
    turns = [
        {"role": role, "content": text_of(text, name)}
        for pair in pairs
        for role, text, name in zip(("user", "assistant"), pair, (key, found[0]), strict=True)
    ]
    return read_turns(turns, key)


def _found_answer(held: Present) -> tuple[str, Any]:
    found = first_of(held, vocabulary.ANSWER, "the answer")
    if found is None and (several := first_of(held, vocabulary.ANSWERS, "the answers")):
        found = several[0], structured(several[1])
    if found is None:
        keys = ", ".join(repr(key) for entries in held.values() for key, _ in entries)
        raise InputError(
            f"there is no answer: expected one of {', '.join(vocabulary.ANSWER)}, found "
            f"{keys[:200]}; --map answer=NAME says which it is"
        )
    return found


def _answer(held: Present, options: list[str]) -> str:
    key, given = _found_answer(held)
    if isinstance(given, list | tuple):
        given = _most_given(given, key)
    if options:
        return _letter(given, options)
    return text_of(given, key)


def _most_given(answers: list[Any] | tuple[Any, ...], key: str) -> Any:
    """The answer that most people gave, of VQA's ten; the first of equals."""
    texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in answers]
    if wrong := [text for text in texts if isinstance(text, list | dict) or is_absent(text)]:
        raise InputError(f"{key!r} holds an answer that is {describe(wrong[0])}, expected texts")
    return Counter(texts).most_common(1)[0][0]


def _letter(answer: Any, options: list[str]) -> str:
    """The letter of the option that an answer names by number (from 0), letter or text."""
    number = answer if isinstance(answer, int) and not isinstance(answer, bool) else None
    if number is not None and (text := str(number)) in options:
        if number < len(options) and options[number] != text:
            raise InputError(f"the answer {text} may be choice {text}, from 0, or its text")
        number = options.index(text)
    if isinstance(answer, str) and answer in options:
        number = options.index(answer)
    elif isinstance(answer, str) and answer.strip("(). ").upper() in _LETTERS[: len(options)]:
        number = _LETTERS.index(answer.strip("(). ").upper() or "?")
    elif isinstance(answer, str) and answer.isdigit():
        number = int(answer)
    if number is None or not 0 <= number < len(options):
        raise InputError(f"the answer {str(answer)[:40]!r} is none of the {len(options)} choices")
    return _LETTERS[number]


def _options(held: Present) -> list[str]:
    found = first_of(held, vocabulary.CHOICES, "the choices")
    lettered = _lettered(held)
    if found is None:
        return lettered
    if lettered:
        raise InputError(f"{found[0]!r} and 'A', 'B' both hold the choices; --ignore one of them")
    choices = structured(found[1])
    if isinstance(choices, Mapping):
        choices = list(choices.values())
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(_LETTERS):
        raise InputError(f"{found[0]!r} is {describe(choices)}, expected a list of 2 to 26 choices")
    return [text_of(choice, found[0]) for choice in choices]


def _lettered(held: Present) -> list[str]:
    """The choices under the keys A, B, ..., as in VLMEvalKit's tables."""
    found = {x: said for x in _LETTERS for key, said in held.get(x.lower(), ()) if key == x}
    if len(found) < 2:
        return []
    if "".join(found) != _LETTERS[: len(found)]:
        raise InputError(f"there are the choices {', '.join(found)}: one between them is missing")
    return [text_of(choice, key) for key, choice in found.items()]
