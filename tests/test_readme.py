"""What README, docs/ and CONTRIBUTING say: commands run, only smaller; numbers are the records."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from docs import make_pictures
from tests.pages import MAKE, PAGES, ROOT, commands, copy_repository, prose, run_command
from training.experiments.flexibility.flexibility_tables import accuracy_table, spent_table
from training.export.card import UNKNOWN_COUNTS

README = ROOT / "README.md"
RECIPE = ROOT / "docs" / "recipe.md"  # tests/test_recipe.py runs its commands
SMALL = "data.prepare.train_samples=240 data.prepare.eval_samples=24 train.steps=2"
DEMO = "python -m training.train training/configs/digits.yaml"

# Command -> the smaller one that is run; "": as it is; None: another test runs it. In the order in
# which they are run: one may use what an earlier one made.
SMALLER: dict[str, str | None] = {
    "make pretrain": f'{MAKE} pretrain ARGS="{SMALL}"',
    "make test": f"{MAKE} -n test",
    "make test-fast": f"{MAKE} -n test-fast",
    "sbatch slurm/pretrain.sh training/configs/digits.yaml": None,  # tests/slurm/test_pretrain.py
    "make pretrain CONFIG=training/configs/digits.yaml": (
        f'{MAKE} pretrain CONFIG=training/configs/digits.yaml ARGS="{SMALL}"'
    ),
    'make pretrain ARGS="train.steps=300 output_dir=runs/short"': (
        f'{MAKE} pretrain ARGS="output_dir=runs/short {SMALL}"'
    ),
    "python -m training.train --help": "",
    "python -m training.language_model_table": (
        "python -m training.language_model_table --families olmo3 --out runs/language_models.json"
    ),
    "torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml": (
        f"torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml {SMALL}"
    ),
    "deepspeed --num_gpus 8 --module training.train training/configs/stage2_pretrain.yaml": (
        "deepspeed --num_gpus 2 --no_local_rank --module training.train "
        f"training/configs/digits.yaml output_dir=runs/launcher {SMALL}"
    ),
    "python -m data_pipeline.prepare --format llava instructions.json --images images/ "
    "data/mine": "",
    "python -m data_pipeline.prepare --format folder captioned/ data/captions": "",
    "python -m data_pipeline.index data/mine --tokenizer Qwen/Qwen2.5-7B-Instruct": (
        "python -m data_pipeline.index data/mine --tokenizer data/digits/tokenizer.model"
    ),
    "python -m data_pipeline.prepare --format finevision parquet/ data/finevision": "",
    "python -m data_pipeline.prepare --format scans data/scans --eval-samples 1000": (
        "python -m data_pipeline.prepare --format scans data/scans "
        "--train-samples 20 --eval-samples 10"
    ),
    "python -m training.experiments.warm_tower training/configs/digits.yaml runs/tower": (
        "python -m training.experiments.warm_tower training/configs/digits.yaml runs/tower "
        "--steps 2"
    ),
    "python -m data_pipeline.prepare --format pages data/pages": (
        "python -m data_pipeline.prepare --format pages data/pages "
        "--train-samples 18 --eval-samples 9"
    ),
    "python -m data_pipeline.index 'data/captions/{000000..000000}.tar' "
    "--tokenizer data/digits/tokenizer.model --workers 8": "",
    "python -m data_pipeline.index data/captions --tokenizer data/digits/tokenizer.model "
    "--check": "",
    "sbatch slurm/index.sh data/captions --tokenizer data/digits/tokenizer.model": None,
    # tests/data_pipeline/test_stores.py
    "python -m data_pipeline.index 's3://bucket/set/{000..127}.tar' --index-dir data/set "
    "--tokenizer Qwen/Qwen2.5-7B-Instruct --storage-option anon=true": None,
    "python -m training.bench": "python -m training.bench --help",
    "python -m data_pipeline.bench remote": "python -m data_pipeline.bench remote --quick",
    "python -m data_pipeline.stats plan training/configs/digits.yaml --out runs/stats.png": (
        "python -m data_pipeline.stats plan training/configs/digits.yaml --out runs/stats.png "
        "data.prepare.train_samples=240 data.prepare.eval_samples=24"
    ),
    "python -m data_pipeline.stats simulate --lengths lengths.npz --max-tokens 8192 "
    "--packs-per-step 64 --out runs/plan.npz": "",
    "python -m data_pipeline.inspect training/configs/digits.yaml --out runs/report.html": (
        "python -m data_pipeline.inspect training/configs/digits.yaml --out runs/report.html "
        "data.prepare.train_samples=240 data.prepare.eval_samples=24"
    ),
    "python -m data_pipeline.bench": "python -m data_pipeline.bench loader --quick",
    "python -m training.export runs/digits runs/model": "",
    'python -m training.generate runs/model --image digit.png --prompt "List the digits." '
    "--compare 4 16 64": "",
    # The small corpus is too small for a router: tests/training/test_router.py
    "python -m training.evaluate runs/model data/digits/eval --num-image-tokens 4 16 64 "
    "--train-router --budget tokens=16": None,
    "python -m training.evaluate runs/model data/digits/eval --num-image-tokens 4 16 64 "
    "--budget tokens=32": None,
    "python -m training.evaluate runs/model data/digits/eval --num-image-tokens 4 9 16 36 64 "
    "--budget accuracy=99%": (
        "python -m training.evaluate runs/model data/digits/eval --num-image-tokens 4 9"
    ),
    "sbatch slurm/evaluate.sh runs/model data/digits/eval --out runs/evaluation": None,
    # tests/training/test_flexibility.py
    "python -m training.experiments.flexibility training/configs/experiments/flexibility_cpu.yaml "
    "--jobs 2": None,
    "python -m training.experiments.flexibility training/configs/experiments/flexibility_cpu.yaml "
    "--list": None,
    "slurm/flexibility.sh --dry-run --gpus=1 "
    "training/configs/experiments/flexibility_gpu.yaml": None,
    "make extras": f"{MAKE} -n extras",
    ".venv-demo/bin/python -m training.demo runs/model": "python -m training.demo --help",
    # tests/training/test_lmms_eval.py: lmms-eval has an environment of its own
    ".venv-lmms/bin/python -m training.lmms_eval_adapter --model tokenflex --model_args "
    "pretrained=runs/model,num_image_tokens=16 --tasks ai2d --output_path runs/benchmarks": None,
    "PYTHONPATH=. LMMS_EVAL_PLUGINS=training.lmms_eval_adapter .venv-lmms/bin/python -m lmms_eval "
    "--model tokenflex --model_args pretrained=runs/model,num_image_tokens=16 --tasks ai2d "
    "--output_path runs/benchmarks": None,
    "python -m training.import_ristretto Ristretto-3B/ runs/ristretto": (
        "python -m training.import_ristretto --help"
    ),
    "python -m kernels.profile": "",
    "python -m kernels.profile --quick --resume --out runs/quick": "",
    "python -m kernels.profile --shape T=64,n=8/12/16,p=.2/.3/.5,pool=resize "
    "--out runs/profile": "",
    "python -m kernels.profile --sweep n=4..27 --sweep T=1,2,4..256 --out runs/sweeps": "",
    "python -m kernels.profile --compare runs/quick --fail-above 5%": "",
    "python -m kernels.profile --shape T=64,n=12 --print-ncu --print-nsys": "",
    "python -m kernels.profile --what attention,loss --config training/configs/digits.yaml "
    "--out runs/loss": (
        "python -m kernels.profile --what attention,loss --config training/configs/digits.yaml "
        "--out runs/loss data.pack.max_tokens=256 model.llm.config.vocab_size=384"
    ),
    "python -m training.step_parts training/configs/digits.yaml --out runs/parts": (
        "python -m training.step_parts training/configs/digits.yaml --out runs/parts "
        "data.pack.max_tokens=256 model.llm.config.vocab_size=384"
    ),
    "sbatch slurm/profile_projector.sh --shape T=64,n=12": None,  # tests/slurm/test_profile.py
    "python -m kernels.compile_report --arch 90": (
        "python -m kernels.compile_report --arch 90 --kernel swiglu"
    ),
    "python -m kernels.tune --out tiles.json": "python -m kernels.tune --help",
    "slurm/pretrain.sh --dry-run training/configs/digits.yaml": "",
    # tests/training/test_estimate.py
    "python -m training.estimate training/configs/stage2_pretrain.yaml --gpus 8 --nodes 4 "
    "--gpu h100": None,
    "python -m training.train training/configs/stage2_pretrain.yaml --dry-run": None,
    "sbatch slurm/preflight.sh training/configs/digits.yaml": None,  # tests/slurm/test_preflight.py
    "slurm/chain.sh --dry-run --nodes=2 --gpus-per-node=8": "",
    "python -m training.checkpoint list runs/digits/checkpoints": "",
    "python -m training.checkpoint verify runs/digits/checkpoints": "",
    "python -m training.goodput runs/digits --failures-per-day 1": "",
    "python -m training.report runs/digits": "",
    "make chaos": f"{MAKE} -n chaos",  # tests/training/test_chaos.py
    # CONTRIBUTING.md
    "make setup": f"{MAKE} -n setup",
    "make lint": f"{MAKE} -n lint",
    "make remote": f"{MAKE} -n remote",
    "make latest": f"{MAKE} -n latest",
    "make pictures": f"{MAKE} -n pictures",
    "make kernel-checks": f"{MAKE} -n kernel-checks",
    "make cuda-trace": f"{MAKE} -n cuda-trace",
    "make gpu-record": f"{MAKE} -n gpu-record",  # tests/training/test_gpu_record.py
    'make gpu-record ARGS="--within-s 580"': f"{MAKE} -n gpu-record",
    "python -m training.gpu_record --rehearse --list": "",
    f"{DEMO} model.projector.method=query train.steps=20 output_dir=runs/query": (
        f"{DEMO} model.projector.method=query output_dir=runs/query {SMALL}"
    ),
    "python -m kernels.profile --shape T=64,n=12,pool=resize --out runs/pooling": "",
    "python -m data_pipeline.prepare --format folder captioned/ data/captions --overwrite": "",
    'make pretrain ARGS="train.steps=20 output_dir=runs/metric"': (
        f'{MAKE} pretrain ARGS="output_dir=runs/metric {SMALL}"'
    ),
    f"{DEMO} model.vision.config.model_type=clip_vision_model train.steps=20 "
    "output_dir=runs/tower": (
        f"{DEMO} model.vision.config.model_type=clip_vision_model output_dir=runs/tower {SMALL}"
    ),
    f"{DEMO} 'train.ema={{decay: 0.9}}' train.steps=20 output_dir=runs/ema": (
        f"{DEMO} 'train.ema={{decay: 0.9}}' output_dir=runs/ema {SMALL}"
    ),
    "python -m training.export runs/ema runs/ema-model --ema": "",
    f"{DEMO} train.optimizer.name=muon train.steps=20 output_dir=runs/muon": (
        f"{DEMO} train.optimizer.name=muon output_dir=runs/muon {SMALL}"
    ),
    f"{DEMO} model.llm.config.model_type=llama train.steps=20 output_dir=runs/llama": (
        f"{DEMO} model.llm.config.model_type=llama output_dir=runs/llama {SMALL}"
    ),
    "torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml train.steps=20 "
    "output_dir=runs/engine": None,  # as above, without output_dir
    f"{DEMO} train.loss_weighting=sample train.steps=20 output_dir=runs/weighting": (
        f"{DEMO} train.loss_weighting=sample output_dir=runs/weighting {SMALL}"
    ),
    "python -m training.evaluate runs/model data/digits/eval --num-image-tokens 4 16": None,
    "slurm/pretrain.sh --dry-run --signal=B:USR1@300 training/configs/digits.yaml": "",
    f"{DEMO} train.modules.language_model.train=false "
    "'train.adapters.language_model={r: 8, lr: 2.0e-3}' train.steps=20 output_dir=runs/lora": (
        f"{DEMO} train.modules.language_model.train=false "
        f"'train.adapters.language_model={{r: 8, lr: 2.0e-3}}' output_dir=runs/lora {SMALL}"
    ),
    "python -m training.export runs/lora runs/lora-model": "",
    "python -m training.export runs/lora runs/lora-base --adapter": "",
    # tests/training/test_estimate.py
    "python -m training.estimate training/configs/stage3_lora.yaml --gpus 1": None,
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, and the raw data that the commands name."""
    root = tmp_path_factory.mktemp("readme") / "clone"
    copy_repository(root)
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
    found = {command for page in PAGES if page != RECIPE for command in commands(page)}
    assert found == set(SMALLER)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "command", [smaller or command for command, smaller in SMALLER.items() if smaller is not None]
)
def test_command_runs(command: str, clone: Path) -> None:
    printed = run_command(command, clone)
    if "train.steps=2" in command:
        assert "held-out accuracy after step 2" in printed


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= 8192


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page: Path) -> None:
    made = ("runs/", "data/", "raw/", "checkpoints/", "tensorboard/", ".venv")
    for name in re.findall(r"`([\w/.-]+/[\w.-]*)`", page.read_text()):
        if not name.startswith(made):
            assert any((base / name).exists() for base in (ROOT, ROOT / "data_pipeline")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)", file.read_text(), flags=re.M) if anchor else []
        assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_exists(page: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        in_an_environment_of_its_own = module == "lmms_eval"  # make extras
        assert in_an_environment_of_its_own or importlib.util.find_spec(module), module


def test_every_page_of_docs_is_linked_and_links_back() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README.read_text()
        title, _, purpose, *_ = page.read_text().splitlines()
        assert title.startswith("# ") and purpose, page.name
        assert "[Back to the README](../README.md)" in page.read_text()


def test_contributing_has_ten_recipes() -> None:
    recipes = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:]
    assert len(recipes) == 10
    for recipe in recipes:
        for part in ("- **Files**", "- **Test**", "- **Shows it**", "```bash\n"):
            assert part in recipe, recipe.splitlines()[0]


@pytest.mark.parametrize("draw", [make_pictures.accuracy, make_pictures.token_grids])
def test_the_pictures_are_those_of_the_script(draw: Callable[[Path], None], tmp_path: Path) -> None:
    file = make_pictures.IMAGES / f"{draw.__name__}.png"
    assert file.stat().st_size < 300_000
    draw(tmp_path / file.name)
    with Image.open(file) as kept, Image.open(tmp_path / file.name) as drawn:
        pixels = [np.asarray(image.convert("RGB"), dtype=int) for image in (kept, drawn)]
    assert pixels[0].shape == pixels[1].shape
    assert np.abs(pixels[0] - pixels[1]).mean() < 2  # fonts differ a little between releases


def test_the_printed_table_is_the_record() -> None:
    recorded = json.loads((ROOT / "training/results/grid.json").read_text())
    assert f"held-out accuracy after step {recorded['steps']}:" in README.read_text()
    for detail in ("k=1", "k=2", "k=4", "all"):
        rows = [row for row in recorded["evaluation"] if row["detail"] == detail]
        cells = "  ".join(
            f"{100 * row['accuracy']:.1f} ({100 * row['token_accuracy']:.1f})" for row in rows
        )
        assert f"{detail}, {rows[0]['answers']} answers  {cells}" in re.sub(
            r" {2,}", "  ", README.read_text()
        )


@pytest.mark.parametrize("demo", ["digits", "grid"])
def test_what_is_said_of_untrained_counts_is_the_record(demo: str) -> None:
    record = json.loads((ROOT / "training/results/untrained_counts.json").read_text())
    found = record[demo]["counts"]
    shares = [{**count["by_detail"], "all": count["accuracy"]} for count in found]
    for detail in shares[0]:
        cells = " | ".join(f"{100 * share[detail]:.1f}" for share in shares)
        assert f"| {demo}, {detail} | {cells} |" in prose()
    said = " ".join(UNKNOWN_COUNTS.split())
    for trained in (True, False):
        own = [c for c in found if c["trained"] is trained and c["num_image_tokens"] > 1]
        spread = sorted({round(100 * c["by_detail"]["k=2"]) for c in own})
        assert " to ".join(str(n) for n in dict.fromkeys((spread[0], spread[-1]))) + " %" in said
    assert [c["num_image_tokens"] for c in found if c["trained"]] == [4, 16, 64]


def test_what_is_said_of_arms_over_seeds_is_the_record() -> None:
    page = (ROOT / "docs/flexibility.md").read_text()
    record = json.loads((ROOT / "training/results/flexibility.json").read_text())
    assert all(accuracy_table(record, "samples", detail) in page for detail in ("all", "k=4"))
    for row in spent_table(record).splitlines():
        assert row.rsplit("|", 2)[0] + "|" in page  # without times
    assert record["complete"] is ("not in the record yet" not in page)
    savings = {(c["arm"], c["says"].split()[1]): c["found"] for c in record["claims"]["savings"]}
    for arm in ("stochastic 2:3:5", "wide"):
        assert all(savings[arm, what].strip("- ") in page for what in ("vision", "FLOPs"))


def test_what_is_said_of_methods_is_the_record() -> None:
    record = json.loads((ROOT / "training/results/methods.json").read_text())
    page = (ROOT / "docs/flexibility.md").read_text()
    assert all(accuracy_table(record, "samples", detail) in page for detail in ("all", "k=4"))
    assert {run["seed"] for run in record["runs"]} == {0} and "**one seed**" in page


def test_what_is_said_of_drawn_counts_is_the_record() -> None:
    record = json.loads((ROOT / "training/results/drawn_counts.json").read_text())
    short = {None: "", "every token": ", positions of patches", "sines and c": ", places added"}
    for run in record["runs"]:
        name = ", ".join(run["drawn"]) + short[run["change"] and run["change"][:11]]
        for detail in ("k=2", "k=4"):
            shares = {count: f"{100 * v:.1f}" for count, v in run["accuracy"][detail].items()}
            cells = [f"**{v}**" if n in run["drawn"] else v for n, v in shares.items()]
            assert f"| {name}, {detail} | {' | '.join(cells)} |" in prose()
        assert min(run["accuracy"]["k=1"][n] for n in ("4", "9", "16", "25", "36", "49")) > 0.97
    before = json.loads((ROOT / "training/results/untrained_counts.json").read_text())["digits"]
    three = {str(c["num_image_tokens"]): c for c in before["counts"] if c["trained"]}
    for shares in (
        [count["by_detail"]["k=2"] for count in three.values()],
        [record["digits"]["accuracy"]["k=2"][count] for count in three],
    ):
        assert f"to {', '.join(f'{100 * share:.1f}' for share in shares)} %" in prose()
    ended = record["ended_early"]
    losses = f"{ended['loss']:.2f} against {ended['loss_in_order']:.2f} in order"
    assert f"after {ended['step']} steps the loss was {losses}" in prose()


def test_what_is_said_of_token_budgets_is_the_record() -> None:
    record = json.loads((ROOT / "training/results/token_budgets.json").read_text())
    routing, pages = record["routing"], prose()
    assert f"{routing['trained_on']} samples" in pages
    assert f"{routing['reported_on']} reported" in pages
    for found in routing["budgets"]:
        fixed, mix, router, oracle = (f"{100 * p['accuracy']:.1f}" for p in found["policies"])
        gain = {name: f"{100 * value:+.1f}" for name, value in found["router_over_fixed"].items()}
        over = f"{gain['difference']} ({gain['low']} to {gain['high']})"
        count = found["policies"][0]["name"].split()[1]
        row = f"| {found['budget']:g} | {count}: {fixed} | {mix} | {router} | {over} | {oracle} |"
        assert row in pages


@pytest.mark.parametrize(
    ("record", "label"),
    [("digits", "digits"), ("digits_seed1", "digits, seed 1"), ("grid", "grid")],
)
def test_the_numbers_are_those_recorded(record: str, label: str) -> None:
    pages = prose()
    recorded = json.loads((ROOT / f"training/results/{record}.json").read_text())
    accuracy: dict[str, dict[int, float]] = {}
    for row in recorded["evaluation"]:
        accuracy.setdefault(row["detail"], {})[row["num_image_tokens"]] = 100 * row["accuracy"]
    for detail in accuracy.keys() - {"all"}:
        cells = " | ".join(f"{value:.1f}" for _, value in sorted(accuracy[detail].items()))
        assert f"| {label}, {detail} | {cells} |" in pages
    assert recorded["machine"] in pages
    if record == "digits_seed1":
        return  # other work ran beside it: no time of it is told
    training = f"{recorded['steps']} steps in {recorded['training_s']:.0f} s"
    assert f"{training}, the whole command {recorded['wall_s']:.0f} s" in pages


def test_the_projector_table_is_the_recorded_calculation() -> None:
    pages = prose()
    recorded = json.loads((ROOT / "kernels/results/calculated/results.json").read_text())
    peaks = recorded["cases"][0]["peaks"]
    assert f"({peaks['flops'] / 1e12:g} TFLOP/s, {peaks['bandwidth'] / 1e12:g} TB/s)" in pages
    cases = {row["case"]: row for row in recorded["cases"]}
    rows = (
        ("adaptive, as it ships", "adaptive", "save", " of eager's"),
        ("adaptive, fused products as fast as cuBLAS", "adaptive", "fused", ""),
        ("resize, as it ships", "resize", "save", ""),
        ("adaptive, `train.projector_backward=recompute`", "adaptive", "recompute", ""),
    )
    for label, pool, way, unit in rows:
        ways = cases[f"T=64,n=12,pool={pool}"]["providers"]
        times = {name: found["timings"]["both"]["median_ms"] for name, found in ways.items()}
        eager, compiled = (times[other] / times[way] for other in ("eager_grouped", "compile"))
        kept = ways[way]["memory"]["saved"] / ways["eager_grouped"]["memory"]["saved"]
        line = f"| n = 12, {label} | {eager:.2f}x | {compiled:.2f}x | {kept:.0%}".replace("%", " %")
        assert f"{line}{unit} |" in pages


def test_the_cost_of_inserting_features_is_recorded() -> None:
    record = json.loads((ROOT / "training/results/insertion.json").read_text())
    rows = {row["way"]: row for row in record["ways"] if row["dtype"] == "bfloat16"}
    now, before = rows["index_copy (training)"], rows["masked_scatter"]
    cost = [
        f"{row['forward_ms'] + row['backward_ms']:.0f} ms and {row['peak_mb']:.0f} MB"
        for row in (now, before)
    ]
    assert f"{cost[0]} at known positions, {cost[1]} by `masked_scatter`, the same bits" in prose()
    assert now["same_bits"] and before["same_bits"]
    shape = "{features} features among {tokens} tokens of width {width}"
    assert shape.format_map(record) in prose()


def test_the_spills_are_those_recorded() -> None:
    record = json.loads((ROOT / "kernels/results/compile_matrix.json").read_text())
    (old, a), (pinned, b), (new, c) = (
        (version, len(found["beyond_a_limit"])) for version, found in record.items()
    )
    assert f"{a} spill with {old}, {b} with {pinned} and {c} with {new}" in prose()
    assert f"Of {record[old]['configurations']}, as" in prose()


def test_the_reliability_table_is_the_record() -> None:
    pages = prose()
    record = json.loads((ROOT / "training/results/reliability.json").read_text())
    ours, stock = record["kills_inside_a_save"], record["kills_inside_stock_save"]
    assert f"{ours['broken']} of {ours['trials']} broken" in pages
    assert f"{stock['broken']} of {stock['trials']}" in pages
    stall = record["checkpoint_stall"]
    assert f"{stall['background_stall_s']:.2f} s instead of {stall['synchronous_s']:.2f} s" in pages
    rows = record["chaos"]["rows"]
    assert len({row["fault"] for row in rows}) == 10
    crashes = [row["lost"] for row in rows if row["exit_codes"] != [75, 75]]
    assert f"at most {max(crashes)} steps" in pages
    assert not any(row["lost"] for row in rows if row["exit_codes"] == [75, 75])
    hung = next(row for row in rows if 76 in row["exit_codes"])
    assert f"after {hung['seconds']:.1f} s" in pages


def test_the_table_of_estimates_is_the_record() -> None:
    pages = prose()
    record = json.loads((ROOT / "training/results/estimate.json").read_text())
    for name, case in record["cases"].items():
        measured = case["measured_peak"]
        part = case["estimated_peak"] / measured
        assert f"| {name} | {measured / 1e6:.1f} | {part:.3f} |" in pages
    large = record["large"]
    assert f"takes {large['cpu_s']:.0f} s of one core" in pages
    assert f"{large['memory_gb']:.1f} GB of memory" in pages


def test_the_data_tables_are_the_record() -> None:
    pages = prose()
    results = ROOT / "data_pipeline/results"
    record = json.loads((results / "bench.json").read_text())["results"]
    mixes = json.loads((results / "planner.json").read_text())["results"]["planner"]["mixes"]
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
        assert f"| {label} | {cells} |" in pages
    many = ("8192 tokens, 64", "16384 tokens, 64", "32768 tokens, 64", "16384 tokens, 8")
    large = [mixes[f"many_images, {case} packs"] for case in many]
    cells = " | ".join(f"{mix['efficiency']:.3f}" for mix in large)
    assert f"| efficiency | {cells} |" in pages
    assert f"above {large[0]['efficiency_bound']:.3f}" in pages
    heavy = mixes["text_heavy, 8192 tokens, 64 packs"]["efficiency"]
    assert f"text only, efficiency in 8192 tokens is {heavy:.3f}" in pages
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
        in pages
    )
    ratios = loader["ratio"], loader["pillow_ratio"]
    assert ("{:.1f} times as fast; with Pillow's resizing {:.1f} times".format(*ratios)) in pages
    photo = loader["cpu_ms_per_large_photo"]
    for way, text in (
        ("reduced, torch resizes", "ms at a reduced JPEG scale"),
        ("full, torch resizes", "ms in full"),
        ("usual way", "ms with Pillow"),
    ):
        assert f"{photo[way]:.0f} {text}" in pages
    seconds = startup["first_batch_s"], startup["resumed_first_batch_s"]
    assert "{:.1f} s, on resume {:.1f} s".format(*seconds) in pages
    assert startup["samples"] == 1_000_000


def record_of(name: str) -> dict[str, Any]:
    """The results of `data_pipeline.bench` in a record of their own."""
    record = json.loads((ROOT / f"data_pipeline/results/{name}.json").read_text())
    assert f"data_pipeline.bench {name}" in record["command"]
    return record["results"][name]


def test_what_the_data_pages_say_of_stores_and_conversion_is_recorded() -> None:
    pages = prose()
    remote = record_of("remote")
    each, together = remote["each member"], remote["members together"]
    assert (
        f"{together['requests_per_sample']:.1f} or {each['requests_per_sample']:.1f} requests; "
        f"together {together['unused_bytes_per_sample']:.0f} bytes unused "
        f"({100 * together['unused_share']:.2f} %)"
    ) in pages
    prepare = record_of("prepare")
    formats = [prepare[name] for name in ("LLaVA JSON", "parquet with pictures", "folder")]
    rates = ", ".join(f"{of['here']['entries_per_cpu_s'] / 1000:.1f} k" for of in formats)
    ratios = ", ".join(f"{of['ratio']['entries_per_cpu_s']:.1f}" for of in formats)
    assert prepare["against_commit"].startswith("4ab4cae")
    assert f"{rates} per CPU second with the start; {ratios} times commit 4ab4cae" in pages
