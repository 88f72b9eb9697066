"""The stages of the record: the command of each, where it writes, how long it may take."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from training.gpu_record.speed_options import BASE, OPTIONS

ROOT = Path(__file__).parents[2]
LIMIT_S = 470  # under eight minutes, with what it takes to end a stage
TINY = "T=2,n=1/2,p=.5/.5,grid=2x2,C=16,F=32,D=16,dtype=bf16"


@dataclass(frozen=True)
class Stage:
    """A child process of the record.

    expected_s: about how long on an H100; it is not begun with less time left. files: what it
    writes and `--again` removes. otherwise: options it is run with again where the GPU's memory did
    not suffice (`exit_codes.OUT_OF_MEMORY`). goes_on: whether it goes on where its
    limit ended it.
    """

    name: str
    says: str
    command: tuple[str, ...]
    expected_s: int
    files: tuple[Path, ...]
    environment: dict[str, str] = field(default_factory=dict)
    otherwise: tuple[str, ...] = ()
    goes_on: bool = True


@dataclass(frozen=True)
class Places:
    """Where results of the kernels and of training go, and what is not kept (logs, the corpus)."""

    kernels: Path
    training: Path
    work: Path

    @staticmethod
    def of(device: str, out: Path | None) -> "Places":
        """The repository's folders of results, or those in `out`; one folder for each device."""
        name = re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")
        if out:
            return Places(out / "kernels" / name, out / "training" / name, out / "work" / name)
        kernels, training = (ROOT / part / "results" / name for part in ("kernels", "training"))
        return Places(kernels, training, ROOT / "runs" / "gpu_record" / name)

    @property
    def state(self) -> Path:
        """What became of each stage."""
        return self.training / "gpu_record.json"


def _module(name: str, *arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, arguments))


def _gpu_test_files(rehearse: bool) -> list[str]:
    """The test files that hold a test marked `gpu`: the others need not be imported."""
    if rehearse:
        return ["tests/kernels/test_gpu.py"]
    mark = "mark." + "gpu"
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if mark in path.read_text(encoding="utf-8")
    ]


def all_stages(places: Places, rehearse: bool) -> list[Stage]:
    """The stages in their order, the most wanted first; on a CPU at tiny shapes to rehearse."""
    kernels, training = places.kernels, places.training
    tiles, rows = kernels / "tiles.json", kernels / "gpu_tests.jsonl"
    fused = kernels / "fused_gemms.json"
    two = ("--provider", "save", "--provider", "eager_grouped")
    cpu = ("--device", "cpu", "--min-ms", "1", *two) if rehearse else ()
    tiny = ("--shape", TINY) if rehearse else ()
    few = ("--samples", "1") if rehearse else ()
    one = ("--kernel", "swiglu") if rehearse else ()
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    tests = ("-m", "gpu", "-q", "-p", "tests.result_rows", "--rows", rows)

    def profile(name: str, says: str, seconds: int, *more: str) -> Stage:
        out = kernels / name
        command = _module("kernels.profile", *more, *cpu, "--resume", "--out", out)
        return Stage(name, says, command, seconds, (out,))

    def experiment() -> Stage:
        name = "rehearsal" if rehearse else "flexibility_gpu"
        record = training / "flexibility.json"
        options = ("--out", places.work / "experiment", "--record", record, "--images", training)
        config = f"training/configs/experiments/{name}.yaml"
        command = _module("training.experiments.flexibility", config, *options)
        says = "what flexible token counts buy: arms over seeds, over many turns"
        return Stage("flexibility", says, command, 400, (record,))

    def train(shape: str, seconds: int) -> Stage:
        out = training / f"train_{shape}.json"
        return Stage(
            f"train_{shape}",
            f"ZeRO-3 training, {shape}: mixed token counts against one",
            _module(
                "training.gpu_record.training_speed", shape, "--out", out, "--work", places.work
            ),
            seconds,
            (out,),
            otherwise=("--offload",),
            goes_on=False,
        )

    def option(name: str) -> Stage:
        out, shape = training / f"speed_{name}.json", "rehearsal" if rehearse else "1.5b"
        settings = OPTIONS.get(name, ())
        return Stage(
            f"speed_{name}",
            f"ZeRO-3 training, {shape}, {' '.join(settings) or 'for comparison'}",
            _module(
                *("training.gpu_record.training_speed", shape, "--counts", "mixed"),
                *(word for setting in settings for word in ("--set", setting)),
                *("--out", out, "--work", places.work),
            ),
            150,
            (out,),
            otherwise=("--offload",),
            goes_on=False,
        )

    measured = (BASE[0], "recompute_tower") if rehearse else (BASE[0], *OPTIONS, BASE[1])
    worth = training / "speed_options.json"
    return [
        Stage(
            "gpu_tests",
            "the tests marked gpu",
            _module("pytest", *tests, *_gpu_test_files(rehearse)),
            300,
            (rows,),
        ),
        profile("profile_quick", "the projector, in a minute", 90, "--quick", *tiny),
        *([train("rehearsal", 60)] if rehearse else [train("1.5b", 300), train("3b", 400)]),
        Stage(
            "tune",
            "block sizes, and the fused GEMMs one by one against cuBLAS",
            _module("kernels.tune", "--out", tiles, *tiny, *few, *one),
            240,
            (tiles,),
            interpreted,
        ),
        Stage(
            "fused_gemms",
            "the op with fused products, tuned, against cuBLAS: whether they stay",
            _module("training.gpu_record.fused_products", "--out", fused, *tiny, *few),
            120,
            (fused,),
            {"TOKENFLEX_TILES": str(tiles)} | interpreted,
        ),
        profile("profile", "the projector, every provider and case", 240, *tiny),
        *map(option, measured),
        Stage(
            "speed_options",
            "what each setting for speed is worth, from the runs before",
            _module("training.gpu_record.speed_options", "--runs", training, "--out", worth),
            20,
            (worth,),
        ),
        experiment(),
    ]
