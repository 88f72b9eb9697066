"""Warm a small vision tower up on a demo corpus, as real runs start from a trained SigLIP.

    python -m training.experiments.warm_tower CONFIG.yaml runs/tower
    python -m training.train CONFIG.yaml model.vision.pretrained=runs/tower

The tower of model.vision.config learns which glyph is where in the training pictures of the corpus
of data.prepare: each patch names what lies at four points of it. So runs that are compared can all
start from one tower that reads, and have only to learn how to tell what it sees. OUT holds it as
transformers saves it, and warm_tower.json: how it was made, and the share of points on held-out
pictures that it names rightly. An OUT that was made in the same way is kept.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.cli import at_least, command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.files import written_aside
from data_pipeline.paths import path_argument
from data_pipeline.prepare.demo_corpus import demo_corpus
from data_pipeline.prepare.demo_sample import DemoCorpus, Painting, Split
from data_pipeline.tiling import TilingSettings, cut_grid, grid_for
from training.config import RunConfig, load_config
from training.model.build import model_config

REPORT = "warm_tower.json"
STEPS, BATCH, LR, HELD_OUT = 600, 32, 2e-3, 300
POINTS = 2
"""A patch is asked at POINTS x POINTS places."""
NOTHING_WEIGHT = 0.1
"""Of a point without a glyph in the loss: most of a page is paper."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("training.experiments.warm_tower", __doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the training run")
    parser.add_argument("out", type=path_argument, metavar="OUT", help="folder for the tower")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, as for training"
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=STEPS, help=f"of {BATCH} pictures each ({STEPS})"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    report = warm_tower(load_config(args.config, args.overrides), args.out, args.steps)
    print(f"{args.out}: names {report['accuracy']:.1%} of the glyphs on held-out pictures")


def warm_tower(config: RunConfig, out: Path, steps: int = STEPS) -> dict[str, Any]:
    """Write a warm tower for the runs of `config` to `out`, unless it is there; returns the report.

    A pure function of the arguments on one machine; `config.seed` decides weights and pictures.

    Raises:
        InputError: a config without a demo corpus, or an `out` that holds something else.
    """
    if config.data.prepare is None:
        raise InputError(
            "a tower is warmed up on a demo corpus, and the config has no data.prepare; add it"
        )
    tiling = config.data.tiling.model_copy(update={"thumbnail": False})
    made: dict[str, Any] = {
        "format": config.data.prepare.format,
        "seed": config.seed,
        "steps": steps,
        "vision": dict(config.model.vision.config),
        "tiling": tiling.model_dump(mode="json"),
    }
    if out.exists():
        return _found(out, made)

    def check() -> None:
        if out.exists():
            raise InputError(f"{out} has appeared meanwhile; start again to use it")

    torch.manual_seed(config.seed)
    reader = PatchReader(config, demo_corpus(made["format"]), tiling)
    reader.learn(steps)
    report = {**made, "accuracy": reader.accuracy()}
    with written_aside(out, check) as folder:
        reader.tower.save_pretrained(folder)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _found(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The report of the tower in `out`; InputError if that was not made as is wanted."""
    path = out / REPORT
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if different := [key for key in made if found.get(key) != made[key]]:
        key = different[0]
        raise InputError(
            f"{out} holds no tower, or one that was made otherwise: {key} is {found.get(key)!r} "
            f"there and {made[key]!r} here; remove it, or name another folder"
        )
    return dict(found)


class PatchReader:
    """A tower in fp32 and a linear head that names the glyphs at the points of each patch."""

    def __init__(self, config: RunConfig, demo: DemoCorpus, tiling: TilingSettings) -> None:
        full = model_config(config.model, vocab_size=1, image_token_id=0)
        self._family, vision = full.vision_family, full.vision_config
        self._mean, self._std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (full.image_mean, full.image_std)
        )
        self._demo, self._tiling, self._seed = demo, tiling, config.seed
        self._side, _ = self._family.patch_grid(vision)
        self.tower: Any = self._family.build(vision, torch.float32)
        self._num_names = len(demo.glyph_names) + 1  # 0 is nothing
        self._head = nn.Linear(vision.hidden_size, POINTS**2 * self._num_names)

    def learn(self, steps: int) -> None:
        """AdamW with a warm-up and a decay to nothing; prints a line now and then."""
        parameters = [*self.tower.parameters(), *self._head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps + 1, pct_start=0.1)
        weight = torch.ones(self._num_names)
        weight[0] = NOTHING_WEIGHT
        for step, (pixels, names) in enumerate(self._batches("train", steps), 1):
            loss = nn.functional.cross_entropy(self._logits(pixels), names, weight)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == steps:
                print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the points with a glyph, on held-out pictures, that are named rightly."""
        right = total = 0
        for pixels, names in self._batches("eval", HELD_OUT // BATCH):
            there = names > 0
            found = self._logits(pixels).argmax(-1)
            right += int((found == names)[there].sum())
            total += int(there.sum())
        return right / total

    def _logits(self, pixels: Tensor) -> Tensor:
        """Of the names at every point, [T * patches * POINTS^2, names]; pixels are uint8."""
        normalised = (pixels / 255 - self._mean) / self._std
        return self._head(self._family.patches(self.tower, normalised)).view(-1, self._num_names)

    def _batches(self, split: Split, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles [T, 3, S, S] and the names at their points, [T * patches * POINTS^2]."""
        samples = self._demo.samples(split, number * BATCH, self._seed)
        for _ in range(number):
            tiles, names = [], []
            for _ in range(BATCH):
                painting = next(samples).paint()
                grid = grid_for(*painting.image.size, self._tiling)
                tiles.append(cut_grid(painting.image.convert("RGB"), grid, self._tiling))
                names.append(self._names(painting, grid))
            yield torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(np.concatenate(names))

    def _names(self, painting: Painting, grid: tuple[int, int]) -> np.ndarray:
        """The names at the points of a picture's tiles, in the order of tiles and patches."""
        width, height = painting.image.size
        places = np.zeros((height, width), dtype=np.int64)
        for glyph in painting.glyphs:
            number = self._demo.glyph_names.index(glyph.name) + 1
            places[glyph.top : glyph.bottom, glyph.left : glyph.right] = number
        per_tile = self._side * POINTS
        columns, rows = grid
        across = ((np.arange(columns * per_tile) + 0.5) * width / (columns * per_tile)).astype(int)
        down = ((np.arange(rows * per_tile) + 0.5) * height / (rows * per_tile)).astype(int)
        points = places[np.ix_(down, across)]
        split = (rows, self._side, POINTS, columns, self._side, POINTS)
        return points.reshape(split).transpose(0, 3, 1, 4, 2, 5).reshape(-1)


if __name__ == "__main__":
    run_cli(main)
