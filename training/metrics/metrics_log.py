"""Where the metrics of a run go: metrics.jsonl, evaluations.jsonl, TensorBoard, loggers, a bar."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.distributed import Ranks
from training.metrics.event_file import EventFile
from training.metrics.logger_thread import LoggedRow
from training.metrics.loggers import Loggers
from training.side_outputs import SideFiles, encode_row, keep_rows, read_rows

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class MetricsLog:
    """Rank 0's record of a run: a row per step and per evaluation, TensorBoard, a progress bar.

    Resuming drops the rows and events of steps that will run again, and nothing else.

    Args:
        loggers: makes those that get TensorBoard's scalars, too, from the rows on record.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        steps: int,
        first_step: int,
        files: SideFiles | None = None,
        loggers: Callable[[Callable[[], Iterable[LoggedRow]]], Loggers] | None = None,
    ) -> None:
        self.is_main = ranks.is_main
        self.evaluations: dict[int, dict[str, Any]] = {}
        """By step, those on record; on rank 0 only."""
        if not self.is_main:
            return
        self.folder, self.files = folder, files or SideFiles(background=False)
        for name in (METRICS, EVALUATIONS):
            keep_rows(folder / name, lambda row: not _step(row) > first_step, self.files)
        # Those taken out may still be in the file, which is written later.
        rows = read_evaluations(folder)
        self.evaluations = {row["step"]: row for row in rows if row["step"] <= first_step}
        self.board = EventFile(folder / "tensorboard", first_step, self.files)
        self.loggers = loggers(lambda: _rows_on_record(folder, first_step)) if loggers else None
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=None, leave=False)

    def write(self, step: int, metrics: dict[str, Any], show: bool) -> None:
        """Record the metrics of a 1-based step; `show` also prints its line."""
        if not self.is_main:
            return
        self.files.append(self.folder / METRICS, encode_row({"step": step, **metrics}))
        self._log(LoggedRow(step, _step_values(metrics)))
        self.bar.update()
        if show:
            self.bar.write(step_line(step, int(self.bar.total), metrics))

    def evaluation(self, row: dict[str, Any]) -> None:
        """Record an evaluation, `Evaluation.to_row`, unless it is on record already."""
        if not self.is_main or self.evaluations.get(row["step"]) == row:
            return
        self.evaluations[row["step"]] = row
        self.files.append(self.folder / EVALUATIONS, encode_row(row))
        self._log(LoggedRow(row["step"], _evaluation_values(row), evaluation=True))

    def _log(self, row: LoggedRow) -> None:
        self.board.add(row.values, row.step)
        if self.loggers:
            self.loggers.add(row)

    def close(self) -> None:
        """Wait for what can be written."""
        if self.is_main:
            self.bar.close()
            self.files.flush()
            if self.loggers:
                self.loggers.close()


def _step_values(metrics: dict[str, Any]) -> dict[str, float]:
    return {_tag(k): float(v) for k, v in metrics.items() if isinstance(v, int | float)}


def _evaluation_values(row: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name}/{result['detail']}/{result['num_image_tokens']}": result[key]
        for result in row["results"]
        for name, key in (("accuracy", "accuracy"), ("eval_loss", "loss"))
    }


def _rows_on_record(folder: Path, last_step: int) -> list[LoggedRow]:
    """What has been logged up to a step, in order."""
    rows = [
        LoggedRow(row["step"], _step_values({k: v for k, v in row.items() if k != "step"}))
        for row in read_metrics(folder / METRICS)
    ]
    rows += [LoggedRow(r["step"], _evaluation_values(r), True) for r in read_evaluations(folder)]
    return sorted((r for r in rows if r.step <= last_step), key=lambda row: row.position)


def _tag(name: str) -> str:
    return name.replace("_", "/", 1) if name.startswith("loss") else f"train/{name}"


def step_line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    """One line that says how training goes."""
    line = (
        f"step {step:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  "
        f"grad norm {metrics['grad_norm']:.2f}  lr {metrics['lr']:.2e}  "
        f"{metrics['tokens_per_s']:,.0f} tokens/s  {metrics['images_per_s']:,.0f} images/s  "
        f"padding {metrics['padding']:.1%}  data wait {metrics['data_wait']:.1%}  "
        f"memory {metrics['memory_gib']:.2f} GiB"
    )
    if "mfu" in metrics:
        line += f"  MFU {metrics['mfu']:.1%}  HFU {metrics['hfu']:.1%}"
    if "slowest_rank" in metrics:
        behind = metrics["slowest_rank_s"] - metrics["fastest_rank_s"]
        line += f"  rank {metrics['slowest_rank']} last by {1000 * behind:.0f} ms"
    return line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file by step; what is no row of a step is left out.

    Where a step came again and its first row could not be taken out, the later one counts.
    """
    return _by_step(path, lambda row: "loss" in row)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run by step, as `Evaluation.to_row` made them."""
    return _by_step(folder / EVALUATIONS, _has_results)


def _has_results(row: dict[str, Any]) -> bool:
    results = row.get("results")
    return isinstance(results, list) and all(
        isinstance(r, dict) and r.keys() >= {"detail", "num_image_tokens", "accuracy"}
        for r in results
    )


def _by_step(path: Path, is_one: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in read_rows(path):
        if _step(row) < 0 or not is_one(row):
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def _step(row: dict[str, Any]) -> int:
    """The step that a row is of; -1 if it is of none."""
    return row["step"] if type(row.get("step")) is int else -1
