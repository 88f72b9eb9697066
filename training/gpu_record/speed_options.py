"""What each setting for speed is worth: its own run of the same shape, beside one without it.

    python -m training.gpu_record.speed_options --runs FOLDER --out FILE.json

Reads what `training_speed` wrote for each of `OPTIONS` and for two runs without any, the first and
the last; how far these differ is the noise. An option is faster, or slower, only beyond it.
"""

import json
from pathlib import Path
from typing import Any

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.paths import path_argument

BASE = ("base", "base_again")
OPTIONS = {
    "liger": ("train.decoder_impl=liger",),
    "compile": ("train.compile_layers=true",),
    "fa3": ("train.flash_attention=fa3",),
    "no_copy_ahead": ("train.copy_ahead=false",),
    "prefetch": ("deepspeed.prefetch=model",),
    "recompute_tower": ("train.gradient_checkpointing=[vision_model]",),
    "recompute_decoder": ("train.gradient_checkpointing=[language_model]",),
}
"""Name of a run -> the settings it has beside those of the shape."""
LEAST_GAIN = 0.02


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each option's speed and memory over the faster run without; noise: of these two.

    runs: by name, the `together` of each.
    """
    speeds = [runs[name]["tokens_per_s"] for name in BASE if name in runs]
    if not speeds:
        raise InputError(f"--runs holds no run without an option ({' or '.join(BASE)})")
    noise = max(speeds) / min(speeds) - 1 if len(speeds) == len(BASE) else None
    memory = min(runs[name]["memory_gib"] for name in BASE if name in runs)
    found = {}
    for name in (name for name in OPTIONS if name in runs):
        speed = runs[name]["tokens_per_s"] / max(speeds)
        beyond = max(noise or 0.0, LEAST_GAIN)
        verdict = "faster" if speed > 1 + beyond else "slower" if speed < 1 - beyond else "the same"
        found[name] = {
            "settings": list(OPTIONS[name]),
            "speed": round(speed, 4),
            "memory": round(runs[name]["memory_gib"] / memory, 4),
            "verdict": verdict if noise is not None else "unknown: one run without options",
        }
    return {"noise": noise, "options": found, "not_measured": sorted(OPTIONS.keys() - found.keys())}


def main() -> None:
    parser = command_parser("training.gpu_record.speed_options", __doc__)
    parser.add_argument("--runs", type=path_argument, required=True, help="folder of their files")
    parser.add_argument("--out", type=path_argument, required=True, help="JSON file to write")
    args = parser.parse_args()
    found = compared(_read(args.runs))
    write_atomically(args.out, json.dumps(found, indent=1).encode() + b"\n")
    for name, option in found["options"].items():
        print(f"{name}: {option['speed']:.3f}x tokens/s, {option['memory']:.2f}x memory, ", end="")
        print(option["verdict"])
    for name in found["not_measured"]:
        print(f"{name}: not measured")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    runs = {}
    for name in (*BASE, *OPTIONS):
        path = folder / f"speed_{name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if content.get("complete"):
            runs[name] = content["runs"]["mixed"]["together"]
    return runs


if __name__ == "__main__":
    run_cli(main)
