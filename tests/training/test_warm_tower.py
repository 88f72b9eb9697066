"""A warmed-up tower: what its patches are taught, that it learns, and that runs start from it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.prepare.demo_corpus import DemoFormat, demo_corpus
from data_pipeline.tokenizer import load_tokenizer
from tests.training import scenarios
from training.config import RunConfig
from training.experiments.warm_tower import POINTS, PatchReader, warm_tower
from training.model.build import build_model


def config_for(corpus: Path, format: DemoFormat, side: int, patch: int, *more: str) -> RunConfig:
    return scenarios.tiny_config(
        corpus,
        f"data.prepare={{format: {format}, out: {corpus}}}",
        f"data.tiling={{tile_size: {side}, max_tiles: 4}}",
        f"model.vision.config.image_size={side}",
        f"model.vision.config.patch_size={patch}",
        *more,
    )


def test_points_of_patches_have_the_names_of_their_cells(digits_corpus: Path) -> None:
    """k = 5 in 60 px: a cell is 2 x 2 patches of 6 px."""
    config = config_for(digits_corpus, "scans", 60, 6)
    reader = PatchReader(config, demo_corpus("scans"), config.data.tiling)
    for sample in demo_corpus("scans").samples("train", 10, 0):
        k = int(sample.metadata["detail"].removeprefix("k="))
        painting = sample.paint()
        names = reader._names(painting, (1, 1)).reshape(10, 10, POINTS, POINTS)
        points = names.transpose(0, 2, 1, 3).reshape(20, 20) - 1
        cells = np.array([int(glyph.name) for glyph in painting.glyphs]).reshape(k, k)
        places = ((np.arange(20) + 0.5) * 3 * k // 60).astype(int)
        assert np.array_equal(points, cells[np.ix_(places, places)])


def test_points_of_tiles_are_where_the_tiles_are(digits_corpus: Path) -> None:
    """Of a page of four tiles, ink in the tiles lies at points that have a name."""
    config = config_for(digits_corpus, "pages", 64, 8, "data.tiling.thumbnail=false")
    demo = demo_corpus("pages")
    reader = PatchReader(config, demo, config.data.tiling)
    for sample in demo.samples("train", 60, 0):
        columns, rows = (side // 64 for side in sample.metadata["size"])
        painting = sample.paint()
        names = reader._names(painting, (columns, rows)).reshape(rows * columns, 8, 8, 4)
        for tile in range(rows * columns):
            top, left = (64 * place for place in divmod(tile, columns))
            for row, column in np.ndindex(8, 8):
                for point, (down, across) in enumerate(np.ndindex(2, 2)):
                    x, y = left + 8 * column + 4 * across + 2, top + 8 * row + 4 * down + 2
                    here = [
                        glyph.name
                        for glyph in painting.glyphs
                        if glyph.left <= x < glyph.right and glyph.top <= y < glyph.bottom
                    ]
                    number = names[tile, row, column, point]
                    assert ([demo.glyph_names[number - 1]] if number else []) == here


def test_a_tower_learns_to_read_and_runs_start_from_it(digits_corpus: Path, tmp_path: Path) -> None:
    config = config_for(digits_corpus, "grid", 32, 8)
    assert warm_tower(config, tmp_path / "cold", steps=1)["accuracy"] < 0.5
    out = tmp_path / "warm"
    report = warm_tower(config, out, steps=60)
    assert report["accuracy"] > 0.9
    config.model.vision.pretrained = str(out)
    tokenizer = load_tokenizer(digits_corpus / "tokenizer.model")
    started = build_model(config, tokenizer).vision_model.state_dict()
    again = tmp_path / "again"
    config.model.vision.pretrained = None
    assert warm_tower(config, again, steps=60) == report  # from the seed
    config.model.vision.pretrained = str(again)
    for name, value in build_model(config, tokenizer).vision_model.state_dict().items():
        assert torch.equal(value, started[name]), name


def test_a_tower_is_made_once(digits_corpus: Path, tmp_path: Path) -> None:
    config = config_for(digits_corpus, "grid", 32, 8)
    out = tmp_path / "tower"
    report = warm_tower(config, out, steps=1)
    weights = out / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert warm_tower(config, out, steps=1) == report
    assert weights.stat().st_mtime_ns == written
    with pytest.raises(InputError, match="steps is 1 there and 2 here"):
        warm_tower(config, out, steps=2)
    with pytest.raises(InputError, match="format is None there"):
        warm_tower(config, digits_corpus, steps=1)
    config.data.prepare = None
    with pytest.raises(InputError, match=r"no data\.prepare"):
        warm_tower(config, tmp_path / "other", steps=1)
    assert not (tmp_path / "other").exists()
