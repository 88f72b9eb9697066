"""Every command of the README runs, in a copy of the repository, only smaller."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
COMMANDS = [re.sub(r"\s+#.*", "", line) for block in BLOCKS for line in block.splitlines()]
SMALL = "data.prepare.train_samples=240 data.prepare.eval_samples=24 train.steps=2"
MAKE = f"make -o {sys.prefix}/installed VENV={sys.prefix}"

# README command -> the smaller one that is run; "": as it is; None: another test runs it.
SMALLER: dict[str, str | None] = {
    "make pretrain": f'{MAKE} pretrain ARGS="{SMALL}"',
    "make test": f"{MAKE} -n test",
    "sbatch slurm/pretrain.sh training/configs/digits.yaml": None,  # tests/slurm/test_pretrain.py
    "make pretrain CONFIG=training/configs/grid.yaml": (
        f'{MAKE} pretrain CONFIG=training/configs/grid.yaml ARGS="{SMALL}"'
    ),
    'make pretrain ARGS="train.steps=300 output_dir=runs/short"': (
        f'{MAKE} pretrain ARGS="output_dir=runs/short {SMALL}"'
    ),
    "python -m training.train --help": "",
    "torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml": (
        f"torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml {SMALL}"
    ),
    "deepspeed --num_gpus 8 --module training.train training/configs/stage2_pretrain.yaml": (
        "deepspeed --num_gpus 2 --no_local_rank --module training.train "
        f"training/configs/digits.yaml output_dir=runs/launcher {SMALL}"
    ),
    COMMANDS[8]: "",  # prepare --format llava
    "python -m data_pipeline.prepare --format folder captioned/ data/captions": "",
    "python -m data_pipeline.index data/mine --tokenizer Qwen/Qwen2.5-7B-Instruct": (
        "python -m data_pipeline.index data/mine --tokenizer data/digits/tokenizer.model"
    ),
    "python -m data_pipeline.prepare --format finevision parquet/ data/finevision": "",
    COMMANDS[12]: "",  # index a brace pattern
    COMMANDS[13]: "",  # index --check
    "sbatch slurm/index.sh data/captions --tokenizer data/digits/tokenizer.model": None,
    "python -m data_pipeline.stats plan training/configs/digits.yaml --out runs/stats.png": (
        "python -m data_pipeline.stats plan training/configs/digits.yaml --out runs/stats.png "
        "data.prepare.train_samples=240 data.prepare.eval_samples=24"
    ),
    COMMANDS[16]: "",  # plan simulate
    "python -m data_pipeline.inspect training/configs/digits.yaml --out runs/report.html": (
        "python -m data_pipeline.inspect training/configs/digits.yaml --out runs/report.html "
        "data.prepare.train_samples=240 data.prepare.eval_samples=24"
    ),
    "python -m data_pipeline.bench": "python -m data_pipeline.bench loader --quick",
    "python -m training.export runs/digits runs/model": "",
    COMMANDS[20]: "",  # generate --compare
    COMMANDS[21]: "python -m training.evaluate runs/model data/digits/eval --num-image-tokens 4 9",
    "sbatch slurm/evaluate.sh runs/model data/digits/eval --out runs/evaluation": None,
    "python -m training.demo runs/model": "python -m training.demo --help",
    "python -m training.import_ristretto Ristretto-3B/ runs/ristretto": (
        "python -m training.import_ristretto --help"
    ),
    "python -m kernels.profile": "python -m kernels.profile --no-compile-report",
    "python -m kernels.profile --shape T=64,n=8/12/16,p=.2/.3/.5,pool=resize --out runs/profile": (
        "python -m kernels.profile --shape T=64,n=8/12/16,p=.2/.3/.5,pool=resize "
        "--out runs/profile --no-compile-report"
    ),
    "sbatch slurm/profile_projector.sh --shape T=64,n=12": None,  # tests/slurm/test_profile.py
    "python -m kernels.compile_report --arch 90": (
        "python -m kernels.compile_report --arch 90 --kernel swiglu"
    ),
    "python -m kernels.tune --out tiles.json": "python -m kernels.tune --help",
    "slurm/pretrain.sh --dry-run training/configs/digits.yaml": "",
    "sbatch slurm/preflight.sh training/configs/digits.yaml": None,  # tests/slurm/test_preflight.py
    "slurm/chain.sh --dry-run --nodes=2 --gpus-per-node=8": "",
    "python -m training.checkpoint list runs/digits/checkpoints": "",
    "python -m training.checkpoint verify runs/digits/checkpoints": "",
    "python -m training.goodput runs/digits --failures-per-day 1": "",
    "make chaos": f"{MAKE} -n chaos",  # tests/training/test_chaos.py
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's tracked files, and the raw data that the README's commands name."""
    root = tmp_path_factory.mktemp("readme") / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    for folder in ("images", "captioned"):
        (root / folder).mkdir()
        Image.new("RGB", (40, 30), "red").save(root / folder / "a.jpg")
    (root / "captioned" / "a.txt").write_text("A red picture.")
    turns = [
        {"from": "human", "value": "<image>\nWhich colour?"},
        {"from": "gpt", "value": "Red."},
    ]
    Image.new("L", (32, 32), 0).save(root / "digit.png")
    (root / "parquet").mkdir()
    image = {"bytes": (root / "images" / "a.jpg").read_bytes(), "path": "a.jpg"}
    row = {"images": [image], "texts": [{"user": "Which colour?", "assistant": "Red."}]}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "source": "mine"}]), root / "parquet" / "0.parquet"
    )
    np.savez(root / "lengths.npz", tokens=np.arange(100, 900), tiles=np.arange(800) % 7)
    samples = [{"id": "1", "image": "a.jpg", "conversations": turns}]
    (root / "instructions.json").write_text(json.dumps(samples))
    return root


def test_every_command_is_known_here() -> None:
    assert list(SMALLER) == COMMANDS


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "command", [smaller or command for command, smaller in SMALLER.items() if smaller is not None]
)
def test_command_runs(command: str, clone: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TRITON_INTERPRET": "0",
    }
    result = subprocess.run(
        shlex.split(command),
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if "train.steps=2" in command:
        assert "held-out accuracy after step 2" in result.stdout


def test_the_layout_names_folders_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"`([\w/.-]+/[\w.-]*)`", readme):
        if not name.startswith(("runs/", "data/", "checkpoints/", "tensorboard/")):
            assert any((base / name).exists() for base in (ROOT, ROOT / "data_pipeline")), name


@pytest.mark.parametrize(
    ("record", "label"),
    [("digits", "digits"), ("digits_seed1", "digits, seed 1"), ("grid", "grid")],
)
def test_the_numbers_are_those_recorded(record: str, label: str) -> None:
    readme = (ROOT / "README.md").read_text()
    recorded = json.loads((ROOT / f"training/results/{record}.json").read_text())
    accuracy: dict[str, dict[int, float]] = {}
    for row in recorded["evaluation"]:
        accuracy.setdefault(row["detail"], {})[row["num_image_tokens"]] = 100 * row["accuracy"]
    for detail in accuracy.keys() - {"all"}:
        cells = " | ".join(f"{accuracy[detail][count]:.1f}" for count in (4, 16, 64))
        assert f"| {label}, {detail} | {cells} |" in readme
    assert recorded["machine"] in readme
    if record == "digits_seed1":
        return  # other work ran beside it: no time of it is told
    training = f"{recorded['steps']} steps in {recorded['training_s']:.0f} s"
    assert f"{training}, the whole command {recorded['wall_s']:.0f} s" in " ".join(readme.split())


def test_the_projector_table_is_the_recorded_calculation() -> None:
    readme = (ROOT / "README.md").read_text()
    recorded = json.loads((ROOT / "kernels/results/calculated.json").read_text())
    assert f"{recorded['assumed']['tflops']:g} TFLOP/s" in readme
    cases = {row["case"]: row for row in recorded["cases"]}
    rows = (
        ("adaptive, as it ships", "adaptive", "cublas", " of eager's"),
        ("adaptive, fused products as fast as cuBLAS", "adaptive", "fused", ""),
        ("resize, as it ships", "resize", "cublas", ""),
        ("adaptive, `train.projector_backward=recompute`", "adaptive", "recompute", ""),
    )
    for label, pool, way, unit in rows:
        case = cases[f"T=64,n=12,pool={pool}"]
        ours = case[f"floor_us_both_{way}"]
        eager, compiled = (case[f"floor_us_both_{other}"] / ours for other in ("eager", "compile"))
        kept = case[f"saved_bytes_{way}"] / case["saved_bytes_eager"]
        line = f"| n = 12, {label} | {eager:.2f}x | {compiled:.2f}x | {kept:.0%}".replace("%", " %")
        assert f"{line}{unit} |" in readme


def test_the_reliability_table_is_the_record() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    record = json.loads((ROOT / "training/results/reliability.json").read_text())
    ours, stock = record["kills_inside_a_save"], record["kills_inside_stock_save"]
    assert f"{ours['broken']} of {ours['trials']} broken" in readme
    assert f"{stock['broken']} of {stock['trials']}" in readme
    stall = record["checkpoint_stall"]
    assert (
        f"{stall['background_stall_s']:.2f} s instead of {stall['synchronous_s']:.2f} s" in readme
    )
    rows = record["chaos"]["rows"]
    assert len({row["fault"] for row in rows}) == 10
    crashes = [row["lost"] for row in rows if row["exit_codes"] != [75, 75]]
    assert f"at most {max(crashes)} steps" in readme
    assert not any(row["lost"] for row in rows if row["exit_codes"] == [75, 75])
    hung = next(row for row in rows if 76 in row["exit_codes"])
    assert f"after {hung['seconds']:.1f} s" in readme


def test_the_data_tables_are_the_record() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    record = json.loads((ROOT / "data_pipeline/results/bench.json").read_text())["results"]
    mixes = record["planner"]["mixes"]
    short, long = (mixes[f"standard, {tokens} tokens, 64 packs"] for tokens in (8192, 16384))
    rows = (
        ("tokens, max / mean over a step's packs", "tokens_max_over_mean", ".3f", 1, ""),
        ("tiles, max / mean", "tiles_max_over_mean", ".3f", 1, ""),
        ("efficiency", "efficiency", ".3f", 1, ""),
        ("padding", "padding", ".2f", 100, " %"),
        ("packed on one core", "samples_per_cpu_s", ".0f", 1e-3, " k samples/s"),
    )
    for label, key, form, unit, suffix in rows:
        cells = " | ".join(f"{unit * mix[key]:{form}}{suffix}" for mix in (short, long))
        assert f"| {label} | {cells} |" in readme
    loader, startup, index = (record[name] for name in ("loader", "startup", "index"))
    rates = (
        index[f"samples_per_s_per_core {what} {tokenizer}"] / 1000
        for tokenizer in ("model", "hugging-face")
        for what in ("digits", "captions")
    )
    assert (
        "{:.1f} k, {:.1f} k samples/s; with a Hugging Face tokenizer {:.1f} k, {:.1f} k".format(
            *rates
        )
        in readme
    )
    ratios = loader["ratio"], loader["pillow_ratio"]
    assert ("{:.1f} times as fast; with Pillow's resizing {:.1f} times".format(*ratios)) in readme
    large = loader["cpu_ms_per_large_photo"]
    for way, text in (
        ("reduced, torch resizes", "ms at a reduced JPEG scale"),
        ("full, torch resizes", "ms in full"),
        ("usual way", "ms with Pillow"),
    ):
        assert f"{large[way]:.0f} {text}" in readme
    seconds = startup["first_batch_s"], startup["resumed_first_batch_s"]
    assert "{:.1f} s, on resume {:.1f} s".format(*seconds) in readme
    assert startup["samples"] == 1_000_000
