"""How long training waits for a save: in the background, and when it is written at once.

    python -m tests.training.bench_checkpoint --width 3072 --json bench_checkpoint.json

Two gloo ranks on this machine save a ZeRO-3 model in fp32; medians over the trials of the slower
rank, each save starting with nothing else under way.
"""

import argparse
import json
import tempfile
from pathlib import Path

from data_pipeline.machine import measured_on
from tests.ranks import RankPool
from tests.training import checkpoint_scenarios as scenarios
from training.checkpoint import finished, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.training.bench_checkpoint")
    parser.add_argument("--width", type=int, default=3072, help="size of the model's two matrices")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    pool = RankPool(2)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "checkpoints"
        results = pool.run(scenarios.stalls, folder, args.width, args.trials, timeout_s=600)
        size = read_manifest(finished(folder / "synchronous")[-1]).total_bytes
    pool.close()
    background, synchronous = results[0]
    result = {
        "checkpoint_mb": round(size / 1e6, 1),
        "ranks": 2,
        "trials": args.trials,
        "synchronous_s": round(synchronous, 4),
        "background_stall_s": round(background, 4),
        "stall_share": round(background / synchronous, 4),
        **measured_on(("torch", "deepspeed")),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
