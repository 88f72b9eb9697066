"""Hold the estimated peak of memory against a measured one, for six kinds of config.

python -m tests.training.record_estimate training/results/estimate.json
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.machine import measured_on
from tests.ranks import RankPool
from tests.training.estimate_scenarios import estimated, measured
from training.estimate.packs import PackShape
from training.estimate.trial import StepMemory

LARGE = "training/configs/stage2_pretrain.yaml"
SMALL_BUCKET = "deepspeed.extra={zero_optimization: {reduce_bucket_size: 500000}}"
TEXT = PackShape((700, 500, 336), (), 1200)
MIXED = PackShape((600, 500, 400), (8, 4, 2) * 3, 800)
TILES = PackShape((512, 512, 500), (4,) * 90, 60)
WIDE = [
    SMALL_BUCKET,
    "model.llm.config.hidden_size=128",
    "model.llm.config.intermediate_size=384",
    "model.vision.config.hidden_size=96",
    "model.vision.config.intermediate_size=384",
    "deepspeed.param_persistence_threshold=1000",
]
OFFLOAD = ["deepspeed.offload_optimizer=cpu", "deepspeed.offload_params=cpu"]
# Name -> ranks, pack, settings.
CASES: dict[str, tuple[int, PackShape, list[str]]] = {
    "text heavy": (1, TEXT, WIDE),
    "tile heavy": (1, TILES, WIDE),
    "frozen tower": (1, TILES, [*WIDE, "train.modules.vision_model.train=false"]),
    "checkpointing": (
        1,
        MIXED,
        [*WIDE, "train.gradient_checkpointing=true", "train.loss_chunk_tokens=512"],
    ),
    "offload": (2, MIXED, [*WIDE, *OFFLOAD]),
    "two ranks": (2, MIXED, WIDE),
}


def compared(ranks: int, pack: PackShape, overrides: list[str]) -> dict[str, Any]:
    """Both peaks, and what they consist of, in bytes."""
    pool = RankPool(ranks)
    try:
        found: StepMemory = pool.run(measured, overrides, pack, timeout_s=900)[0]
    finally:
        pool.close()
    expected = estimated(ranks, overrides, pack)
    return {
        "ranks": ranks,
        "tokens": pack.tokens,
        "tiles": pack.tiles,
        "settings": overrides,
        "measured_peak": found.peak,
        "estimated_peak": expected.peak,
        "measured": dict(found.at_peak),
        "estimated": dict(expected.at_peak),
    }


def large_preset() -> dict[str, Any]:
    """What an estimate of a model of 8 billion parameters takes on this machine."""
    command = [sys.executable, "-m", "training.estimate", LARGE, "--quick"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime
    return {"config": LARGE, "cpu_s": round(cpu_s, 1), "memory_gb": used.ru_maxrss * 1024 / 1e9}


def main() -> None:
    large = large_preset()  # first: the children after it are no part of it
    rows = {}
    for name, case in CASES.items():
        rows[name] = row = compared(*case)
        print(f"{name:<16}{row['measured_peak'] / 1e6:9.2f} MB measured  ", end="")
        print(f"{row['estimated_peak'] / row['measured_peak']:.4f} of it estimated", flush=True)
    record = {
        "command": "python -m tests.training.record_estimate training/results/estimate.json",
        **measured_on(("torch", "deepspeed", "transformers")),
        "large": large,
        "cases": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
