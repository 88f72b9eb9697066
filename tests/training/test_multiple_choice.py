"""What answers to multiple-choice questions are read as, here and by other evaluators."""

import json
import re
import subprocess
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest

from data_pipeline.errors import InputError
from tests.environments.python import python_with
from training.evaluate.examples import reference_options
from training.evaluate.multiple_choice import Choice, read_choice
from training.evaluate.options import NO_OPTIONS, options_in, options_of
from training.evaluate.scorers import choice, score_text

ANSWERS = Path(__file__).with_name("choice_answers.jsonl")
"""Answers to options, what they state ("several" if they are ambiguous), and what others read:
lmms-eval 0.7.3 ("mmmu": MMMU's rule, null where it guesses; "shared": its rule for MMBench and
RealWorldQA) and VLMEvalKit's can_infer, in the form that takes a letter among the last five words.
The last is written down from a copy of that rule, as the package is not installed."""

MODEL_PAGE = Path(__file__).parents[2] / "docs" / "model.md"
COLUMNS = ("mmmu", "shared", "vlmevalkit")

LMMS_EVAL = """
import importlib.util, json, pathlib, random, sys
sys.path.insert(0, str(pathlib.Path(importlib.util.find_spec("lmms_eval").origin).parent / "tasks"))
from _task_utils import mcq_extract, mmmu_mcq_utils  # without the package, which takes seconds
random.choice = lambda choices: None
for line in sys.stdin:
    answer, options = json.loads(line)
    mmmu = mmmu_mcq_utils.parse_mmmu_multi_choice_response(answer, list(options), options)
    print(json.dumps([mmmu, mcq_extract.extract_mcq_answer(answer, list(options)) or None]))
"""


def rows() -> list[dict[str, Any]]:
    found = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]
    return [row | {"options": options_of({"choices": row["options"]})} for row in found]


def compared() -> list[dict[str, Any]]:
    return [row for row in rows() if "mmmu" in row]  # the others know letters only


def test_every_answer_is_read_as_it_is_meant() -> None:
    read = {}
    for row in rows():
        found = read_choice(row["answer"], row["options"])
        read[row["answer"], str(row["options"])] = "several" if found.ambiguous else found.label
    meant = {(row["answer"], str(row["options"])): row["here"] for row in rows()}
    assert len(meant) > 300
    assert {k: (read[k], meant[k]) for k in meant if read[k] != meant[k]} == {}


def test_lmms_eval_reads_what_is_recorded() -> None:
    python = python_with("lmms_eval", "lmms")
    asked = [json.dumps([row["answer"], row["options"]]) for row in compared()]
    done = subprocess.run(
        [python, "-c", LMMS_EVAL],
        input="\n".join(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [[row["mmmu"], row["shared"]] for row in compared()]


def test_the_page_tells_the_differences() -> None:
    page = MODEL_PAGE.read_text()
    assert f"list of {len(compared())} answers" in page
    for column in COLUMNS:
        same = sum(
            (row[column] or "") == (row["here"] or "").replace("several", "") for row in compared()
        )
        assert re.search(rf"\b{same}\b", page), (column, same)
    shown = re.findall(r"^\| `(.+?)` +\| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", page, re.M)
    assert len(shown) >= 8
    known = [[row["answer"], *(row[k] or "none" for k in ("here", *COLUMNS))] for row in compared()]
    assert all([cell.strip() for cell in row] in known for row in shown)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("**C**", "C"),
        ("\\boxed{C}", "C"),
        ("The U.S. flag is shown, so C.", "C"),
        ("C\nBecause it flies.", "C"),
        ("A bird flies", None),
        ("I think it is a bird", None),
        ("A or C", None),
    ],
)
def test_letters_are_enough(answer: str, read: str | None) -> None:
    assert read_choice(answer).label == read_choice(answer, NO_OPTIONS).label == read
    assert choice(answer, "C") == (read == "C")


def test_a_score_goes_by_the_options() -> None:
    options = {"A": "Vitamin C", "B": "Vitamin D"}
    assert score_text("choice", "vitamin C", ["A"], options) == 1
    assert score_text("choice", "Vitamin C", ["(A) Vitamin C"], options) == 1
    assert score_text("choice", "Vitamin D", ["Vitamin C", "B"], options) == 1
    assert score_text("choice", "Vitamin C or D", ["B"], options) == 0
    assert choice("Hepatitis C.", "Vitamin C") == 0
    assert choice("vitamin c", "Vitamin C.") == 1
    assert read_choice("Vitamin C or Vitamin D", options) == Choice(None, ambiguous=True)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. a cat\nB. a dog", ["a cat", "a dog"]),
        ("Which?\n(A) a cat\n(B) a dog\nAnswer with the letter.", ["a cat", "a dog"]),
        ("Which?\nOptions:\nA: 3.5\nB: 4\nC: 5", ["3.5", "4", "5"]),
        ("Which? (A) red (B) blue, (C) green", ["red", "blue", "green"]),
        ("Which? A. red B. blue", ["red", "blue"]),
        ("哪个\nA、猫\nB、狗", ["猫", "狗"]),
        ("a) one\nb) two", ["one", "two"]),
        ("A. B. Smith asks:\nA. old\nB. new", ["old", "new"]),
        ("A. an answer of\ntwo lines\nB. one", ["an answer of\ntwo lines", "one"]),
        ("What is in the U.S. flag?", []),
        ("Is vitamin B. good?", []),
    ],
)
def test_options_that_a_question_lists(question: str, options: list[str]) -> None:
    assert options_in(question) == dict(zip(ascii_uppercase, options, strict=False))


def asked(question: str) -> list[dict[str, Any]]:
    turn = {"role": "user", "content": [{"type": "text", "text": question}]}
    return [turn, {"role": "assistant", "content": []}]


def test_where_options_are_from() -> None:
    plain = asked("Which?")
    told = {"A": "cat", "B": "dog"}
    for choices in (["cat", "dog"], told, {"(a)": "cat", "b.": "dog"}, "A. cat B. dog"):
        assert reference_options({"choices": choices}, plain, "dog") == told
    assert reference_options({"Options": ["A. cat", "B. dog"]}, plain, "B") == told
    assert reference_options({"choices": {"1": "cat", "2": "dog"}}, plain, "2") == {
        "1": "cat",
        "2": "dog",
    }
    assert reference_options({}, asked("Which?\nA. cat\nB. dog"), "B") == told
    assert reference_options({}, asked("Points A. and B. are?\nWhich?"), "D") == NO_OPTIONS


@pytest.mark.parametrize("choices", ["cat and dog", 3, [["cat"]], {"A": None}])
def test_choices_of_another_form_are_refused(choices: Any) -> None:
    with pytest.raises(InputError, match=r'"choices".*expected a list'):
        options_of({"choices": choices})


def test_a_reference_must_be_one_of_the_choices() -> None:
    with pytest.raises(InputError, match=r"'bird'.*none of the choices A: cat, B: dog"):
        reference_options({"choices": ["cat", "dog"]}, asked("Which?"), "bird")
