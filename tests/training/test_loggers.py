"""metrics.loggers: TensorBoard's scalars for other packages, each step once, in nobody's way."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from tests.environments.python import python_with
from tests.training.logger_scenarios import (
    EVALUATED,
    config_of,
    evaluation,
    open_log,
    steps,
    wait_for_position,
)
from training import train
from training.metrics import check_loggers, logger_thread, loggers
from training.metrics.logger_packages import LoggedRun, _position
from training.metrics.logger_thread import LoggedRow
from training.metrics.wandb_offline import records

ROOT = Path(__file__).parents[2]


class Service:
    """Runs by id, and what a logger does to them; `trouble` is done at the start of each call."""

    def __init__(self, knows: bool = True) -> None:
        self.runs: dict[str, list[LoggedRow]] = {}
        self.started: list[LoggedRun] = []
        self.finished = 0
        self.knows = knows
        self.trouble = lambda call: None

    def logger(self, name: str = "wandb") -> "Fake":
        return Fake(self)


class Fake:
    def __init__(self, service: Service) -> None:
        self.service = service

    def start(self, run: LoggedRun) -> tuple[str, int]:
        self.service.trouble("start")
        self.service.started.append(run)
        self.id = run.id or f"run {len(self.service.runs)}"
        there = self.service.runs.setdefault(self.id, [])
        if not self.service.knows:
            return self.id, run.noted
        return self.id, there[-1].position if there else 0

    def log(self, row: LoggedRow) -> None:
        self.service.trouble("log")
        self.service.runs[self.id].append(row)

    def finish(self) -> None:
        self.service.trouble("finish")
        self.service.finished += 1


def places(rows: list[LoggedRow]) -> list[tuple[int, bool]]:
    return [(row.step, row.evaluation) for row in rows]


def expected(last: int) -> list[tuple[int, bool]]:
    found = [(step, False) for step in range(1, last + 1)]
    return sorted([*found, (EVALUATED, True)])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_thread, "RETRY_S", 0.001)
    monkeypatch.setattr(logger_thread, "LONGEST_RETRY_S", 0.01)
    monkeypatch.setattr(loggers, "CLOSE_S", 60.0)


def a_start(folder: Path, service: Service, first: int, last: int, **settings: str) -> Any:
    log = open_log(config_of(folder, "wandb", **settings), first, make=service.logger)
    steps(log, first, last)
    return log


# What they get


def test_rows_come_in_order_with_tensorboards_tags_and_the_config_once(tmp_path: Path) -> None:
    service = Service()
    a_start(tmp_path / "one", service, 0, 6, project="mine").close()
    (rows,) = service.runs.values()
    assert places(rows) == expected(6) and service.finished == 1
    assert rows[0].values["loss"] == 1 and rows[0].values["train/lr"] == 1e-3
    assert rows[EVALUATED].values == {"accuracy/1/4": 0.5, "eval_loss/1/4": 2.0}
    (run,) = service.started
    assert (run.project, run.name, run.id) == ("mine", "one", None)
    assert run.config["metrics"]["project"] == "mine" and run.config["train"]["steps"]


def test_only_the_first_rank_logs(tmp_path: Path) -> None:
    import torch

    from training.distributed import Ranks
    from training.metrics import MetricsLog

    log = MetricsLog(tmp_path, Ranks(1, 2, 1, torch.device("cpu")), 9, 0, loggers=pytest.fail)
    log.write(1, {}, show=False)
    log.close()


# Resume


@pytest.mark.parametrize("knows", [True, False], ids=["the service knows its last step", "not"])
def test_after_a_resume_no_step_is_twice_or_missing(tmp_path: Path, knows: bool) -> None:
    service = Service(knows)
    a_start(tmp_path, service, 0, 6)  # killed: not closed
    wait_for_position(tmp_path, "wandb", 12)
    a_start(tmp_path, service, 4, 9).close()
    a_start(tmp_path, service, 9, 10).close()
    (rows,) = service.runs.values()
    assert places(rows) == expected(10)
    assert [run.id for run in service.started] == [None, "run 0", "run 0"]


@pytest.mark.parametrize("lacking", [1, 3, 7])
def test_what_a_service_lost_is_logged_again_from_the_record(tmp_path: Path, lacking: int) -> None:
    service = Service()
    a_start(tmp_path, service, 0, 6).close()
    (rows,) = service.runs.values()
    del rows[-lacking:]
    a_start(tmp_path, service, 6, 8).close()
    assert places(rows) == expected(8)
    assert rows[0].values["loss"] == 1 and rows[EVALUATED].values["accuracy/1/4"] == 0.5


def test_an_evaluation_made_up_after_a_restart_is_logged(tmp_path: Path) -> None:
    service = Service()
    a_start(tmp_path, service, 0, 3).close()
    log = open_log(config_of(tmp_path, "wandb"), 3, make=service.logger)
    log.evaluation(evaluation(3))
    log.close()
    assert places(service.runs["run 0"])[-2:] == [(3, False), (3, True)]


def test_a_logger_added_later_gets_the_steps_on_record(tmp_path: Path) -> None:
    open_log(config_of(tmp_path), 0).close()
    steps(open_log(config_of(tmp_path), 0), 0, 5)
    service = Service()
    a_start(tmp_path, service, 5, 7).close()
    assert places(service.runs["run 0"]) == expected(7)


@pytest.mark.parametrize("first, project", [(0, "tokenflex"), (4, "other")])
def test_a_start_from_nothing_or_in_another_project_is_a_new_run(
    tmp_path: Path, first: int, project: str
) -> None:
    service = Service()
    a_start(tmp_path, service, 0, 5).close()
    a_start(tmp_path, service, first, 7, project=project).close()
    assert places(service.runs["run 1"]) == expected(7)


def test_a_broken_note_is_named_and_begins_a_new_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loggers.json").write_text('{"wandb": ')
    service = Service()
    a_start(tmp_path, service, 3, 4).close()
    assert list(service.runs) == ["run 0"] and "loggers.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "step, noted, position",
    [(6, 12, 12), (6, 10, 12), (6, 13, 13), (4, 12, 9), (0, 12, 1), (0, 0, 0)],
)
def test_where_a_service_knows_its_last_step_only(step: int, noted: int, position: int) -> None:
    """The note may be behind it, and ahead of it."""
    assert _position(step, noted) == position


def test_the_end_of_an_offline_file_is_found_over_blocks(tmp_path: Path) -> None:
    """A log of 700 records in pieces, as wandb writes it, cut off in the last one."""
    data = bytearray(b":W&B\0\0\0")
    for number in range(700):
        content, first = b"%03d" % number * 40, True
        while content:
            room = 2**15 - len(data) % 2**15
            if room < 7:
                data += bytes(room)
                continue
            piece, content = content[: room - 7], content[room - 7 :]
            kind = (1 if not content else 2) if first else (4 if not content else 3)
            data += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
    (tmp_path / "run.wandb").write_bytes(data[:-1])
    assert [int(r[:3]) for r in records(tmp_path / "run.wandb")] == list(range(699))
    tail = list(records(tmp_path / "run.wandb", 20_000))
    assert len(tail) < 400 and int(tail[-1][:3]) == 698 and {len(r) for r in tail} == {120}


# Trouble


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_what_fails_for_a_while_is_said_once_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    service, left = Service(), [5]

    def trouble(now: str) -> None:
        if now == call and left[0]:
            left[0] -= 1
            raise ConnectionError("no route")

    service.trouble = trouble
    log = a_start(tmp_path, service, 0, 6)
    if call != "finish":
        wait_for_position(tmp_path, "wandb", 12)
    else:
        left[0] = 1
    log.close()
    assert places(service.runs["run 0"]) == expected(6)
    said = capsys.readouterr().err
    assert said.count("wandb fails: ConnectionError: no route") == 1


def test_one_that_always_fails_ends_and_its_rows_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()

    def trouble(now: str) -> None:
        raise SystemExit("no key")

    service.trouble = trouble
    a_start(tmp_path, service, 0, 6).close()
    said = capsys.readouterr().err
    assert "wandb lacks 7 rows" in said and said.count("wandb fails") == 1 and "no key" in said


def test_of_rows_that_wait_the_oldest_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logger_thread, "KEPT_ROWS", 3)
    service, hold = Service(), threading.Event()
    service.trouble = lambda call: hold.wait(60) if call == "start" else None
    log = a_start(tmp_path, service, 0, 9)
    hold.set()
    log.close()
    assert places(service.runs["run 0"]) == [(7, False), (8, False), (9, False)]
    assert "wandb lacks 7 rows" in capsys.readouterr().err


def test_one_that_hangs_neither_holds_up_a_step_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers, "CLOSE_S", 0.1)
    hangs, fine, hold = Service(), Service(), threading.Event()
    hangs.trouble = lambda call: hold.wait(120) if call == "log" else None
    services = {"wandb": hangs, "mlflow": fine}
    config = config_of(tmp_path, *services)
    log = open_log(config, 0, make=lambda name: services[name].logger())
    steps(log, 0, 6)  # would not come to its end
    wait_for_position(tmp_path, "mlflow", 12)
    log.close()
    hold.set()
    said = capsys.readouterr().err
    assert "wandb lacks 7 rows" in said and "does not answer" in said and "mlflow" not in said
    assert places(fine.runs["run 0"]) == expected(6)


# Settings


def test_one_that_is_not_installed_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = ROOT / "training/configs/digits.yaml"
    given = [f"output_dir={tmp_path}", "metrics.loggers=[wandb,trackio]"]
    assert train.main([str(path), *given]) == 2
    said = capsys.readouterr().err
    assert "metrics.loggers" in said and "pip install wandb trackio" in said


def test_a_folder_of_its_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="pip install mlflow"):
        check_loggers(config_of(tmp_path, "mlflow"))


@pytest.mark.parametrize("names, value", [(["comet"], "comet"), (["wandb", "wandb"], "once")])
def test_a_wrong_list_is_refused(tmp_path: Path, names: list[str], value: str) -> None:
    with pytest.raises(InputError, match=rf"metrics\.loggers[\s\S]*{value}|{value}"):
        config_of(tmp_path, *names)


# The packages, offline


@pytest.fixture(params=["wandb", "mlflow", "trackio"])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Runs logger_scenarios with a package, in its own offline mode."""
    name = request.param
    python = python_with(name, "loggers")
    offline = {
        "WANDB_MODE": "offline",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }

    def call(*starts: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "tests.training.logger_scenarios", str(tmp_path / "run"), name]
        return subprocess.run(
            [*command, *starts],
            env=os.environ | offline,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    yield call


def test_a_package_has_each_step_once_over_kill_and_resume(package: Any, tmp_path: Path) -> None:
    for code, starts in ((9, ("0:6:closed", "4:8:killed")), (0, ("7:9:closed",))):
        start = package(*starts)
        assert start.returncode == code, start.stderr
        assert "lacks" not in start.stderr and "fails" not in start.stderr
    found = json.loads((tmp_path / "run" / "found.json").read_text())
    assert found["loss"] == [[step, 1 / step] for step in range(1, 10)]
    assert found["accuracy"] == [[EVALUATED, 0.5]]
    steps_set = config_of(Path("runs/x")).train.steps
    assert found["runs"] == 1 and found["config"] == [steps_set]
