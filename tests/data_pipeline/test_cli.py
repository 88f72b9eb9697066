"""The command lines of the data tools: a mistake is one error line and exit status 2."""

import argparse
import re
from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.cli import fraction, run_cli, storage_option
from data_pipeline.index.__main__ import main as index
from data_pipeline.prepare.__main__ import main as prepare
from data_pipeline.stats.__main__ import main as stats

DIGITS = "training/configs/digits.yaml"


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (index, ["shards", "--workers", "0"], "--workers: must be at least 1"),
        (index, ["shards", "--share", "3/3"], "--share: expected K/N"),
        (index, ["shards", "--share", "half"], "--share: expected K/N"),
        (index, ["shards", "--max-bad-fraction", "nan"], "--max-bad-fraction: must be from 0 to 1"),
        (index, ["shards", "--storage-option", "anon"], "--storage-option: expected NAME=VALUE"),
        (index, ["shards", "--storage-option", "anon=[1"], "anon is not valid YAML"),
        (index, ["shards", "--index-dir=$NOT_SET_HERE/x"], "NOT_SET_HERE, which is not set"),
        (index, ["$NOT_SET_HERE"], "NOT_SET_HERE, which is not set"),
        (prepare, ["--format", "digits", "$NOT_SET_HERE/x"], "NOT_SET_HERE, which is not set"),
        (prepare, ["a", "b", "--max-bad-fraction=2"], "--max-bad-fraction: must be from 0 to 1"),
        (prepare, ["--format", "digits", "/proc/no/x"], "/proc/no"),
        (stats, ["plan", DIGITS, "--out=~nobody-of-this-name/x.png"], "--out: .*not known here"),
        (stats, ["plan", DIGITS, "data.pack.max_tokenz=3"], "data.pack.max_tokenz: .*max_tokens"),
        (stats, ["plan", DIGITS, "seed=on"], "seed: expected a number"),
    ],
)
def test_a_mistake_is_one_error_and_exit_status_2(
    command: Callable[[list[str]], Any],
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: command(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("error: ") == 1
    assert re.search(expected, error), error


def test_options_that_are_right() -> None:
    assert storage_option("anon=true") == ("anon", True)
    assert fraction("0.25") == 0.25
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
        fraction("1.5")
