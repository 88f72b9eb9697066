"""YAML for settings: numbers and names as they are meant, nothing dropped, one line for a fault."""

from typing import Any

import pytest

from data_pipeline.errors import InputError
from data_pipeline.yaml_text import ends_early, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("3E8", 3e8),
        ("-4.e+2", -400.0),
        (".5", 0.5),
        ("7_000", 7000),
        ("1_0.5", 10.5),
        ("0x1f", 31),
        ("017", "017"),  # not the octal 15
        ("12:45", "12:45"),  # not 765
        ("2031-07-04", "2031-07-04"),  # not a date
        ("e5", "e5"),
        ("on", True),
        ("No", False),
        ("~", None),
        ("{off: 1, 8: 2}", {"off": 1, "8": 2}),  # names, not a switch and a number
        ("a: &x {p: 1}\nb: {<<: *x, p: 2}", {"a": {"p": 1}, "b": {"p": 2}}),
    ],
)
def test_what_is_meant_is_read(text: str, value: Any) -> None:
    found = read_yaml(text, "file")
    assert found == value and type(found) is type(value)
    assert read_yaml(write_yaml(value), "written") == value


@pytest.mark.parametrize("text", ["1e-6", "3e8", "017", "no", "7", "2031-07-04", "~", ""])
def test_text_stays_text_when_it_is_written(text: str) -> None:
    assert read_yaml(write_yaml({"name": text}), "written") == {"name": text}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p: 1\nq: {}\np: 2\n", r"line 3, column 1: p is written twice \(line 1 and 3\)"),
        (
            "p:\n  q:\n    r: 1\n    s: 2\n    r: 3\n",
            r"line 5.*r is written twice \(line 3 and 5\)",
        ),
        ("p: {q: 1, q: 2}", r"q is written twice \(line 1\)"),
        ("p:\n\tq: 1\n", "line 2, column 1: a tab; indent with spaces"),
        ("p: [1, 2\nq: 3\n", "line 2"),
        ("p: *q", "line 1.*undefined alias"),
        ("p: !!int no", "invalid literal"),
        ("? [1]\n: 2", "a key must be text"),
        ("p: 1\n---\np: 2\n", "line 2.*another document"),
    ],
)
def test_a_fault_is_one_line_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(InputError, match=r"^file\.yaml is not valid YAML.*" + expected) as caught:
        read_yaml(text, "file.yaml")
    assert "\n" not in str(caught.value)


def test_a_comment_behind_a_value_is_seen() -> None:
    assert ends_early("Answer #3") and ends_early("#3") and ends_early("[1] # two")
    assert not any(map(ends_early, ["'Answer #3'", "a#3", "[1, 2] ", ""]))
