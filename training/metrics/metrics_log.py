"""Where the metrics of a run go: metrics.jsonl, TensorBoard, a progress bar."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_pipeline.files import write_atomically
from training.distributed import Ranks


class MetricsLog:
    """Rank 0's record of a run: `metrics.jsonl`, TensorBoard events, a progress bar.

    Resuming drops the lines and events of steps that will run again.
    """

    def __init__(self, folder: Path, ranks: Ranks, steps: int, first_step: int) -> None:
        self.is_main = ranks.is_main
        if not self.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10
        )
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=None, leave=False)

    def write(self, step: int, metrics: dict[str, Any], show: bool) -> None:
        """Record the metrics of a 1-based step; `show` also prints its line."""
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                tag = name.replace("_", "/", 1) if name.startswith("loss") else f"train/{name}"
                self.board.add_scalar(tag, value, step)
        self.bar.update()
        if show:
            self.bar.write(step_line(step, int(self.bar.total), metrics))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add one value to TensorBoard."""
        if self.is_main:
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.board.close()
            self.file.close()


def step_line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    """One line that says how training goes."""
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  "
        f"grad norm {metrics['grad_norm']:.2f}  lr {metrics['lr']:.2e}  "
        f"{metrics['tokens_per_s']:,.0f} tokens/s  {metrics['images_per_s']:,.0f} images/s  "
        f"padding {metrics['padding']:.1%}  data wait {metrics['data_wait']:.1%}  "
        f"memory {metrics['memory_gib']:.2f} GiB"
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
