"""docs/recipe.md on a tiny stand-in: the same commands, the same files, a model of no size."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, SiglipConfig, SiglipModel

from tests.data_pipeline.small_tokenizers import save_hugging_face
from tests.pages import ROOT, commands, copy_repository, run_command

PAGE = ROOT / "docs" / "recipe.md"
PRESET = "training/configs/ristretto_3b.yaml"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEEDS_A_NETWORK = ("hf download", "python -m venv", ".venv-benchmarks/bin/pip")
# An override given later wins: the smaller numbers go to the end.
SMALL = "train.steps=2 data.pack.packs_per_step=2 train.precision=fp32"


def smaller(command: str) -> str | None:
    """What is run of a command of the page; None for one that cannot be, and why is said here."""
    if command.startswith(NEEDS_A_NETWORK):
        return None  # the files that it would bring are in the fixture
    if command.startswith(".venv-benchmarks/bin/python"):
        return None  # tests/training/test_lmms_eval.py
    if command.startswith("export "):
        return None  # `stand_in` sets what it exports
    if command.startswith("torchrun"):
        return command.replace("--nproc-per-node 8", "--nproc-per-node 2") + f" {SMALL}"
    if command.startswith("slurm/chain.sh"):  # tests/slurm/test_stages.py submits a chain
        return command.replace("chain.sh", "chain.sh --dry-run")
    if command.startswith("sbatch"):  # tests/slurm/test_preflight.py submits it
        _, _, arguments = command.partition("slurm/preflight.sh")
        return f"python -m training.preflight {arguments} {SMALL}"
    if command.startswith("python -m data_pipeline.stats"):
        return f"{command} data.pack.packs_per_step=2"
    if command.startswith("python -m data_pipeline.inspect"):
        return f"{command} data.pack.packs_per_step=2"
    return command


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with a tiny preset, and raw/ as the downloads would leave it."""
    root = tmp_path_factory.mktemp("recipe") / "clone"
    copy_repository(root)
    save_weights(root / "raw", shrink_preset(root / PRESET))
    save_llava(root / "raw" / "llava")
    save_finevision(root / "raw" / "finevision" / "CoSyn_400k_table")
    for name in ("visual7w", "textvqa"):
        save_finevision(root / "raw" / "instructions" / name)
    Image.new("RGB", (150, 110), "red").save(root / "photo.jpg")
    return root


def shrink_preset(preset: Path) -> dict[str, Any]:
    """The preset with a tower and a language model of a few thousand parameters."""
    settings = yaml.safe_load(preset.read_text())
    settings["model"]["vision"]["config"] |= VISION
    settings["model"]["llm"]["config"] |= TEXT
    settings["data"]["tiling"]["tile_size"] = VISION["image_size"]
    settings["data"]["loader"]["threads"] = 1
    preset.write_text(yaml.safe_dump(settings))
    return settings["model"]


def save_weights(raw: Path, model: dict[str, Any]) -> None:
    """Both towers in one checkpoint, as SigLIP 2's; a language model with its tokenizer."""
    text = {**TEXT, "vocab_size": 50}
    vision = {**model["vision"]["config"]}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(
        raw / "siglip2"
    )
    config = AutoConfig.for_model(**model["llm"]["config"])
    AutoModelForCausalLM.from_config(config).save_pretrained(raw / "qwen")
    save_hugging_face(raw / "qwen")


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (90, 120 + 60 * (seed % 3), 3))
    return Image.fromarray(noise.astype(np.uint8))


def save_llava(folder: Path) -> None:
    """LLaVA-Pretrain: a list of entries, and an archive of numbered folders of images."""
    folder.mkdir(parents=True)
    entries = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(60):
            name = f"{number % 3:05d}/{number:09d}.jpg"
            with archive.open(name, "w") as file:
                picture(number).save(file, "jpeg")
            turns = [
                {"from": "human", "value": "Describe the image concisely.\n<image>"},
                {"from": "gpt", "value": f"a picture with the number {number}"},
            ]
            entries.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(entries))


def save_finevision(folder: Path) -> None:
    """A subset of FineVision: parquet with all of its columns, images inside."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(40):
        file = folder / "image.jpg"
        picture(number).save(file)
        ratings = {
            f"{kind}_{what}": [4] if what == "ratings" else 1 + number % 5
            for kind in ("relevance", "image_correspondence", "visual_dependency", "formatting")
            for what in ("ratings", "min")
        }
        rows.append(
            {
                "images": [{"bytes": file.read_bytes(), "path": None}],
                "texts": [{"user": "Which number?", "assistant": f"The number is {number}."}],
                "source": folder.name,
                **ratings,
            }
        )
        file.unlink()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")


@pytest.mark.multiprocess
def test_the_recipe_runs_from_the_first_command_to_the_last(stand_in: Path) -> None:
    stages = ("ALIGN", "PRETRAIN", "FINETUNE")
    environment = {f"{stage}_CONFIG": PRESET for stage in stages}
    exported = " ".join(f"{name}={value}" for name, value in environment.items())
    assert f"export {exported}" in commands(PAGE)
    printed = {}
    for command in commands(PAGE):
        if (small := smaller(command)) is not None:
            printed[command] = run_command(small, stand_in, **environment)
    stands = [text for command, text in printed.items() if command.startswith("torchrun")]
    assert len(stands) == 3
    (chain,) = (text for command, text in printed.items() if command.startswith("slurm/chain"))
    assert [f"slurm/{name.lower()}.sh" in chain for name in ("align", *stages[1:])] == [True] * 3
    for stage in ("align", "pretrain", "finetune"):
        assert (stand_in / "runs" / "3b" / stage / "checkpoints" / "step-00000002").is_dir()
    assert (stand_in / "runs" / "3b" / "model" / "config.json").is_file()
    skipped = json.loads((stand_in / "data" / "pretrain" / "prepare.json").read_text())
    assert skipped["left_out"] == {"--min-relevance 3": 16} and not skipped["skipped"]


def test_the_chain_and_the_single_commands_say_the_same() -> None:
    """Each stage's settings are written twice on the page: once for Slurm, once without."""
    page = commands(PAGE)
    (chain,) = (command.split() for command in page if command.startswith("slurm/chain.sh"))
    chain = [word.strip("'") for word in chain if "=" in word and not word.startswith("--")]
    for stage in ("align", "pretrain", "finetune"):
        expected = {w.removeprefix(f"{stage}:") for w in chain if w.startswith((f"{stage}:",))}
        expected |= {word for word in chain if ":" not in word}
        (single,) = (c for c in page if c.startswith("torchrun") and f"runs/3b/{stage} " in c)
        given = {word.strip("'") for word in single.split() if "=" in word}
        own = {word for word in given if word.startswith(("output_dir=", "checkpoint.init_from="))}
        assert given - own == expected, stage
