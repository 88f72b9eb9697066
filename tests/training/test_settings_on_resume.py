"""docs/settings.md, setting by setting: what may change on resume is what the code goes by."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from training.checkpoint import setting_changes
from training.config import RunConfig, load_config
from training.parameters import Schedule
from training.run import Run
from training.start.changes import (
    FIRST,
    HERE,
    ON_RESUME,
    ORIGIN,
    REFUSED,
    SCHEDULE,
    WINDOW,
    origin_of,
    rule_of,
)

# A value of another type stands for another value.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
ROOT = Path(__file__).parents[2]
PARTS = ("vision_model", "projector", "language_model")
ADAPTERS = [
    text
    for part in PARTS
    for text in (f"train.modules.{part}.train=false", f"train.adapters.{part}={{r: 4}}")
]
CONFIG = load_config(ROOT / "training/configs/digits.yaml", ["data.datasets={}", *ADAPTERS])


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, BaseModel, str]]:
    """(setting, section that holds it, its name there) of every setting."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", model, name


SETTINGS = [setting for setting, _, _ in leaves(CONFIG)]


def changed(setting: str) -> RunConfig:
    """The configuration with another value of one setting, whether or not it could run."""
    config = CONFIG.model_copy(deep=True)
    section, name = next((s, name) for key, s, name in leaves(config) if key == setting)
    value = getattr(section, name)
    if isinstance(value, bool):
        value = not value
    elif isinstance(value, int | float):
        value += 1
    elif isinstance(value, list | tuple):
        value = [*value, *value, 1]
    elif isinstance(value, dict):
        value = {**value, "more": 1}
    else:
        value = f"{value or ''}x"
    setattr(section, name, value)
    return config


def fingerprints(config: RunConfig) -> dict[str, Any]:
    """Those of a run, the data's content taken for its name."""
    data = config.data
    sources = {"shards": data.shards, "datasets": str(data.datasets)}
    run = SimpleNamespace(
        config=config,
        mixture=SimpleNamespace(fingerprint=lambda: sources),
        tokenizer=SimpleNamespace(fingerprint=data.tokenizer),
    )
    return Run._fingerprints(run)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_table_says_what_a_changed_setting_does(setting: str) -> None:
    other, rule = changed(setting), rule_of(setting)
    assert setting_changes(CONFIG.model_dump(mode="json"), other.model_dump(mode="json"))
    changes = setting_changes(fingerprints(CONFIG), fingerprints(other))
    of_data = [text for text in changes if text.startswith(("data", "seed:"))]
    expected = {
        WINDOW: bool(of_data) and not any("data.tokenizer" in text for text in changes),
        REFUSED: bool(changes) or setting.startswith("data.prepare"),
        SCHEDULE: Schedule.of(CONFIG.train) != Schedule.of(other.train)
        or setting in ("train.extend", "train.epochs"),
        ORIGIN: origin_of(CONFIG, None) != origin_of(other, None),
        FIRST: not changes,
        HERE: not changes and setting != "checkpoint.resume",
    }
    assert expected[rule], (rule, changes)
    if rule not in (WINDOW, REFUSED):
        assert not changes
    for other_rule in (SCHEDULE, ORIGIN):
        assert rule == other_rule or not expected[other_rule]


def test_the_docs_are_the_table() -> None:
    text = (ROOT / "docs/settings.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert rows == ON_RESUME


def test_every_row_is_of_a_setting() -> None:
    for row in ON_RESUME:
        assert any(setting == row or setting.startswith(f"{row}.") for setting in SETTINGS), row
