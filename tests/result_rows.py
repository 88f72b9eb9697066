"""A plugin for pytest: a JSON row for each test as it ends, and on with those that did not pass.

python -m pytest -p tests.result_rows --rows FILE.jsonl ...
"""

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, help="file of rows; those that passed are left out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = {row["test"] for row in _rows(config) if row["outcome"] == "passed"}
    before = [item for item in items if item.nodeid in passed]
    config.hook.pytest_deselected(items=before)
    items[:] = [item for item in items if item.nodeid not in passed]


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
        row |= {"when": report.when, "seconds": round(report.duration, 3)}
        if not report.passed:
            row["message"] = str(report.longrepr)[-1000:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--rows"):
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(_Writer(path))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing left to run is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _rows(session.config):
        session.exitstatus = pytest.ExitCode.OK


def _rows(config: pytest.Config) -> list[dict[str, Any]]:
    path = config.getoption("--rows")
    if not path or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
