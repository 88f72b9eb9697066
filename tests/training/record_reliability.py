"""Join what was measured of checkpoints and faults into one record.

    python -m tests.training.kill_in_save --trials 200 --json kill.json
    python -m tests.training.kill_in_save --trials 30 --stock --json stock.json
    python -m tests.training.bench_checkpoint --json stall.json
    python -m tests.training.chaos --json chaos.json
    python -m tests.training.record_reliability kill.json stock.json stall.json chaos.json \\
        training/results/reliability.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from data_pipeline.machine import machine

COMMANDS = {
    "kills_inside_a_save": "python -m tests.training.kill_in_save --trials {trials}",
    "kills_inside_stock_save": "python -m tests.training.kill_in_save --trials {trials} --stock",
    "checkpoint_stall": "python -m tests.training.bench_checkpoint",
    "chaos": "python -m tests.training.chaos --seed {seed}",
}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One section per measurement, with the command that made it; single trials left out."""
    record: dict[str, Any] = {"machine": machine()}
    for (name, command), part in zip(COMMANDS.items(), parts, strict=True):
        kept = {key: value for key, value in part.items() if key not in ("results", "examples")}
        record[name] = {"command": command.format(**part), **kept}
    return record


def main() -> None:
    if len(sys.argv) != len(COMMANDS) + 2:
        raise SystemExit(__doc__)
    parts = [json.loads(Path(name).read_text()) for name in sys.argv[1:-1]]
    Path(sys.argv[-1]).write_text(json.dumps(joined(parts), indent=1) + "\n")


if __name__ == "__main__":
    main()
