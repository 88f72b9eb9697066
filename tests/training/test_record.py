"""The record of a run: sums and means of its metrics, its evaluation, or a clear error."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from training.record.run_record import record


def test_it_sums_up_the_metrics(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.0, "step_s": 1.0, "tokens": 100, "padding": 0.1, "data_wait": 0.5},
        {"step": 2, "loss": 1.5, "step_s": 3.0, "tokens": 300, "padding": 0.3, "data_wait": 0.1},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))  # cut short
    (tmp_path / "evaluation.json").write_text('{"step": 2, "results": [{"accuracy": 1.0}]}')
    found = record(tmp_path, "make pretrain", 9.0)
    assert (
        found["wall_s"] == 9.0
        and found["steps"] == 2
        and found["final_loss"] == 1.5
        and found["training_s"] == 4.0
    )
    assert found["tokens_per_s"] == 100 and found["padding"] == 0.2
    assert found["data_wait"] == 0.2  # by time: (0.5 + 0.3) / 4
    assert found["evaluation"] == [{"accuracy": 1.0}]
    assert "cores" in found["machine"] or " x " in found["machine"]


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        record(tmp_path, "make pretrain", 9.0)
