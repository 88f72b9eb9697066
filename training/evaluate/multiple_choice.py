"""Which option a free answer states.

An answer is a row of mentions: labels ("B", "(B)") and texts of options. Neighbours joined by "or"
or a comma are one group, which is ambiguous unless it names one option. Of the groups that are not
negated, the last one said to be the answer counts ("the answer is B", "so B", "B is correct"); else
the one that begins a line ("B. a dog"); else what all others agree on. A letter that has no such
place in its sentence is none: "A cat", "Vitamin C", "the U.S. flag".
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

from training.evaluate import cues
from training.evaluate.options import NO_OPTIONS, Options

_REACH = 200  # characters


@dataclass(frozen=True)
class Choice:
    """label: of the option stated, None if there is none. ambiguous: several are."""

    label: str | None
    ambiguous: bool = False


@dataclass(frozen=True)
class _Mention:
    start: int
    end: int
    labels: frozenset[str]
    is_letter: bool


def read_choice(answer: str, options: Options = NO_OPTIONS) -> Choice:
    """The option that an answer states.

    Args:
        options: label -> text; a text is empty where it is not known.
    """
    text = _plain(answer)
    whole = text.strip(" \n.,:;!?()[]<>-")
    same = [label for label in options if label.upper() == whole.upper()]
    same = same or [
        label
        for label in options
        if _key(options[label]) and _joined(options[label]) == _joined(answer)
    ]
    if same:
        return _decide([frozenset(same)])
    groups = [g for g in _groups(_mentions(text, options), text) if not _is_negated(g, text)]
    if stated := [group for group in groups if _is_stated(group, text)]:
        return _decide([stated[-1].labels])
    letters = [group for group in groups if group.is_letter]
    restated = len(options) > 2 and frozenset().union(*(g.labels for g in letters)) >= {*options}
    begun = [group for group in groups if _begins_line(group, text) and not restated]
    return _decide([group.labels for group in begun or letters or groups])


def _decide(found: list[frozenset[str]]) -> Choice:
    named = frozenset[str]().union(*found)
    return Choice(min(named)) if len(named) == 1 else Choice(None, ambiguous=bool(named))


def _plain(text: str) -> str:
    """Without bold, quotes, tags and LaTeX; signs in ASCII; what is boxed as an answer."""
    text = unicodedata.normalize("NFKC", text.rpartition("</think>")[2]).translate(cues.ASCII)
    text = re.sub(r"\\(?:text|math|operator)\w*\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:boxed|fbox)\s*(?:\{([^{}]*)\}|(?=\w))", r" answer: \1 ", text)
    text = re.sub(r"<answer>(.*?)</answer>", r" answer: \1. ", text, flags=re.S | re.I)
    text = re.sub(r"[=\-]+>", ":", re.sub(r"</?[a-z]\w*>", "", text))
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])|[*_`$\\{}]|^#+ ", "", text, flags=re.M)
    return re.sub(r"[ \t]+(?=%)|(?<=[ \t])[ \t]+", "", text).strip()


@lru_cache(maxsize=4096)
def _key(option: str) -> str:
    """An option's text as it is compared."""
    text = re.sub(r"\s+", " ", _plain(option)).lower().strip(" .,:;!?")
    return re.sub(r"^(?:an?|the) (?=\S)", "", text)


def _joined(text: str) -> str:
    return _key(text).replace(" ", "")


def _mentions(text: str, options: Options) -> list[_Mention]:
    """Texts of options, the longer one where two overlap, and letters outside of them, in order."""
    texts: dict[str, set[str]] = {}
    for label, said in options.items():
        if (key := _key(said)) and key.upper() not in options:
            texts.setdefault(key, set()).add(label)
    patterns = [(_text(key), frozenset(texts[key]), False) for key in sorted(texts, key=len)[::-1]]
    patterns += [(_letter(label), frozenset([label]), True) for label in options]
    found: list[_Mention] = []
    for pattern, labels, is_letter in patterns:
        for match in pattern.finditer(text):
            if all(match.end() <= other.start or match.start() >= other.end for other in found):
                found.append(_Mention(match.start(), match.end(), labels, is_letter))
    return _with_place(sorted(found, key=lambda mention: mention.start), text)


@lru_cache(maxsize=4096)
def _text(key: str) -> re.Pattern[str]:
    """An option's text as words of their own, a number as a whole number."""
    words = r"\s+".join(map(re.escape, key.split()))
    if not key.isascii():
        return re.compile(words, re.I)
    number = r"(?<!-)" if key[0].isdigit() else ""
    return re.compile(rf"(?<!\w)(?<!\w-)(?<!\d[.,]){number}{words}(?![\w])(?![.,\-]\w)", re.I)


@lru_cache(maxsize=256)
def _letter(label: str) -> re.Pattern[str]:
    """A label by itself, not in a word, initials or "B-52"; a small letter only where marked."""
    upper, lower = re.escape(label), re.escape(label.lower())
    alone = rf"(?<![A-Za-z0-9'°.\-]){upper}(?![A-Za-z0-9'+])(?!\.[A-Za-z]\b)(?!-\w)"
    cue = r"(?i:^|(?<=answer is )|(?<=answer: )|(?<=answer )|(?<=option ))"
    return re.compile(rf"{alone}|(?<=[(\[]){lower}(?=[)\]])|{cue}{lower}(?=[.):\n]|$)", re.M)


def _with_place(found: list[_Mention], text: str) -> list[_Mention]:
    """Without letters that are no labels; "B. dog", "dog (B)" and even "B. cat" are one B."""
    kept: list[_Mention] = []
    for mention, following in zip_longest(found, found[1:]):
        last = kept[-1] if kept else None
        gap = text[last.end : mention.start] if last else "?"
        beside = last is not None and cues.APPOSITION.fullmatch(gap)
        if mention.is_letter:
            own = following is not None and _explains(following, mention, text)
            if not _is_label(mention, text, own, joined=bool(cues.JOIN.fullmatch(gap))):
                continue
            if last and beside and not last.is_letter and _bracketed(mention, text):
                kept[-1] = replace(mention, start=last.start)
                continue
        elif (
            last and beside and last.is_letter and ("," not in gap or last.labels <= mention.labels)
        ):
            kept[-1] = replace(last, end=mention.end)
            continue
        kept.append(mention)
    return kept


def _around(mention: _Mention, text: str) -> tuple[str, str]:
    """What stands before and after, no more than cues need."""
    cut = max(0, mention.start - _REACH)
    return "\u2026" * (cut > 0) + text[cut : mention.start], text[mention.end :][:_REACH]


def _explains(following: _Mention, letter: _Mention, text: str) -> bool:
    """Whether a letter is followed by its own option's text."""
    apposed = cues.APPOSITION.fullmatch(text[letter.end : following.start])
    return bool(apposed) and not following.is_letter and letter.labels <= following.labels


def _bracketed(mention: _Mention, text: str) -> bool:
    return text[: mention.start].endswith(("(", "[")) and text[mention.end :].startswith((")", "]"))


def _is_label(letter: _Mention, text: str, own: bool, joined: bool) -> bool:
    """Whether a letter is where a label can be; own: its option's text follows."""
    if own or _bracketed(letter, text):
        return True
    before, after = _around(letter, text)
    is_word = text[letter.start : letter.end] in cues.WORDS and re.match(r"\s+\w", after)
    if is_word and not re.match(rf"{cues.REASON}|{cues.VERB}", after):
        return False
    places = (cues.CLAUSE_BEGINS, cues.STATES, cues.CONCLUDES, cues.NAMES)
    return (
        joined or any(place.search(before) for place in places) or bool(cues.CONFIRMED.match(after))
    )


def _groups(mentions: list[_Mention], text: str) -> Iterator[_Mention]:
    """Mentions that are joined, as one of several labels."""
    group: _Mention | None = None
    for mention in mentions:
        gap = text[group.end : mention.start] if group else ""
        if group and _joins(gap, text[mention.end :]):
            labels, is_letter = group.labels | mention.labels, group.is_letter or mention.is_letter
            group = _Mention(group.start, mention.end, labels, is_letter)
            continue
        if group:
            yield group
        group = mention
    if group:
        yield group


def _joins(gap: str, after: str) -> bool:
    """Whether what follows belongs to the same enumeration; "B, C is wrong" is none."""
    if not cues.JOIN.fullmatch(gap):
        return False
    if "\n" in gap or ";" in gap:
        return bool(re.match(r"[.)\]]*\s*(?:[\n;]|$)", after))
    judged = cues.CONFIRMED.match(after) or cues.NEGATED_AFTER.match(after)
    comma = re.fullmatch(r"[ )\]]*,\s*(?:(?:the|an?)\s+)?[(\[ ]*", gap)
    return not (comma and judged) or after.startswith(" are")


def _is_negated(group: _Mention, text: str) -> bool:
    before, after = _around(group, text)
    return bool(cues.NEGATED_BEFORE.search(before) or cues.NEGATED_AFTER.match(after))


def _is_stated(group: _Mention, text: str) -> bool:
    before, after = _around(group, text)
    goes_on = [cues.REASON]
    if group.is_letter:
        goes_on.append(cues.VERB)
    elif text[group.start].isdigit():
        goes_on.append(cues.COUNTED)
    alone = re.search(r"(?:\n|\?|\w\w[.!])\s*$", before) and not after.strip(" .)]")
    return bool(
        cues.STATES.search(before)
        or cues.CONFIRMED.match(after)
        or (re.match("|".join(goes_on), after) and cues.CONCLUDES.search(before))
        or alone
    )


def _begins_line(group: _Mention, text: str) -> bool:
    ends = group.is_letter or re.match(cues.REASON, text[group.end :])
    return bool(ends and cues.LINE_BEGINS.search(_around(group, text)[0]))
