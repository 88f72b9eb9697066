"""What every arm trains: a corpus, a small model to start from, and the settings of the run.

The mix is `standard` of `data_pipeline.bench.mixes` at a quarter of its lengths: lognormal text, 0
to 4 images of 1 to 6 tiles of 16, 36 or 64 tokens. The head is as large a part of the decoder as in
a language model of three billion parameters, the tower as large a part of a tile's cost as
SigLIP so400m beside one.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.bench.mixes import STANDARD_IMAGES, TEXT_MEDIAN, draw_text
from data_pipeline.bench.photos import make_photo, make_sentence
from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.index import build_index
from data_pipeline.prepare.shard_writer import SampleWriter, ShardLimits
from data_pipeline.tokenizer import load_tokenizer, train_sentencepiece
from data_pipeline.yaml_text import write_yaml
from training.bench.planned_samples import plan_of
from training.bench.start_model import write_start
from training.config import RunConfig, load_config, save_config

TILE = 32
_SCALE = 4  # the mix's lengths over these
_TILES = ((1, 1), (2, 1), (3, 1), (2, 2), (5, 1), (3, 2))  # grids of 1 to 6 tiles
_PICTURE = 1.5  # sides of a picture over those of its tiles
_CHAT = ChatSettings(system="")
_OF_TRAINING, _HELD_OUT, _START = "train", "held-out", "start"

_SETTINGS: dict[str, Any] = {
    "seed": 0,
    "data": {
        "chat": {"system": ""},
        "tiling": {"tile_size": TILE, "max_tiles": 6, "thumbnail": False},
        "tokens": {"counts": [16, 36, 64], "probabilities": [0.34, 0.33, 0.33], "draw": "image"},
    },
    "model": {
        "vision": {
            "config": {
                "model_type": "siglip_vision_model",
                "image_size": TILE,
                "patch_size": 4,
                "hidden_size": 112,
                "intermediate_size": 448,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            }
        },
        "llm": {
            "config": {
                "model_type": "qwen2",
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 4096,
                "vocab_size": 640,
                "tie_word_embeddings": False,
            }
        },
    },
    "train": {
        "modules": {
            name: {"lr": 1.0e-3} for name in ("vision_model", "projector", "language_model")
        },
        # The one mean over a step's supervised tokens that other trainers take, too.
        "loss_weighting": "token",
        "warmup_fraction": 0.0,
        "min_lr_fraction": 1.0,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 5,
    },
    "deepspeed": {"param_persistence_threshold": 0},
    "checkpoint": {"every_steps": 1_000_000_000, "resume": "never"},
}


@dataclass(frozen=True)
class BenchWorkload:
    """One epoch of `steps` steps of about `samples_per_step` samples, on `ranks` ranks.

    overrides: settings of the run, as `key=value`. held_out: samples that are scored at the end.
    """

    steps: int
    samples_per_step: int
    ranks: int
    overrides: tuple[str, ...] = ()
    held_out: int = 48

    @property
    def samples(self) -> int:
        """Of the epoch."""
        return self.steps * self.samples_per_step

    def prepare(self, folder: Path) -> None:
        """Write all of it into `folder`, unless it is there.

        Raises:
            InputError: another workload lies there, or a setting is wrong.
        """
        note = folder / "workload.json"
        text = json.dumps(asdict(self), indent=1)
        if note.exists():
            if note.read_text(encoding="utf-8") != text:
                raise InputError(
                    f"{folder} holds runs of other settings; name another folder with --work, or "
                    "remove it"
                )
            return
        unfinished = (folder / "settings.yaml").exists()
        if folder.exists() and any(folder.iterdir()) and not unfinished:
            raise InputError(f"{folder} is not empty and no folder of this command; name another")
        for part in (_OF_TRAINING, _HELD_OUT, _START):
            shutil.rmtree(folder / part, ignore_errors=True)
        write_atomically(
            folder / "settings.yaml", write_yaml(self._settings(folder.resolve())).encode()
        )
        config = load_config(folder / "settings.yaml", list(self.overrides))
        _write_corpus(folder, self)
        fitted = fit_packs(config, self)
        write_start(fitted, folder / _START)
        model = fitted.model.model_copy(update={"pretrained": str(folder.resolve() / _START)})
        save_config(fitted.model_copy(update={"model": model}), folder / "config.yaml")
        write_atomically(note, text.encode())  # last: all of it is there

    def _settings(self, folder: Path) -> dict[str, Any]:
        own = {
            "datasets": {"bench": {"shards": [str(folder / _OF_TRAINING)], "repeat": 1}},
            "tokenizer": str(folder / "tokenizer.model"),
            # Room for any sample; `fit_packs` finds the length.
            "pack": {
                "max_tokens": 10**6,
                "packs_per_step": self.ranks,
                "window_samples": self.samples,
            },
        }
        return {
            **_SETTINGS,
            "output_dir": str(folder / "run"),
            "data": {**_SETTINGS["data"], **own},
            "train": {**_SETTINGS["train"], "steps": self.steps},
        }


def open_workload(folder: Path) -> RunConfig:
    """The settings of what `BenchWorkload.prepare` wrote."""
    return load_config(folder / "config.yaml")


def batch_size(folder: Path) -> int:
    """Samples of a rank and step, where every step has as many."""
    noted = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return int(noted["samples_per_step"]) // int(noted["ranks"])


def held_out_data(config: RunConfig, folder: Path) -> RunConfig:
    """The same settings on the held-out samples."""
    source = {"held-out": {"shards": [str(folder / _HELD_OUT)], "repeat": 1}}
    data = type(config.data).model_validate({**config.data.model_dump(), "datasets": source})
    return config.model_copy(update={"data": data})


def fit_packs(config: RunConfig, workload: BenchWorkload) -> RunConfig:
    """Settings whose packs are as long as an epoch of `steps` steps needs them, or nearly."""
    lengths = [length for plan in plan_of(config).packs for length in plan.lengths.tolist()]
    packs = workload.steps * workload.ranks
    for slack in (1.01, 1.02, 1.03, 1.05, 1.1):
        longest = max(max(lengths), int(slack * sum(lengths) / packs) + 1)
        pack = config.data.pack.model_copy(update={"max_tokens": longest})
        fitted = config.model_copy(update={"data": config.data.model_copy(update={"pack": pack})})
        steps = len(plan_of(fitted).steps)
        if steps <= workload.steps:
            break
    return fitted.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def _write_corpus(folder: Path, workload: BenchWorkload) -> None:
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for name, samples in ((_OF_TRAINING, workload.samples), (_HELD_OUT, workload.held_out)):
        lengths = draw_text(rng, samples, TEXT_MEDIAN / _SCALE).tolist()
        images = rng.choice(len(STANDARD_IMAGES), samples, p=STANDARD_IMAGES).tolist()
        with SampleWriter(folder / name, ShardLimits(samples=200)) as writer:
            for number in range(samples):
                turns, files = _sample(rng, lengths[number], images[number])
                texts += [turn["content"][-1]["text"] for turn in turns]
                writer.write(f"{number:06d}", turns, files)
    train_sentencepiece(texts, folder / "tokenizer.model", 400)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for name in (_OF_TRAINING, _HELD_OUT):
        build_index(str(folder / name), tokenizer, _CHAT)


def _sample(
    rng: np.random.Generator, words: int, images: int
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Two fifths of the text are the question."""
    files = {f"{number}.jpg": _picture(rng) for number in range(images)}
    asked = [{"type": "image", "image": name} for name in files]
    asked_words = max(2, round(0.4 * words))
    asked.append({"type": "text", "text": make_sentence(rng, asked_words)})
    answer = [{"type": "text", "text": make_sentence(rng, max(2, words - asked_words))}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], files


def _picture(rng: np.random.Generator) -> bytes:
    columns, rows = _TILES[int(rng.integers(len(_TILES)))]
    if rng.random() < 0.5:
        columns, rows = rows, columns
    width, height = (round(_PICTURE * TILE * side) for side in (columns, rows))
    return make_photo(width, height, seed=int(rng.integers(2**31)))
