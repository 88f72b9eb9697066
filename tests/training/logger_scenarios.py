"""A run's starts as a logger sees them, and what its package has then: for test_loggers.py.

    python -m tests.training.logger_scenarios FOLDER LOGGER FIRST:LAST:closed FIRST:LAST:killed ...

FOLDER/found.json then has what is there, if the last start was closed.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training.config import RunConfig, load_config
from training.distributed import Ranks
from training.metrics import Loggers, MetricsLog
from training.metrics.wandb_offline import records
from training.side_outputs import SideFiles

EVALUATED = 4
STEP = {
    **{"grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1.0, "images_per_s": 1.0},
    **{"padding": 0.0, "data_wait": 0.0, "memory_gib": 0.0},
}


def config_of(folder: Path, *loggers: str, **settings: str) -> RunConfig:
    root = Path(__file__).parents[2]
    given = [f"metrics.{key}={value}" for key, value in settings.items()]
    names = f"metrics.loggers=[{','.join(loggers)}]"
    path = root / "training/configs/digits.yaml"
    return load_config(path, [f"output_dir={folder}", names, *given])


def evaluation(step: int) -> dict[str, Any]:
    result = {"detail": 1, "num_image_tokens": 4, "accuracy": 0.5, "loss": 2.0}
    return {"step": step, "results": [result]}


def open_log(config: RunConfig, first: int, **options: Any) -> MetricsLog:
    files = SideFiles(background=False)
    loggers = partial(Loggers, config, first, files, **options)
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    return MetricsLog(config.output_dir, ranks, 99, first, files, loggers)


def steps(log: MetricsLog, first: int, last: int) -> None:
    """What the loop records from a step to another."""
    for step in range(first + 1, last + 1):
        log.write(step, STEP | {"loss": 1 / step}, show=False)
        if step == EVALUATED:
            log.evaluation(evaluation(step))


def wait_for_position(folder: Path, logger: str, position: int) -> None:
    """Until the logger has been given that row."""
    end = time.monotonic() + 120
    note = folder / "loggers.json"
    while not note.exists() or json.loads(note.read_bytes())[logger]["position"] < position:
        assert time.monotonic() < end
        time.sleep(0.02)


def of_wandb(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(run, row) in the logs of offline runs; a row {"config": ...} at each start."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                run = record.run.run_id
                config = {c.key: json.loads(c.value_json) for c in record.run.config.update}
                yield run, {"config": config["train"]["steps"]}
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield (
                    run,
                    {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items},
                )


def of_mlflow(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("tokenflex").experiment_id
    for run in client.search_runs([experiment]):
        yield run.info.run_id, {"config": int(run.data.params["train.steps"])}
        for key in ("loss", "accuracy/1/4"):
            for metric in client.get_metric_history(run.info.run_id, key):
                yield run.info.run_id, {key: metric.value, "step": metric.step}


def of_trackio(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from trackio.sqlite_storage import SQLiteStorage

    for run in SQLiteStorage.get_runs("tokenflex"):
        yield run, {"config": SQLiteStorage.get_run_config("tokenflex", run)["train"]["steps"]}
        for row in SQLiteStorage.get_logs("tokenflex", run):
            yield run, row


def found(folder: Path, logger: str) -> dict[str, Any]:
    """Runs, the values of config, [step, loss] and [step, accuracy] in the order of steps."""
    rows = list({"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}[logger](folder))
    return {
        "runs": len({run for run, _ in rows}),
        "config": sorted({row["config"] for _, row in rows if "config" in row}),
        "loss": sorted((row["step"], row["loss"]) for _, row in rows if "loss" in row),
        "accuracy": [(r["step"], r["accuracy/1/4"]) for _, r in rows if "accuracy/1/4" in r],
    }


def main(folder: str, logger: str, *starts: str) -> None:
    config = config_of(Path(folder), logger)
    for start in starts:
        first, last, end = start.split(":")
        log = open_log(config, int(first))
        steps(log, int(first), int(last))
        if end == "killed":
            wait_for_position(Path(folder), logger, 2 * int(last))
            os._exit(9)
        log.close()
    Path(folder, "found.json").write_text(json.dumps(found(Path(folder), logger)))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
